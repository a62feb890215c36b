"""The official codec's calls and windows; the networks themselves are tested by vae_test and bigvgan_test."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import codec
from mmaudio_jax import mel
from mmaudio_jax import official_codec
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import vae
from mmaudio_jax.sequence import Sequence


class VAE(NamedTuple):
    """Keeps the first channels of every second frame."""
    channels: int
    mels: int

    def apply(self, variables, x, method):
        gain = variables['params']['gain']
        if method == 'encode':
            return gain * x[:, ::2, :self.channels], jnp.exp(x[:, ::2, :self.channels])
        return gain * jnp.pad(jnp.repeat(x, 2, axis=1), ((0, 0), (0, 0), (0, self.mels - self.channels)))


class Vocoder(NamedTuple):
    """Repeats the first channel."""
    hop: int

    def apply(self, variables, x):
        return variables['params']['gain'] * jnp.repeat(x[..., 0], self.hop, axis=1)


@pytest.mark.parametrize('rate', ['16k', '44k'])
def test_it_is_mel_vae_and_vocoder(rate, monkeypatch):
    sequence, asked = Sequence(rate, 2.0), []
    monkeypatch.setattr(vae, 'build', lambda rate: VAE(sequence.latent_channels, sequence.audio.mel_bins))
    monkeypatch.setattr(bigvgan, 'build', lambda rate: Vocoder(sequence.audio.hop_length))

    def load(name):
        asked.append(name)
        part = {'gain': np.float32({'vae': 2, 'big': 3}[name[:3]])}
        return {**part, 'encoder': np.zeros(1), 'decoder': np.zeros(1)} if name.startswith('vae') else part

    made = codec.make('official', sequence, None, load)
    assert not asked  # nothing is loaded before it is used
    generator = np.random.default_rng(1)
    waveform = generator.normal(size=(7, sequence.waveform_length)).astype(np.float32)
    mean, std = made.encode(waveform)
    frames = np.asarray(mel.log_mel(waveform, rate))[:, ::2, :sequence.latent_channels]
    np.testing.assert_allclose(mean, 2 * frames, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(std, np.exp(frames), rtol=1e-5)
    latents = generator.normal(size=(7, 600, sequence.latent_channels)).astype(np.float32)  # one clip a call
    expected = np.repeat(np.repeat(6 * latents[..., 0], 2, axis=1), sequence.audio.hop_length, axis=1)
    np.testing.assert_allclose(made.decode(latents), expected, rtol=1e-6)
    np.testing.assert_allclose(made.decode(latents[:5, :300]), expected[:5, :expected.shape[1] // 2], rtol=1e-6)  # calls of 3
    parameters, decode = made.program()
    loops = []
    for clips, length in ((7, 600), (5, 300), (2, 300)):  # seven calls of one, two of three, one of two
        part = latents[:clips, :length]
        traced = jax.jit(decode).lower(parameters, part)
        loops.append('stablehlo.while' in traced.as_text())
        np.testing.assert_allclose(traced.compile()(parameters, part), made.decode(part), rtol=1e-6)
    assert loops == [True, True, False]
    codec.make('official', Sequence(rate, 1.0), None, load).decode(latents[:1])
    names = {'16k': ['vae_16k', 'vae_16k', 'bigvgan_16k'], '44k': ['vae_44k', 'vae_44k', 'bigvgan_v2_44k']}
    assert asked == names[rate]  # the VAE's encoder, its decoder, the vocoder: once each, whatever the length of the clips


def test_windows_are_exact(monkeypatch):
    """A vocoder of one stage with random weights: whole, in windows, and in a window that is cut too near."""
    monkeypatch.setitem(bigvgan.VARIANTS, '16k', {**bigvgan.VARIANTS['16k'], 'width': 8, 'rates': (16,)})
    network, sequence = bigvgan.build('16k'), Sequence('16k', 2.0)
    monkeypatch.setitem(sequence.audio.__dict__, 'hop_length', 16)
    params = _random_params(network, jnp.zeros((1, 16, 80)))
    whole, windowed = (official_codec.OfficialCodec(sequence, official_codec.Parts(lambda name: params, '16k'), size)
                       for size in (1_000, 40))
    log_mel = np.random.default_rng(3).normal(size=(2, 97, 80)).astype(np.float32)
    expected = whole.vocode(log_mel)
    error = np.abs(windowed.vocode(log_mel) - expected).max() / np.std(expected)
    assert error < 1e-6  # measured 0.0
    start, first, _ = official_codec.windows(97, 40, network.reach)[1]
    alone = whole.vocode(log_mel[:, start:start + 40])
    error = np.abs(alone - expected[:, start * 16:(start + 40) * 16]).reshape(2, 40, 16).max(axis=(0, 2)) / np.std(expected)
    assert first - start == network.reach and error[network.reach] < 1e-6
    assert error[network.reach - 4] > 1e-6  # a few frames nearer to its end a window is wrong: the reach is not too wide


def _random_params(network, example):
    """Weights that keep the scale of the signal, so that everything within reach is seen."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)['params']
    generator = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == 'kernel':
            return np.float32(generator.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[-3:-1])))
        return np.full(leaf.shape, {'up': 1 / 12, 'down': 1 / 12, 'bias': 0.0}.get(path[-1].key, 1.0), np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.parametrize('frames,size,reach', [(101, 50, 10), (1000, 64, 24), (65, 64, 24), (128, 64, 31)])
def test_windows_cover_everything_once(frames, size, reach):
    cuts = official_codec.windows(frames, size, reach)
    assert [first for _, first, _ in cuts] == [0] + [last for _, _, last in cuts[:-1]] and cuts[-1][2] == frames
    for start, first, last in cuts:
        assert 0 <= start and start + size <= frames and first < last
        assert (start == 0 or first - start >= reach) and (last == frames or start + size - last >= reach)


def test_reach_of_the_official_vocoders():
    """3 + sum over the stages of 1.5 / (steps a frame before) + 96 / (steps after) + 9 / (steps at the end) frames."""
    assert bigvgan.build('16k').reach == 41 and bigvgan.build('44k').reach == 23


def test_mistakes():
    made = codec.make('official', Sequence('16k', 2.0), None, lambda name: {})
    with pytest.raises(ValueError, match=r'takes waveforms \[B, 32256\] at 16k and 2 s, not \[1, 32000\]'):
        made.encode(np.zeros((1, 32_000), np.float32))
