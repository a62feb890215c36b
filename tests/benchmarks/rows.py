"""What is compared with the official code: for each row the weights, the inputs and the ratios to reach.

Sequences are channels last, `[B, N, D]`, float32. Weights and inputs come from tests/golden/synthetic_weights.py.
"""
from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

import numpy as np

from tests.golden import synthetic_weights

LATENTS_PER_SECOND = {'16k': 31.25, '44k': 44100 / 1024}
MEL_BINS = {'16k': 80, '44k': 128}
CHANNELS = {'16k': 20, '44k': 40}
TRAIN_STEPS = 4  # the first and three more


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      model: the official model, a key of weights.files.BY_NAME and a manifest of the goldens.
      ratio: most that our seconds may be, over theirs.
      inputs: seconds of sound → arrays by name.
    """
    model: str
    ratio: float
    inputs: Callable[[float], dict[str, np.ndarray]]


def prepare(model: str, folder: pathlib.Path) -> None:
    """Writes a model's synthetic weights in their official form and our conversion, unless they are there."""
    from mmaudio_jax.weights import files
    from mmaudio_jax.weights import store
    from mmaudio_jax.weights import torch_writer
    entry = files.get(model)
    if not (folder / entry.file).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch_writer.write(folder / entry.file, synthetic_weights.state_dict(model), *entry.keys)
    store.converted(model, **places(folder))


def places(folder: pathlib.Path) -> dict[str, Any]:
    """The arguments with which weights.store finds what `prepare` made."""
    return {'folder': folder, 'cache': folder / 'cache', 'offline': True, 'verify': False}


def latent_length(rate: str, seconds: float) -> int:
    """N, the audio latents of a clip."""
    return int(np.ceil(round(LATENTS_PER_SECOND[rate] * seconds, 6)))


def _features(_: float) -> dict[str, np.ndarray]:
    shapes = {'latents': (2, 250, 20), 'clip': (2, 64, 1024), 'sync': (2, 192, 768), 'text': (2, 77, 1024)}
    return {name: synthetic_weights.example_input(name, shape) for name, shape in shapes.items()} | {
        't': np.array([0.3, 0.7], np.float32)
    }


def _frames(_: float) -> dict[str, np.ndarray]:
    """One Synchformer segment, normalised."""
    return {'frames': synthetic_weights.example_input('sync_video', (1, 16, 224, 224, 3), scale=0.5)}


def _frame(_: float) -> dict[str, np.ndarray]:
    """One CLIP frame, normalised."""
    return {'frame': synthetic_weights.example_input('clip_image', (1, 384, 384, 3))}


def _train(_: float) -> dict[str, np.ndarray]:
    """Arrays `[steps, B, …]`, one row for each step."""
    draw = lambda name, *shape: synthetic_weights.example_input(name, (TRAIN_STEPS, 2, *shape))
    return {
        'latent_mean': draw('mean', 250, 20),
        'latent_std': 0.1 * np.abs(draw('std', 250, 20)),
        'posterior_noise': draw('posterior_noise', 250, 20),
        'noise': draw('noise', 250, 20),
        'clip': draw('clip', 64, 1024),
        'sync': draw('sync', 192, 768),
        'text': draw('text', 77, 1024),
        't': 1 / (1 + np.exp(-draw('t'))),
        'drop_video': np.tile([False, True], (TRAIN_STEPS, 1)),
        'drop_text': np.tile([True, False], (TRAIN_STEPS, 1)),
    }


def _latents(rate: str) -> Callable[[float], dict[str, np.ndarray]]:
    shape = lambda seconds: (1, latent_length(rate, seconds), CHANNELS[rate])
    return lambda seconds: {'latents': synthetic_weights.example_input('z', shape(seconds))}


def _mel(rate: str) -> Callable[[float], dict[str, np.ndarray]]:
    shape = lambda seconds: (1, 2 * latent_length(rate, seconds), MEL_BINS[rate])
    return lambda seconds: {'mel': synthetic_weights.example_input('vocoder_mel', shape(seconds), scale=0.5)}


ROWS = {
    'flow': Row('mmaudio_small_16k', 0.7, _features),
    'train': Row('mmaudio_small_16k', 0.7, _train),
    'train_compiled': Row('mmaudio_small_16k', 0.7, _train),
    'vae_16k': Row('vae_16k', 0.8, _latents('16k')),
    'vae_44k': Row('vae_44k', 0.8, _latents('44k')),
    'vocoder_16k': Row('bigvgan_16k', 0.5, _mel('16k')),
    'vocoder_44k': Row('bigvgan_v2_44k', 0.2, _mel('44k')),
    'synchformer': Row('synchformer_visual', 0.8, _frames),
    'clip': Row('clip_vit_h_14_378', 0.7, _frame),
}
