"""Convolutions with half the multiplications: Winograd's minimal filtering F(4, 3), for CPUs in float32.

Four neighbouring results are made of six products over the channels instead of twelve: output Y = A [(G g) ⊙ (B d)] of a tile
d of six inputs and a kernel g of three taps. Source: Lavin & Gray (arXiv 1509.09308); the matrices by the Chinese remainder
theorem at `POINTS` and infinity. Rounding is about four times that of the plain sum (tests/winograd_test.py).
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

TAPS, RESULTS = 3, 4  # results of a tile
MIN_WIDTH = 256  # channels below which the transforms cost more than they save
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # of those with small errors


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A `[4, 6]`, G `[6, 3]` and B `[6, 6]`."""
    last = lambda size: np.eye(size)[-1:]
    others = [[q for q in POINTS if q != p] for p in POINTS]
    powers = lambda size: np.array([[p**i for i in range(size)] for p in POINTS])
    outputs = np.concatenate([powers(RESULTS), last(RESULTS)]).T
    kernels = np.concatenate([powers(TAPS) / [[np.prod([p - q for q in rest])] for p, rest in zip(POINTS, others)], last(TAPS)])
    inputs = np.zeros((len(POINTS) + 1, len(POINTS) + 1))
    for row, roots in enumerate([*others, POINTS]):
        inputs[row, :len(roots) + 1] = np.poly(roots)[::-1]
    return outputs, kernels, inputs


OUTPUTS, KERNELS, INPUTS = _matrices()


def pays(kernel: jax.Array) -> bool:
    """Whether `conv` takes this kernel `[taps, I, O]`, and takes less time than the plain product on a CPU."""
    return len(kernel) in (TAPS, 2 * TAPS + 1) and min(kernel.shape[1:]) >= MIN_WIDTH


def conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution along the tokens, zero padded to the same length: `[B, N, I]`, `[3 or 7, I, O]` → `[B, N, O]`.

    Seven taps are three, one and three.
    """
    if len(kernel) == TAPS:
        return _three_taps(inputs, kernel, 0)
    before, middle, after = jnp.split(kernel, (TAPS, TAPS + 1))
    return _three_taps(inputs, before, -2) + inputs @ middle[0] + _three_taps(inputs, after, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _three_taps(inputs: jax.Array, kernel: jax.Array, offset: int) -> jax.Array:
    """Σ_t inputs[:, n + offset + t − 1] kernel[t] at place n.

    The gradient is made of products with the same transforms; of the forward pass it keeps `inputs` and `kernel` alone.
    """
    return _forward(inputs, kernel, offset)[0]


def _forward(inputs, kernel, offset):
    products = [places @ weights for places, weights in zip(_transformed(inputs, offset), _kernels(kernel, inputs))]
    results = jnp.stack([_combine(row, products) for row in OUTPUTS], axis=2)
    return results.reshape(len(inputs), -1, kernel.shape[-1])[:, :inputs.shape[1]], (inputs, kernel)


def _backward(offset, residual, gradient):
    inputs, kernel = residual
    batch, length, width = inputs.shape
    tiles = -(-length // RESULTS)
    padded = pad(gradient, 0, tiles * RESULTS).reshape(batch, tiles, RESULTS, -1)
    gradients = [_combine(column, [padded[:, :, place] for place in range(RESULTS)]) for column in OUTPUTS.T]
    of_kernels = [jnp.tensordot(part, of_results, ((0, 1), (0, 1)))
                  for part, of_results in zip(_transformed(inputs, offset), gradients)]
    products = [of_results @ weights.T for of_results, weights in zip(gradients, _kernels(kernel, gradient))]
    places = [_combine(column, products) for column in INPUTS.T]
    sums = [pad(place, 0, tiles + 1) for place in places[:RESULTS]]
    for index, place in enumerate(places[RESULTS:]):  # the first inputs of the next tile
        sums[index] += pad(place, 1, tiles + 1)
    of_inputs = pad(jnp.stack(sums, axis=2).reshape(batch, -1, width), offset - TAPS // 2, length)
    return of_inputs, jnp.stack([_combine(column, of_kernels) for column in KERNELS.T])


_three_taps.defvjp(_forward, _backward)


def _transformed(inputs: jax.Array, offset: int) -> list[jax.Array]:
    """B d of every tile: six arrays `[B, tiles, I]`."""
    batch, length, width = inputs.shape
    tiles = -(-length // RESULTS)
    padded = pad(inputs, TAPS // 2 - offset, (tiles + 1) * RESULTS).reshape(batch, tiles + 1, RESULTS, width)
    places = [padded[:, place // RESULTS:tiles + place // RESULTS, place % RESULTS] for place in range(RESULTS + TAPS - 1)]
    return [_combine(row, places) for row in INPUTS]


def pad(tokens: jax.Array, before: int, length: int) -> jax.Array:
    """`[B, N, D]` to `[B, length, D]`: `before` zeros, or that many tokens less, and zeros or fewer tokens at the end."""
    after = length - before - tokens.shape[1]
    return jax.lax.pad(tokens, jnp.zeros((), tokens.dtype), ((0, 0, 0), (before, after, 0), (0, 0, 0)))


def _kernels(kernel: jax.Array, tokens: jax.Array) -> list[jax.Array]:
    """G g: six matrices `[I, O]`, made when `tokens` `[B, N, D]` are there.

    XLA would transform the kernels of all layers at the start, and hold them; those of the backward pass wait for the gradient.
    A maximum, because what leads to a single element would be computed again beside every element of the kernel.
    """
    kernel = kernel + jnp.where(tokens[0, 0].max() == jnp.inf, np.finfo(np.float32).tiny, 0)
    return [_combine(row, kernel) for row in KERNELS]


def _combine(factors: np.ndarray, arrays: list[jax.Array] | jax.Array) -> jax.Array:
    """The sum of factor · array, without the factors that are zero."""
    first, *others = [array if factor == 1 else np.float32(factor) * array
                      for factor, array in zip(factors.tolist(), arrays) if factor]
    return sum(others, first)
