"""The fault run: 500 clips, 50 of them broken in ten ways, kill -9 twenty times, disk full twice; then all bytes are compared.

    python -m tests.benchmarks.extract_faults --folder=DIR [--clips=500] [--broken=5] [--kills=20] [--fulls=2]

Needs the right to mount a small tmpfs for the full disk (root); --fulls=0 leaves that out. Prints one JSON line; exit code 1
when the records of the disturbed run differ from the undisturbed ones, or other clips than the broken ones were rejected.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from tests import broken_media

ROOT = pathlib.Path(__file__).parents[2]
SPARE_KB = 700  # left on the full disk: some shards fit


def command(work: pathlib.Path) -> list[str]:
    """The extraction, in shards of five clips."""
    return [sys.executable, 'run.py', '--config=configs/base.py', f'--workdir={work}', '--mode=extract',
            '--config.sequence.duration_s=1.0', '--config.extract.datasets=(("faults", "media/faults"),)',
            '--config.extract.encoder=pixels', '--config.extract.codec=pca', '--config.extract.codec_fit_dataset=faults',
            '--config.extract.batch_size=8', '--config.extract.clips_per_shard=5']


def notes(work: pathlib.Path) -> set[str]:
    """Finished shards."""
    return {path.name for path in (work / 'records' / '.faults.partial' / 'progress').glob('train-*.json')}


def killed_run(work: pathlib.Path, random_source: random.Random, output) -> bool:
    """Starts the job and kills it: at any moment, or soon after some more shards were finished. False when it ended first."""
    before, more = len(notes(work)), random_source.choice((0, 1, 1, 2, 3))
    process = subprocess.Popen(command(work), cwd=ROOT, stdout=output, stderr=output)
    deadline = time.time() + (random_source.uniform(0, 12) if not more else 300)
    while process.poll() is None and time.time() < deadline and (not more or len(notes(work)) < before + more):
        time.sleep(0.02)
    time.sleep(random_source.uniform(0, 0.3))
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def full_run(work: pathlib.Path, output) -> bool:
    """Runs the job with nearly nothing left on its disk; whether it stopped as it should: exit code 1, a line that says why."""
    usage, filler = shutil.disk_usage(work / 'records'), work / 'records' / 'filler'
    filler.write_bytes(bytes(usage.free - SPARE_KB * 1024))
    run = subprocess.run(command(work), cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    filler.unlink()
    said = [line for line in run.stderr.splitlines() if line.startswith('error:')]
    return run.returncode == 1 and len(said) == 1 and ('space' in said[0] or 'full' in said[0])


def compare(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Files below two folders that are not the same bytes."""
    names = {str(path.relative_to(folder)) for folder in (left, right) for path in folder.rglob('*') if path.is_file()}
    same = lambda name: (left / name).is_file() and (right / name).is_file() and (
        (left / name).read_bytes() == (right / name).read_bytes())
    return sorted(name for name in names if not same(name))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    for name, default in (('clips', 500), ('broken', 5), ('kills', 20), ('fulls', 2), ('seed', 0)):
        parser.add_argument(f'--{name}', type=int, default=default)
    arguments = parser.parse_args()
    calm, disturbed = arguments.folder / 'calm', arguments.folder / 'disturbed'
    started = time.time()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    names = broken_media.write_dataset(calm / 'media' / 'faults', arguments.clips, arguments.broken)
    disturbed.mkdir()
    (disturbed / 'media').symlink_to(calm.absolute() / 'media')
    (disturbed / 'records').mkdir()
    random_source, kills, fulls, ended = random.Random(arguments.seed), 0, [], 0
    if arguments.fulls:
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200m', 'tmpfs', disturbed / 'records'], check=True)
    try:
        with open(arguments.folder / 'output.txt', 'w', encoding='utf-8') as output:
            subprocess.run(command(calm), cwd=ROOT, stdout=output, stderr=output, check=True)
            full_at = {(i + 1) * arguments.kills // (arguments.fulls + 1) for i in range(arguments.fulls)}
            while kills < arguments.kills and ended < arguments.kills:
                if kills in full_at:
                    full_at.remove(kills)
                    fulls.append(full_run(disturbed, output))
                if killed_run(disturbed, random_source, output):
                    kills += 1
                else:
                    ended += 1  # it was done: kill what follows at an earlier point
                    shutil.rmtree(disturbed / 'records' / 'faults', ignore_errors=True)
            subprocess.run(command(disturbed), cwd=ROOT, stdout=output, stderr=output, check=True)
        different = compare(calm / 'records', disturbed / 'records')
        rejected = [json.loads(line)['id'] for line in (disturbed / 'records/faults/rejected.jsonl').read_text().splitlines()]
    finally:
        if os.path.ismount(disturbed / 'records'):
            subprocess.run(['umount', '-l', disturbed / 'records'], check=False)
    missed, wrong = sorted(set(names) - set(rejected)), sorted(set(rejected) - set(names))
    print(json.dumps({'clips': arguments.clips, 'kills': kills, 'disk_full_said_so': fulls, 'ended_before_a_kill': ended,
                      'different_files': different, 'rejected': len(rejected), 'broken_but_accepted': missed,
                      'good_but_rejected': wrong, 'took_s': round(time.time() - started)}))
    sys.exit(bool(different or missed or wrong or not all(fulls)))


if __name__ == '__main__':
    main()
