"""Convolutions of three taps with half the multiplications: Winograd's minimal filtering F(4, 3), for CPUs in float32.

Four neighbouring results are made of six products over the channels instead of twelve: output Y = A [(G g) ⊙ (B d)] of a tile
d of six inputs and a kernel g of three taps. Source: Lavin & Gray (arXiv 1509.09308); the matrices by the Chinese remainder
theorem at `POINTS` and infinity. Rounding is about four times that of the plain sum (tests/winograd_test.py).
"""
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
    return len(kernel) == TAPS and min(kernel.shape[1:]) >= MIN_WIDTH


def conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution along the tokens, zero padded to the same length: `[B, N, I]`, `[3, I, O]` → `[B, N, O]`.

    The gradient is made of the same products; of the forward pass it keeps `inputs` and `kernel` alone.
    """
    return jax.checkpoint(_conv)(inputs, kernel)


def _conv(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    batch, length, width = inputs.shape
    tiles = -(-length // RESULTS)
    margins = ((0, 0, 0), (TAPS // 2, (tiles + 1) * RESULTS - length - TAPS // 2, 0), (0, 0, 0))
    padded = jax.lax.pad(inputs, jnp.zeros((), inputs.dtype), margins).reshape(batch, tiles + 1, RESULTS, width)
    places = [padded[:, place // RESULTS:tiles + place // RESULTS, place % RESULTS] for place in range(RESULTS + TAPS - 1)]
    # XLA would transform the kernels of all layers at the start, and hold them: this one has to wait for its inputs.
    kernel = kernel + jnp.where(inputs[0, 0, 0] == jnp.inf, np.finfo(np.float32).tiny, 0)
    products = [_combine(row, places) @ _combine(weights, kernel) for row, weights in zip(INPUTS, KERNELS)]
    results = jnp.stack([_combine(row, products) for row in OUTPUTS], axis=2)
    return results.reshape(batch, tiles * RESULTS, -1)[:, :length]


def _combine(factors: np.ndarray, arrays: list[jax.Array] | jax.Array) -> jax.Array:
    """The sum of factor · array, without the factors that are zero."""
    first, *others = [array if factor == 1 else np.float32(factor) * array
                      for factor, array in zip(factors.tolist(), arrays) if factor]
    return sum(others, first)
