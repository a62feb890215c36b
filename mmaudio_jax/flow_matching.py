"""Conditional flow matching: path, target, loss and time sampling. The time direction is written here and nowhere else.

Time runs from noise at t = 0 to data at t = 1. With noise x0 ~ N(0, I), data x1 and s = min_sigma,

    path      x_t = (1 - (1 - s) t) x0 + t x1
    target    d x_t / d t = x1 - (1 - s) x0

so a sampler integrates the predicted velocity forwards, from t = 0 to t = 1. Source: MMAudio (arXiv 2412.15322), section
3.1, after Lipman et al. (arXiv 2210.02747), equations 22 and 23.
"""
import jax
import jax.numpy as jnp


def interpolate(noise: jax.Array, data: jax.Array, t: jax.Array, min_sigma: float) -> jax.Array:
    """The point x_t on the straight path.

    Args:
      noise: `[B, N, C]` x0, standard normal.
      data: `[B, N, C]` x1, normalised latents.
      t: `[B]` times in [0, 1]; 0 is noise, 1 is data.
      min_sigma: standard deviation of the noise that is left at t = 1.

    Returns:
      `[B, N, C]` (1 - (1 - min_sigma) t) noise + t data.
    """
    t = t[:, None, None]
    return (1 - (1 - min_sigma) * t) * noise + t * data


def target(noise: jax.Array, data: jax.Array, min_sigma: float) -> jax.Array:
    """The velocity d x_t / d t along the path, from noise to data; it does not depend on t.

    Args:
      noise: `[B, N, C]` x0.
      data: `[B, N, C]` x1.
      min_sigma: as in `interpolate`.

    Returns:
      `[B, N, C]` data - (1 - min_sigma) noise.
    """
    return data - (1 - min_sigma) * noise


def sample_times(key: jax.Array, batch: int) -> jax.Array:
    """`[batch]` float32 training times in (0, 1): the logistic function of a standard normal, densest at 1/2.

    Source: MMAudio section 4.1, after Esser et al. (arXiv 2403.03206), section 3.1, logit-normal sampling.
    """
    return jax.nn.sigmoid(jax.random.normal(key, (batch,), jnp.float32))


def loss(prediction: jax.Array, target_velocity: jax.Array) -> jax.Array:
    """Squared error of the velocity, averaged over tokens and channels.

    Args:
      prediction: `[B, N, C]` of any float dtype; compared in float32.
      target_velocity: `[B, N, C]`.

    Returns:
      `[B]` float32, one loss an example; the caller takes the mean.
    """
    error = prediction.astype(jnp.float32) - target_velocity.astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2))
