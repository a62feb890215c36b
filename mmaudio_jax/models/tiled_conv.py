"""Convolutions along time in tiles of a short Fourier transform: a CPU then multiplies a third to a fifth as often.

A tile of `size` steps gives size - taps + 1 results. Between the transforms a convolution is one product over the channels
for each frequency: real at the first and the last, complex between, which is three real products (Gauss's).
Source: overlap-save, Stockham 1966, High-speed convolution and correlation; in networks Mathieu et al., arXiv 1312.5851.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np


def conv(x: jax.Array, kernel: jax.Array, dilation: int, size: int) -> jax.Array:
    """Zero-padded convolution of the same length: x `[B, T, D]`, kernel `[taps, D, O]`, odd taps → `[B, T, O]`, float32.

    Steps `dilation` apart stand one below the other, `[rows, dilation · D]`; tiles are taken of the rows.
    """
    (batch, length, channels), (taps, _, out) = x.shape, kernel.shape
    from_steps, from_taps, to_steps = transforms(taps, size)
    step = size - taps + 1
    tiles = -(-length // (dilation * step))
    before = dilation * (taps // 2)
    after = (tiles + 1) * step * dilation - before - length
    rows = jnp.pad(x, ((0, 0), (before, after), (0, 0))).reshape(batch, tiles + 1, step, dilation * channels)
    overlapping = jnp.concatenate([rows[:, :-1], rows[:, 1:, :taps - 1]], axis=2)  # [B, tiles, size, dilation · D]
    spectra = jnp.einsum('PN,BTNC->PBTC', from_steps, overlapping).reshape(len(from_steps), -1, channels)
    products = jnp.einsum('PXC,PCO->PXO', spectra, jnp.einsum('PK,KCO->PCO', from_taps, kernel))
    products = products.reshape(len(from_steps), batch, tiles, dilation * out)
    return jnp.einsum('NP,PBTO->BTNO', to_steps, products).reshape(batch, -1, out)[:, :length]


@functools.cache
def transforms(taps: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices F `[P, size]`, G `[P, taps]`, H `[size - taps + 1, P]`, float32: H ((F x) (G k)) is the correlation of x and k.

    For a tile of an even size with spectrum a + ib and a kernel with c + id, the spectrum of the correlation is
    (a + ib)(c - id) = (p - r) + i (p + q) with p = (a + b) c, q = -a (c + d), r = b (c - d).
    """
    steps = np.arange(size)
    from_steps, from_taps, to_steps = [], [], []
    for frequency in range(size // 2 + 1):
        angles = 2 * np.pi * frequency * steps / size
        real, imaginary = np.cos(angles), -np.sin(angles)
        c, d = real[:taps], imaginary[:taps]
        if frequency in (0, size // 2):
            from_steps += [real]
            from_taps += [c]
            to_steps += [real / size]
        else:
            from_steps += [real + imaginary, real, imaginary]
            from_taps += [c, -(c + d), c - d]
            to_steps += [2 / size * (real + imaginary), 2 / size * imaginary, -2 / size * real]
    to_results = np.array(to_steps, np.float32).T[:size - taps + 1]
    return np.array(from_steps, np.float32), np.array(from_taps, np.float32), to_results
