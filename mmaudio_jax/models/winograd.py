"""Convolutions of three taps with half the multiplications: Winograd's minimal filtering F(4, 3), for CPUs in float32.

Four neighbouring results are made of six products over the channels instead of twelve: output Y = A [(G g) ⊙ (B d)] of a tile
d of six inputs and a kernel g of three taps. Source: Lavin & Gray (arXiv 1509.09308); the matrices by the Chinese remainder
theorem at `POINTS` and infinity. Rounding is about four times that of the plain sum (tests/winograd_test.py).
"""
import jax
import jax.numpy as jnp
import numpy as np

TAPS, RESULTS = 3, 4  # results of a tile
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


def conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution along the tokens, zero padded to the same length: `[B, N, I]`, `[taps, I, O]`, odd taps → `[B, N, O]`.

    More than three taps are taken in threes, whose products are summed before they are transformed back. The gradient is
    made of the same products; of the forward pass it keeps `inputs` and `kernel` alone.
    """
    return jax.checkpoint(_conv)(inputs, kernel)


def _conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, length, width = inputs.shape
    before, groups, tiles = len(kernel) // 2, -(-len(kernel) // TAPS), -(-length // RESULTS)
    last = TAPS * groups - 1 + RESULTS - 1  # place of the last input that a tile's results read
    rows = tiles + last // RESULTS
    margins = ((0, 0, 0), (before, rows * RESULTS - length - before, 0), (0, 0, 0))
    padded = jax.lax.pad(inputs, jnp.zeros((), inputs.dtype), margins).reshape(batch, rows, RESULTS, width)
    places = [padded[:, place // RESULTS:tiles + place // RESULTS, place % RESULTS] for place in range(last + 1)]
    threes = jnp.pad(kernel, ((0, TAPS * groups - len(kernel)), (0, 0), (0, 0)))
    starts = range(0, TAPS * groups, TAPS)
    products = []
    for row, weights in zip(INPUTS, KERNELS):
        tokens = jnp.concatenate([_combine(row, places[start:start + len(row)]) for start in starts], axis=-1)
        products.append(tokens @ jnp.concatenate([_combine(weights, threes[start:start + TAPS]) for start in starts]))
    results = jnp.stack([_combine(row, products) for row in OUTPUTS], axis=2)
    return results.reshape(batch, tiles * RESULTS, -1)[:, :length]


def _combine(factors: np.ndarray, arrays: list[jax.Array] | jax.Array) -> jax.Array:
    """The sum of factor · array, without the factors that are zero."""
    first, *others = [array if factor == 1 else np.float32(factor) * array
                      for factor, array in zip(factors.tolist(), arrays) if factor]
    return sum(others, first)
