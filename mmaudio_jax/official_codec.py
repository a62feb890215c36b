"""The audio codec of the official networks: mel VAE and BigVGAN.

Work is cut into calls of a bounded number of mel frames, so that memory does not grow with the batch or the clip. A clip longer
than one call goes through the vocoder in windows that overlap by all that it sees, so that the seams are exact.
"""
from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import calls
from mmaudio_jax import mel
from mmaudio_jax import partitioning
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import vae
from mmaudio_jax.sequence import LATENT_DOWNSAMPLING
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import files

# Mel frames of a call, over the batch. Measured on CPUs: 0.8 GB of temporaries at 44k, 0.4 GB at 16k. For accelerators: eight
# clips of 8 s at 44k, 4 GB by a TPU's compiler.
CPU_FRAMES_A_CALL, ACCELERATOR_FRAMES_A_CALL = 2048, 5632

Load = Callable[[str], Any]  # name of an official model → its parameters


class Parts:
    """Parameters on the device, or on each one of a mesh; a part is loaded when it is first used."""

    def __init__(self, load: Load, rate: str, mesh: Mesh | None = None):
        self._load, self._rate, self.mesh = load, rate, mesh

    @calls.LoadedOnce
    def encoder(self) -> Any:
        """Of the VAE, without the decoder."""
        return calls.put(_without(self._load(files.VAES[self._rate]), 'decoder'), self.mesh)

    @calls.LoadedOnce
    def decoder(self) -> Any:
        """Of the VAE, without the encoder."""
        return calls.put(_without(self._load(files.VAES[self._rate]), 'encoder'), self.mesh)

    @calls.LoadedOnce
    def vocoder(self) -> Any:
        """Of BigVGAN."""
        return calls.put(self._load(files.VOCODERS[self._rate]), self.mesh)


class OfficialCodec:
    """A codec.Codec by the official networks; made by `codec.make('official', ...)`. Float32 throughout."""

    def __init__(self, sequence: Sequence, parts: Parts, frames_a_call: int | None = None):
        """
        Args:
          sequence: rate, and the lengths of what is encoded.
          parts: parameters.
          frames_a_call: mel frames that a device takes in one call at most, over the batch; more than twice the vocoder's
            reach. None: as many as suit the default device.
        """
        suited = CPU_FRAMES_A_CALL if jax.default_backend() == 'cpu' else ACCELERATOR_FRAMES_A_CALL
        self._sequence, self._parts, self._frames_a_call = sequence, parts, frames_a_call or suited
        self._vae, self._vocoder = vae.build(sequence.rate), bigvgan.build(sequence.rate)

    def encode(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See codec.Codec; raises ValueError when the waveform is not `[B, waveform_length]`."""
        check_waveform(waveform, self._sequence)
        run = functools.partial(latent_distribution, self._vae, self._parts.encoder, self._sequence.rate)
        return self._in_calls(run, np.asarray(waveform, np.float32), self._sequence.mel_length)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """See codec.Codec."""
        return self.vocode(self.decode_to_mel(latents))

    def program(self) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
        """See codec.Codec."""
        decode = functools.partial(waveforms, self._vae, self._vocoder, self._frames_a_call)
        return {'vae': self._parts.decoder, 'vocoder': self._parts.vocoder}, decode

    def decode_to_mel(self, latents: np.ndarray) -> np.ndarray:
        """`[B, N, C]`, any N → log-mel, float32 `[B, 2N, mels]`."""
        run = functools.partial(_decode, self._vae, self._parts.decoder)
        latents = np.asarray(latents, np.float32)
        return self._in_calls(run, latents, LATENT_DOWNSAMPLING * latents.shape[1])

    def vocode(self, log_mel: np.ndarray) -> np.ndarray:
        """Log-mel `[B, frames, mels]` → waveform, float32 `[B, frames · hop]` within ±1."""
        run = functools.partial(_vocode, self._vocoder, self._frames_a_call, self._parts.vocoder)
        return self._in_calls(run, log_mel, log_mel.shape[1])

    def _in_calls(self, run: Callable[[Any], Any], clips: np.ndarray, frames: int) -> Any:
        """run(clips), of so many mel frames each; a small batch is one small call."""
        mesh = self._parts.mesh
        each = -(-len(clips) // (1 if mesh is None else partitioning.batch_shards(mesh)))
        return calls.in_calls(run, clips, min(each, max(1, self._frames_a_call // frames)), mesh)


def check_waveform(waveform: np.ndarray, sequence: Sequence) -> None:
    """Raises ValueError when the waveform is not `[B, waveform_length]` of the sequence."""
    if np.ndim(waveform) != 2 or waveform.shape[1] != sequence.waveform_length:
        raise ValueError(f'the codec takes waveforms [B, {sequence.waveform_length}] at {sequence.rate} and '
                         f'{sequence.duration_s:g} s, not {list(np.shape(waveform))}')


def windows(frames: int, size: int, reach: int) -> list[tuple[int, int, int]]:
    """Windows of `size` frames over more than that: (its start, first and end of the frames that are exact in it and taken).

    A frame is exact where it is `reach` away from the window's ends, or the end is that of the clip.
    """
    cuts, first = [], 0
    while first < frames:
        start = max(0, min(first - reach, frames - size))
        last = frames if start + size == frames else start + size - reach
        cuts.append((start, first, last))
        first = last
    return cuts


def waveforms(decoder: vae.VAE, vocoder: bigvgan.BigVGAN, frames_a_call: int, parameters: Any, latents: jax.Array) -> jax.Array:
    """Latents `[B, N, C]` → `[B, samples]`, to be traced; in calls of `frames_a_call` mel frames."""
    def call(some):
        return _vocode(vocoder, frames_a_call, parameters['vocoder'], _decode(decoder, parameters['vae'], some))
    clips, length, _ = latents.shape
    calls_needed = -(-clips // max(1, frames_a_call // (LATENT_DOWNSAMPLING * length)))
    size = -(-clips // calls_needed)  # as many clips in every call
    if size >= clips:
        return call(latents)
    filled = jnp.pad(latents, ((0, -clips % size), (0, 0), (0, 0)))
    made = lax.map(call, filled.reshape(-1, size, *latents.shape[1:]))
    return made.reshape(-1, made.shape[-1])[:clips]


@functools.partial(jax.jit, static_argnames=('model', 'rate'))
def latent_distribution(model: vae.VAE, params: Any, rate: str, waveform: jax.Array) -> Any:
    """Waveforms `[B, samples]` → mean and standard deviation, `[B, N, C]` each, by log-mel and the VAE's encoder."""
    with jax.default_matmul_precision('highest'):  # else TPUs round float32 operands to bfloat16, GPUs to TF32
        return model.apply({'params': params}, mel.log_mel(waveform, rate), method='encode')


@functools.partial(jax.jit, static_argnames='model')
def _decode(model: vae.VAE, params: Any, latents: jax.Array) -> Any:
    return model.apply({'params': params}, latents, method='decode')


@functools.partial(jax.jit, static_argnames=('model', 'frames_a_call'))
def _vocode(model: bigvgan.BigVGAN, frames_a_call: int, params: Any, log_mel: jax.Array) -> jax.Array:
    """Longer clips in windows, one after the other."""
    frames = log_mel.shape[1]
    vocode: Any = functools.partial(model.apply, {'params': params})
    if frames <= frames_a_call:
        return vocode(log_mel)
    cuts = windows(frames, frames_a_call, model.reach)
    pieces = lax.map(lambda start: vocode(lax.dynamic_slice_in_dim(log_mel, start, frames_a_call, axis=1)),
                     jnp.array([start for start, _, _ in cuts]))
    hop = pieces.shape[-1] // frames_a_call
    exact = [piece[:, (first - start) * hop:(last - start) * hop] for piece, (start, first, last) in zip(pieces, cuts)]
    return jnp.concatenate(exact, axis=1)


def _without(params: Any, part: str) -> Any:
    return {name: leaf for name, leaf in params.items() if name != part}
