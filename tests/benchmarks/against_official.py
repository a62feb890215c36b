"""Our models and the official PyTorch modules on this CPU: time, memory, and how far the results are apart.

    python -m tests.benchmarks.against_official [--official PATH] [--rows flow,vae_16k] [--seconds 8] [--json FILE]

PATH is a checkout of the official code (github.com/hkchengrex/MMAudio); without it only our side runs. Needs Linux, and for the
official side `pip install -e '.[official]'` and what the official modules of the chosen rows import: einops, omegaconf, timm,
torchdiffeq, nitrous-ema, open_clip_torch.

Each side of each row is a process of its own with the same file of synthetic weights (tests/golden/synthetic_weights.py in the
official form; ours is converted beforehand, as --mode=import does), the same inputs and number of threads, float32, and large
pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=1). Printed are the median of some calls, the ratio to the official one and what it
should be, the time from the start of the process to the first result (imports, weights and compilation), the process's largest
resident memory, and the largest difference of the results over the deviation of the official one (for training steps: relative
difference of losses and gradient norms).
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from tests.benchmarks import rows

START = time.perf_counter()
ROOT = pathlib.Path(__file__).parents[2]
SIDES = ('official', 'ours')


def measure(args: argparse.Namespace) -> None:
    """Runs one side of one row in this process and writes its result and figures to args.result."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
    if args.side == 'prepare':
        os.environ['JAX_PLATFORMS'] = 'cpu'
        return rows.prepare(rows.ROWS[args.row].model, args.weights)
    if args.side == 'official':
        sys.path.insert(0, str(args.official))
        import torch
        torch.set_num_threads(args.threads)
        from tests.benchmarks import official_side as side
        side.stub_missing()
    else:
        os.environ['JAX_PLATFORMS'] = 'cpu'
        from tests.benchmarks import our_side as side
    training = args.row.startswith('train')
    run = side.BUILDERS[args.row](args.weights, rows.ROWS[args.row].inputs(args.seconds))
    results, seconds = [run()], []
    first = time.perf_counter() - START
    for _ in range(rows.TRAIN_STEPS - 1 if training else args.repeats):
        start = time.perf_counter()
        results.append(run())
        seconds.append(time.perf_counter() - start)
    status = pathlib.Path('/proc/self/status').read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))
    result = np.stack(results) if training else results[-1]
    np.savez(args.result, result=result, first_s=first, median_s=statistics.median(seconds), peak_gb=1024 * peak / 1e9)


def run_side(args: argparse.Namespace, row: str, side: str, folder: pathlib.Path) -> dict[str, Any]:
    """Figures and result of one side in a process of its own."""
    path = folder / f'{row}_{side}.npz'
    command = [sys.executable, '-m', 'tests.benchmarks.against_official', '--side', side, '--row', row, '--result', str(path),
               '--weights', str(args.weights or folder), '--seconds', str(args.seconds), '--repeats', str(args.repeats),
               '--threads', str(args.threads)]
    if args.official:
        command += ['--official', str(args.official)]
    variables = {'OMP_NUM_THREADS': str(args.threads), 'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
    process = subprocess.run(command, cwd=ROOT, env=os.environ | variables,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        return {'error': lines[-1] if lines else f'exit code {process.returncode}'}
    if side == 'prepare':
        return {}
    with np.load(path) as data:
        return {name: data[name] if name == 'result' else float(data[name]) for name in data.files}


def compare(row: str, official: dict[str, Any] | None, ours: dict[str, Any]) -> dict[str, Any]:
    """The line of a row; a side that failed leaves its reason. `official` is None when only our side ran."""
    if official is None:
        ours.pop('result', None)
        return {'row': row, 'skipped': ours} if 'error' in ours else {'row': row, 'ours': ours}
    errors = {side: figures['error'] for side, figures in zip(SIDES, (official, ours)) if 'error' in figures}
    if errors:
        return {'row': row, 'skipped': errors}
    theirs, mine = official.pop('result').astype(np.float64), ours.pop('result').astype(np.float64)
    scale = np.abs(theirs) if row.startswith('train') else theirs.std()
    return {'row': row, 'official': official, 'ours': ours, 'time_ratio': ours['median_s'] / official['median_s'],
            'time_ratio_wanted': rows.ROWS[row].ratio, 'memory_ratio': ours['peak_gb'] / official['peak_gb'],
            'error': float(np.max(np.abs(mine - theirs) / scale))}


def line(figures: dict[str, Any]) -> str:
    """A row of the printed table."""
    if 'skipped' in figures:
        return f'| {figures["row"]} | skipped: {figures["skipped"]} |'
    if 'official' not in figures:
        ours = figures['ours']
        return f'| {figures["row"]} | {ours["median_s"]:.2f} | {ours["first_s"]:.1f} | {ours["peak_gb"]:.2f} |'
    official, ours = figures['official'], figures['ours']
    return (f'| {figures["row"]} | {official["median_s"]:.2f} | {ours["median_s"]:.2f} | {figures["time_ratio"]:.2f} | '
            f'{figures["time_ratio_wanted"]:.1f} | {official["first_s"]:.1f} | {ours["first_s"]:.1f} | '
            f'{official["peak_gb"]:.2f} | {ours["peak_gb"]:.2f} | {figures["memory_ratio"]:.2f} | {figures["error"]:.1e} |')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--official', type=pathlib.Path, help='checkout of the official code')
    parser.add_argument('--rows', default=','.join(rows.ROWS), help='comma separated')
    parser.add_argument('--seconds', type=float, default=8.0, help='of sound, for VAE and vocoder')
    parser.add_argument('--repeats', type=int, default=3, help='calls after the first one')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--json', type=pathlib.Path, help='file to write the figures to')
    parser.add_argument('--weights', type=pathlib.Path, help='folder that keeps the synthetic weights for the next run')
    for name in ('--side', '--row'):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument('--result', type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.side:
        return measure(args)
    if args.official:
        print('| row | official s | our s | ratio | wanted | first result s | ours | official GB | our GB | ratio | error |')
        print('|---|---|---|---|---|---|---|---|---|---|---|', flush=True)
    else:
        print('| row | our s | first result s | our GB |\n|---|---|---|---|', flush=True)
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for row in args.rows.split(','):
            prepared = run_side(args, row, 'prepare', pathlib.Path(folder))
            if prepared:
                sys.exit(f'error: the synthetic weights of {row} could not be written: {prepared["error"]}')
            official = run_side(args, row, 'official', pathlib.Path(folder)) if args.official else None
            table.append(compare(row, official, run_side(args, row, 'ours', pathlib.Path(folder))))
            print(line(table[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == '__main__':
    main()
