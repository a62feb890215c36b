"""Stand-ins for the evaluation networks that take milliseconds, on real files and through the real loading of weights."""
import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import soundfile

from configs import base
from mmaudio_jax import embedders
from mmaudio_jax.weights import tensor_file

RATE = 16_000
CLIPS = 12


def _energies(waveforms, parts):
    rows = jnp.abs(waveforms.reshape(len(waveforms), -1))
    rows = rows[:, :rows.shape[1] // parts * parts].reshape(len(rows), parts, -1).mean(axis=-1)
    return jnp.log(rows + 1e-3)


def _build(tensors):
    def apply(params, inputs):
        energies = _energies(inputs.astype(jnp.float32), 8) * params['scale']
        tiles = energies[:, None, None] * jnp.ones((14, 2, 1))
        return {'features': energies, 'logits': 3 * energies[:, :5], 'vector': energies, 'segments': tiles,
                'patches': energies.reshape(len(energies), 2, 4)}
    return {'scale': np.array(tensors['scale'])}, apply


def use(monkeypatch) -> None:
    """Puts stand-ins for all networks in their places."""
    original = embedders.embedders
    monkeypatch.setattr(embedders, 'embedders', lambda folder: {
        name: dataclasses.replace(embedder, file='tiny.safetensors', build=_build, keys=())
        for name, embedder in original(folder).items()})
    monkeypatch.setattr(embedders, 'offset_head', lambda folder: lambda picture, sound: np.round(
        sound[:, [0, -1], 0, 0] - picture[:, [0, -1], 0, 0], 1).astype(np.float64))


def write_weights(folder: pathlib.Path, scale: float = 1.0) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensor_file.write_safetensors(folder / 'tiny.safetensors', [('scale', np.float32([scale]))], {})
    return folder


def write_sounds(folder: pathlib.Path, noise: float, clips: int = CLIPS, seconds: float = 1.2) -> pathlib.Path:
    """Bursts whose places depend on the clip, with that much noise; the first at a third of the clip's number in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(int(1e3 * noise))
    for index in range(clips):
        shape = np.random.default_rng(index)
        waveform = 0.02 * shape.normal(size=round(RATE * seconds))
        for start in shape.uniform(0.1, seconds - 0.3, 3):
            waveform[int(start * RATE):][:2000] += np.exp(-np.arange(2000) / 500) * shape.normal(size=2000) * 0.3
        waveform += noise * random.normal(size=len(waveform))
        soundfile.write(folder / f'clip_{index:02}.wav', waveform.clip(-1, 1), RATE)
    return folder


def make_config(tmp_path: pathlib.Path):
    config = base.get_config()
    config.score.update(weights=str(write_weights(tmp_path / 'weights')), references=str(tmp_path / 'reference'),
                        metrics=('fd_passt', 'fd_panns', 'fd_vgg', 'kl_panns', 'kl_passt', 'is_panns'), sheets=1)
    return config
