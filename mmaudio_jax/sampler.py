"""Noise → audio latents: the flow's ODE from t = 0 (noise) to t = 1 (data), under classifier-free guidance.

Letters: B batch, N audio latents, V CLIP frames, S sync tokens, T text tokens, C latent channels.
Source: MMAudio (arXiv 2412.15322), sections 3.1 and 4; Euler with 25 steps and strength 4.5 is the paper's sampler.
"""
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import partitioning
from mmaudio_jax.models.mmaudio import MMAudio

EVALUATIONS = {'euler': 1, 'midpoint': 2, 'heun': 2}  # of the velocity, a step
SOLVERS = (*EVALUATIONS, 'dopri5')
SCHEDULES = ('uniform', 'cosine', 'quadratic')
DOPRI5_TOLERANCE = 1e-4  # absolute and relative; normalised latents have unit deviation
DOPRI5_MAX_STEPS = 4096
DOPRI5_LEAST_STEP = 1e-6  # a step that is tried after one that failed; float32 tells no shorter ones apart near t = 1

Velocity = Callable[[jax.Array, jax.Array], jax.Array]  # (latents [B, N, C], t, a scalar) -> [B, N, C]
Decode = Callable[[Any, jax.Array], jax.Array]  # (a codec's parameters, latents [B, N, C]) -> waveforms [B, samples]


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """How latents are sampled: the fields of config.sampling that concern the solver.

    Attributes:
      solver: 'euler' (one evaluation of the velocity a step), 'midpoint' or 'heun' (two) over the steps of the schedule, or
        'dopri5', adaptive for each example.
      num_steps: steps; for 'dopri5' its reciprocal is the first step tried.
      guidance: w of w · v(conditioned) + (1 − w) · v(empty); 1 or less takes the conditioned velocity alone.
      schedule: where the steps are, see `edges`; 'dopri5' finds its own.

    Raises:
      ValueError: an unknown solver or schedule, no whole number of steps, or a guidance that is no number.
    """
    solver: str
    num_steps: int
    guidance: float
    schedule: str = 'uniform'

    @classmethod
    def of(cls, sampling) -> 'SamplerSettings':
        """Those of config.sampling."""
        return cls(sampling.solver, sampling.num_steps, sampling.guidance, sampling.schedule)

    def __post_init__(self):
        if self.solver not in SOLVERS:
            raise ValueError(f'config.sampling.solver {self.solver!r} is not one of {", ".join(SOLVERS)}')
        if self.schedule not in SCHEDULES:
            raise ValueError(f'config.sampling.schedule {self.schedule!r} is not one of {", ".join(SCHEDULES)}')
        if self.solver == 'dopri5' and self.schedule != 'uniform':
            raise ValueError(f"config.sampling.schedule is {self.schedule!r}, but 'dopri5' chooses its steps itself; set "
                             "'uniform'")
        if not isinstance(self.num_steps, (int, np.integer)) or self.num_steps < 1:
            raise ValueError(f'config.sampling.num_steps is {self.num_steps!r}; it must be a whole number of at least 1')
        if not isinstance(self.guidance, (int, float, np.number)) or not np.isfinite(self.guidance):
            raise ValueError(f'config.sampling.guidance is {self.guidance!r}; it must be a number')


def noise(seed: int, indices: Sequence[int], latent_length: int, latent_channels: int) -> jax.Array:
    """Standard normal latents `[B, N, C]` float32, a function of (`seed`, index) alone: not of the batch around it."""
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(jnp.asarray(indices, jnp.uint32))
    return jax.vmap(lambda key: jax.random.normal(key, (latent_length, latent_channels)))(keys)


def guide(conditioned: jax.Array, empty: jax.Array, guidance: float) -> jax.Array:
    """Classifier-free guidance: w · `conditioned` + (1 − w) · `empty`."""
    return guidance * conditioned + (1 - guidance) * empty


def edges(schedule: str, num_steps: int) -> np.ndarray:
    """The times between steps, from 0 to 1, float32 `[num_steps + 1]`; with s equally spaced in [0, 1]:

    uniform s, cosine (1 − cos πs) / 2 (short steps at both ends), quadratic s² (short steps at the noise).
    """
    s = np.linspace(0, 1, num_steps + 1)
    if schedule == 'uniform':
        # As PyTorch counts, from both ends in float32 steps: large_44k_v2 multiplies times by 10 000, where the other rounding
        # of 4 of the 25 times changes the velocity by a thousandth of its deviation.
        places, step = np.arange(num_steps + 1), np.float64(np.float32(1) / np.float32(num_steps))
        s = np.where(places < (num_steps + 1) // 2, step * places, 1 - step * (num_steps - places))
    return {'uniform': s, 'cosine': (1 - np.cos(np.pi * s)) / 2, 'quadratic': s**2}[schedule].astype(np.float32)


def integrate(velocity: Velocity, initial: jax.Array, settings: SamplerSettings) -> jax.Array:
    """Solves dx/dt = velocity(x, t) from x(0) = `initial` to x(1) over the steps of the schedule, as one scan.

    Euler: x ← x + h v(x, t). Midpoint: x ← x + h v(x + h/2 v(x, t), t + h/2).
    Heun: x ← x + h/2 (v(x, t) + v(x + h v(x, t), t + h)). `initial` and the result are float32 `[B, N, C]`.
    """
    times = edges(settings.schedule, settings.num_steps)

    def euler(x, step):
        start, size = step
        return x + size * velocity(x, start), None

    def midpoint(x, step):
        start, size = step
        middle = x + size / 2 * velocity(x, start)
        return x + size * velocity(middle, start + size / 2), None

    def heun(x, step):
        start, size = step
        first = velocity(x, start)
        return x + size / 2 * (first + velocity(x + size * first, start + size)), None

    body = {'euler': euler, 'midpoint': midpoint, 'heun': heun}[settings.solver]
    return jax.lax.scan(body, initial, (times[:-1], np.diff(times)))[0]


def integrate_adaptive(velocity: Velocity, initial: jax.Array, settings: SamplerSettings) -> jax.Array:
    """The same by Dormand and Prince's 5(4) pair (1980) with step sizes from the error estimate, one for the whole batch.

    The result is NaN when there is no end after DOPRI5_MAX_STEPS steps, or the velocity is not finite: a compiled program
    cannot raise what a caller could read.
    """
    import diffrax  # here: it takes a second, and the other solvers do not need it

    class Controller(diffrax.PIDController):
        """Ends when steps fail down to the least one, where diffrax goes on trying ever shorter ones: NaN fails them all."""

        def adapt_step_size(self, *arguments):
            keep, start, end, *others, result = super().adapt_step_size(*arguments)
            stuck = ~keep & ~(end - start >= DOPRI5_LEAST_STEP)
            return keep, start, end, *others, diffrax.RESULTS.where(stuck, diffrax.RESULTS.dt_min_reached, result)

    solution = diffrax.diffeqsolve(diffrax.ODETerm(lambda t, x, _: velocity(x, jnp.asarray(t, jnp.float32))),
                                   diffrax.Dopri5(), t0=0.0, t1=1.0, dt0=1.0 / settings.num_steps, y0=initial,
                                   stepsize_controller=Controller(rtol=DOPRI5_TOLERANCE, atol=DOPRI5_TOLERANCE),
                                   max_steps=DOPRI5_MAX_STEPS, throw=False)
    return jnp.where(solution.result == diffrax.RESULTS.successful, solution.ys[0], jnp.nan)


def make_sampler(model: MMAudio | partitioning.OnMesh, settings: SamplerSettings, mesh: Mesh | None = None,
                 decode: Decode | None = None) -> Callable[..., Any]:
    """The jitted sampler: fn(params, noise, clip, sync, text, negative_text) → un-normalised latents `[B, N, C]` float32.

    Its arguments: noise `[B, N, C]` (see `noise`), clip `[B, V, 1024]`, sync `[B, S, 768]`, text `[B, T, 1024]`, and
    negative_text `[B, T, 1024]`, or None for the empty string. Conditions are computed once; each evaluation of the guided
    velocity is one call of the network on 2 B examples. With `decode` a last argument are the codec's parameters, and one
    program gives (latents, waveforms `[B, samples]`).

    Args:
      model: the network; over a mesh that splits parameters, partitioning.OnMesh of it.
      settings: solver, steps and guidance.
      mesh: splits the batch by partitioning.batch_sharding; the parameters keep the sharding that they have. None: the
        default device.
      decode: the codec's, see codec.Codec.program; its parameters must be whole on every device of the mesh.
    """
    guided = settings.guidance > 1
    model = model.clone(scan_layers=True)  # compiles sooner, and costs little without a backward pass

    def conditions_of(params, latent_length, clip, sync, text, negative_text):
        features = (clip, sync, text)
        if guided:
            lengths = (clip.shape[0], clip.shape[1], sync.shape[1])
            empty = model.apply({'params': params}, *lengths, method='empty_features')
            if negative_text is not None:
                empty = (*empty[:2], negative_text)
            # Both versions of an example side by side: on a mesh they stay on its device.
            features = jax.tree.map(lambda a, b: _flat(jnp.stack([a, b], axis=1)), features, empty)
        return model.apply({'params': params}, *features, latent_length, method='preprocess_conditions')

    def velocity_of(params, conditions):

        def velocity(latents, t):
            if not guided:
                return model.apply({'params': params}, latents, jnp.full(latents.shape[0], t), conditions, method='velocity')
            twice = _flat(jnp.stack([latents, latents], axis=1))
            flat: Any = model.apply({'params': params}, twice, jnp.full(twice.shape[0], t), conditions, method='velocity')
            conditioned, empty = jnp.moveaxis(flat.reshape(-1, 2, *twice.shape[1:]), 1, 0)
            return guide(conditioned, empty, settings.guidance)

        return velocity

    def sample(params, initial, clip, sync, text, negative_text, codec=None):
        conditions = conditions_of(params, initial.shape[1], clip, sync, text, negative_text)
        if settings.solver == 'dopri5':  # vmap gives each example its own step sizes
            copies = 2 if guided else 1
            split = jax.tree.map(lambda c: c.reshape(-1, copies, *c.shape[1:]), conditions)
            latents = jax.vmap(lambda x, c: integrate_adaptive(velocity_of(params, c), x[None], settings)[0])(initial, split)
        else:
            latents = integrate(velocity_of(params, conditions), initial, settings)
        result: Any = model.apply({'params': params}, latents, method='unnormalize')
        if decode is None:
            return result
        return result, (decode if mesh is None else partitioning.on_parts(decode, mesh))(codec, result)

    if mesh is None:
        return jax.jit(sample)
    batch = partitioning.batch_sharding(mesh)
    placed = jax.jit(sample, in_shardings=(None, *[batch] * 5, None), out_shardings=batch)
    return _checked(placed, partitioning.batch_shards(mesh))


def _flat(pairs: jax.Array) -> jax.Array:
    """`[B, 2, …]` → `[2 B, …]`."""
    return pairs.reshape(-1, *pairs.shape[2:])


def _checked(sampler: Callable[..., Any], parts: int) -> Callable[..., Any]:

    def checked(params, initial, clip, sync, text, negative_text, codec=None):
        if initial.shape[0] % parts:
            raise ValueError(f'a batch of {initial.shape[0]} cannot be split into {parts} parts: choose a multiple '
                             '(config.sampling.batch_size), or fill the batch up and cut the result')
        return sampler(params, initial, clip, sync, text, negative_text, codec)

    return checked
