"""What it costs to begin: importing the package and the Pipeline, converting an official file, loading the conversion.

    python -m tests.benchmarks.importing [--models=mmaudio_small_16k,vae_16k] [--repeats=3]

Each figure is the least of some fresh processes; memory is the largest resident set beyond what the process had when everything
was imported, over the size of the official file. The files hold synthetic weights in the official form and stand in a temporary
folder. Prints one line of JSON a row.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from mmaudio_jax.weights import files
from tests.benchmarks import rows

ROOT = pathlib.Path(__file__).parents[2]
IMPORT = 'import json, time; start = time.monotonic(); {}; print(json.dumps([time.monotonic() - start, 0]))'
LOAD = '''
import json, re, sys, time
from mmaudio_jax.weights import store
def peak():
    return 1024 * int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])
before, start = peak(), time.monotonic()
store.converted(sys.argv[1], folder=sys.argv[2], cache=sys.argv[3], offline=True, verify=False)
params = store.load(sys.argv[1], folder=sys.argv[2], cache=sys.argv[3], offline=True, verify=False)
print(json.dumps([time.monotonic() - start, peak() - before]))
'''


def measure(code: str, *arguments: object) -> tuple[float, int]:
    """Seconds and bytes that `code` prints, run in a process of its own."""
    printed = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                             check=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}).stdout
    seconds, used = json.loads(printed)
    return seconds, used


def of_model(model: str, folder: pathlib.Path, repeats: int) -> dict[str, object]:
    """Conversion (into an empty cache every time) and loading of one official model."""
    rows.prepare(model, folder)
    size = (folder / files.get(model).file).stat().st_size
    converted = [measure(LOAD, model, folder, folder / f'cache_{model}_{number}') for number in range(repeats)]
    loaded = [measure(LOAD, model, folder, folder / f'cache_{model}_0') for _ in range(repeats)]
    return {'model': model, 'mb': round(size / 1e6), 'convert_s': round(min(converted)[0], 2),
            'convert_memory': round(max(used for _, used in converted) / size, 2), 'load_s': round(min(loaded)[0], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', default='mmaudio_small_16k,vae_16k')
    parser.add_argument('--repeats', type=int, default=3)
    options = parser.parse_args()
    for what in ('import mmaudio_jax', 'from mmaudio_jax import Pipeline'):
        seconds = min(measure(IMPORT.format(what))[0] for _ in range(options.repeats))
        print(json.dumps({'what': what, 'seconds': round(seconds, 3)}), flush=True)
    with tempfile.TemporaryDirectory() as name:
        for model in filter(None, options.models.split(',')):
            print(json.dumps(of_model(model, pathlib.Path(name), options.repeats)), flush=True)


if __name__ == '__main__':
    main()
