"""The sound networks of the scores and their PyTorch originals on this CPU: time and memory of a batch of clips of 8 s.

    python -m tests.benchmarks.embedders --originals DIR,DIR,… [--rows vggish,panns] [--batch 4] [--json FILE]

DIRs are put on the import path; each row needs what its original is in:

    vggish, panns, synchformer   checkout of av-benchmark (github.com/hkchengrex/av-benchmark); torchlibrosa; transformers
    passt                        checkout of github.com/kkoutini/passt_hear21
    imagebind                    checkout of github.com/facebookresearch/ImageBind
    clap                         src/laion_clap of github.com/LAION-AI/CLAP; torchlibrosa

and torch, einops, ftfy and regex; what the originals import besides and do not use is stubbed. Each side of each row is a
process of its own on the same cores, with random weights (the tests hold the embeddings themselves to the originals), float32.
Printed are the shortest of some calls after the first one, and the process's largest resident memory: weights, compilation and
all.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
SIDES = ('original', 'ours')
# Row → the shape of its input for one clip: patches, waveform, 10 s of log-mel, segments, clips of log-mel, waveform.
ROWS = {'vggish': (8, 96, 64), 'panns': (128_000,), 'passt': (1000, 128), 'synchformer': (24, 66, 128),
        'imagebind': (3, 204, 128), 'clap': (480_000,)}


def measure(args: argparse.Namespace) -> None:
    """Runs one side of one row in this process; writes its figures to args.result."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    inputs = 0.1 * np.random.default_rng(0).normal(size=(args.batch, *ROWS[args.row])).astype(np.float32)
    if args.side == 'original':
        sys.path[:0] = args.originals.split(',')
        from tests.benchmarks import embedders_original as side
        side.prepare(args.row, args.threads)
    else:
        os.environ['JAX_PLATFORMS'] = 'cpu'
        from tests.benchmarks import embedders_ours as side  # type: ignore[no-redef]
    run = side.BUILDERS[args.row](inputs)
    run()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    status = pathlib.Path('/proc/self/status').read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))
    args.result.write_text(json.dumps({'seconds': min(seconds), 'peak_gb': 1024 * peak / 1e9}))


def run_side(args: argparse.Namespace, row: str, side: str, path: pathlib.Path) -> dict[str, Any]:
    """The figures of one side, by a process of its own."""
    command = [sys.executable, '-m', 'tests.benchmarks.embedders', '--side', side, '--row', row, '--result', str(path),
               '--originals', args.originals, '--batch', str(args.batch), '--repeats', str(args.repeats), '--threads',
               str(args.threads)]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {'OMP_NUM_THREADS': str(args.threads)}, capture_output=True,
                             text=True, check=False)
    if process.returncode:
        return {'error': (process.stderr.strip().splitlines() or [f'exit code {process.returncode}'])[-1]}
    return json.loads(path.read_text())


def line(row: str, original: dict[str, Any], ours: dict[str, Any]) -> str:
    """A row of the printed table."""
    errors = [f'{side}: {figures["error"]}' for side, figures in zip(SIDES, (original, ours)) if 'error' in figures]
    if errors:
        return f'| {row} | skipped: {"; ".join(errors)} |'
    cells = [f'{figures[key]:.2f}' for key in ('seconds', 'peak_gb') for figures in (original, ours)]
    ratios = [f'{ours[key] / original[key]:.2f}' for key in ('seconds', 'peak_gb')]
    return f'| {row} | {" | ".join((*cells[:2], ratios[0], *cells[2:], ratios[1]))} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--originals', required=True, help='folders, comma separated')
    parser.add_argument('--rows', default=','.join(ROWS), help='comma separated')
    parser.add_argument('--batch', type=int, default=4, help='clips')
    parser.add_argument('--repeats', type=int, default=2, help='calls after the first one')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=pathlib.Path, help='file to write the figures to')
    for name in ('--side', '--row'):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument('--result', type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return measure(args)
    print('| network | original s | our s | ratio | original GB | our GB | ratio |\n|---|---|---|---|---|---|---|', flush=True)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for row in args.rows.split(','):
            table[row] = {side: run_side(args, row, side, pathlib.Path(folder) / 'figures.json') for side in SIDES}
            print(line(row, *table[row].values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == '__main__':
    main()
