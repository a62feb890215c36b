"""The numbers of evaluation.json: what the public modules compute, their input signal and their stand-in weights."""
from collections.abc import Mapping
import json
import math
import pathlib
import zlib

import librosa
import numpy as np

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'evaluation.json').read_text())
_TOKENS = ('cls_token', 'dist_token', 'distillation_token', 'OFF_tok', 'MOD_tok', 'pos_emb', 'pos_embed', 'temp_embed',
           'position_embeddings', 'bias_k', 'bias_v', 'relative_position_bias_table')


class Filled:
    """One stand-in tensor, made anew whenever it is read, so that a large network is never in memory twice."""

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.name, self.shape = name, shape

    def __array__(self, dtype=None, copy=None):
        random = np.random.RandomState(zlib.crc32(self.name.encode()))
        z = random.standard_normal(math.prod(self.shape)).reshape(self.shape)
        if self.name.endswith('running_var'):
            z = 1 + 0.1 * np.abs(z)
        elif any(token in self.name for token in _TOKENS):
            z = 0.5 * z
        elif z.ndim >= 2:
            z = z / math.sqrt(z.size / self.shape[0])
        elif self.name.endswith('.weight'):
            z = 1 + 0.1 * z
        else:
            z = 0.1 * z
        return np.asarray(z, dtype or np.float32)


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Stand-in tensors of those names and shapes."""
    return {name: Filled(name, shape) for name, shape in shapes.items()}


def panns_filters() -> np.ndarray:
    """The mel filters (Slaney's) that the checkpoint of PANNs is expected to hold, float32 [257, 64]."""
    return librosa.filters.mel(sr=16_000, n_fft=512, n_mels=64, fmin=50.0, fmax=8_000.0).T


def clap_filters() -> np.ndarray:
    """The mel filters (Slaney's) that the checkpoint of LAION-CLAP is expected to hold, float32 [513, 64]."""
    return librosa.filters.mel(sr=48_000, n_fft=1024, n_mels=64, fmin=50.0, fmax=14_000.0).T


def signal(sample_rate_hz: int, seconds: float = 8.0) -> np.ndarray:
    """The test signal, float32 [samples]."""
    t = np.arange(round(sample_rate_hz * seconds)) / sample_rate_hz
    wave = 0.4 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * (500 + 300 * t) * t)
    return (wave + 0.05 * np.sin(2 * np.pi * 6000 * t) * np.exp(-3 * (t % 1))).astype(np.float32)


def entry(group: str, start: str):
    """The golden of `group` whose name begins with `start`."""
    [found] = [value for name, value in GOLDEN[group].items() if name.startswith(start)]
    return found


def error(golden: dict, values) -> float:
    """The largest absolute difference between `values` and every number of `golden`; shapes must be equal."""
    values = np.asarray(values, np.float64)
    assert list(values.shape) == golden['shape'], (values.shape, golden['shape'])
    flat = values.ravel()
    found = {'mean': flat.mean(), 'std': flat.std(), 'min': flat.min(), 'max': flat.max(), 'first8': flat[:8],
             'last4': flat[-4:], 'l2': np.sqrt(np.square(flat).sum())}
    errors = [np.abs(np.subtract(found[key], golden[key])).max() for key in found if key in golden]
    errors += [abs(values[tuple(json.loads(place))] - value) for place, value in golden.get('at', {}).items()]
    assert len(errors) >= 4
    return max(errors)
