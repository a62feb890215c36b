"""Imports follow the data one way, and the package needs neither PyTorch nor TensorFlow."""
import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'mmaudio_jax'
# A module may import those of its own row and of the rows above it.
ROOMS = [
    {'shorthands', 'config_checks', 'tables', 'resampling', 'frames', 'distributed', 'chips', 'hlo_cost'},
    {'sequence', 'records', 'balance', 'media', 'mux', 'plots', 'stages'},
    {'mel', 'filterbanks', 'evaluation_media', 'tokenizer', 'tokenizer_roberta'},
    {'models'},
    {'partitioning', 'hosts', 'calls'},
    {'official_codec', 'official_encoder', 'encoders', 'codec', 'weights', 'embedders', 'published_caches'},
    {'flow_matching', 'optimizer', 'ema', 'metrics', 'metrics_distribution', 'metrics_onsets_published', 'flops'},
    {'sampler', 'record_sampler', 'fingerprints', 'embeddings', 'score_inputs', 'score_metrics', 'score_tables'},
    {'train_step', 'input_pipeline', 'checkpoints', 'snapshots', 'train_log', 'train_samples', 'request',
     'pretrained', 'pipeline'},
    {'train', 'generate_jobs', 'generate', 'split_sounds', 'evaluate', 'score', 'ablations', 'exchange',
     'compile_report'},
]
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
FORBIDDEN = {'torch', 'torchvision', 'torchaudio', 'tensorflow', 'configs', 'data_pipelines'}
MODULES = sorted(PACKAGE.rglob('*.py'))


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names that `path` imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    for name in imported(path):
        parts = name.split('.')
        assert parts[0] not in FORBIDDEN, f'{path.name} imports {name}'
        if parts[0] == 'mmaudio_jax' and len(parts) > 1 and room != '__init__':
            assert parts[1] in RANK and room in RANK, f'{parts[1]} or {room} has no room in tests/imports_test.py'
            assert RANK[parts[1]] <= RANK[room], f'{room} imports {parts[1]}, which comes later on the way of the data'
        if room == 'models':
            assert parts[0] != 'mmaudio_jax' or parts[1] in ('models', 'sequence', 'mel'), f'{path.name} imports {name}'


def test_import_is_light():
    code = ('import sys, mmaudio_jax; '
            'print([m for m in ("jax", "torch", "tensorflow", "matplotlib") if m in sys.modules])')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == '[]'


def test_the_pipeline_is_imported_without_touching_a_device():
    code = ('from mmaudio_jax import Pipeline; from jax._src import xla_bridge; import sys; '
            'unwanted = [m for m in ("torch", "tensorflow", "matplotlib", "diffrax", "scipy.signal") if m in sys.modules]; '
            'print(xla_bridge.backends_are_initialized(), unwanted)')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == 'False []'


def test_processes_that_decode_start_light():
    code = ('import sys; from data_pipelines import reading; '
            'print([m for m in ("jax", "flax", "scipy.signal", "librosa", "tensorflow_datasets") if m in sys.modules])')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == '[]'
