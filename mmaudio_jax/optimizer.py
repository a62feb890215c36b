"""Learning-rate schedules and AdamW over the trained leaves. Source: MMAudio (arXiv 2412.15322), section 4.1."""
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import optax

from mmaudio_jax.models import mmaudio

SCHEDULES = ('step', 'constant', 'polynomial')
POLYNOMIAL_POWER = 0.9
MOMENT_DTYPES = ('float32', 'bfloat16')


def trained_labels(params: Mapping[str, Any]) -> dict[str, str]:
    """'frozen' or 'trained' for every top-level entry of `params`; entries of mmaudio.FROZEN are constants of the data."""
    return {name: 'frozen' if name in mmaudio.FROZEN else 'trained' for name in params}


def stop_frozen(params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the gradient cut at the frozen entries, so that they count in no gradient norm."""
    labels = trained_labels(params)
    return {name: jax.lax.stop_gradient(value) if labels[name] == 'frozen' else value for name, value in params.items()}


def make_schedule(config) -> optax.Schedule:
    """Learning rate of a step.

    With w = config.warmup_steps and u = step - w, the steps since the end of the warm-up, the rate is
    config.learning_rate times min(1, (step + 1) / (w + 1)) times

      step        config.schedule_factor to the number of config.schedule_steps that are <= u
      constant    1
      polynomial  (1 - u / config.polynomial_steps)^0.9, and 0 from u = config.polynomial_steps on

    Args:
      config: the section `optimizer` of the configuration.

    Returns:
      fn(step) -> float32 [], for an int32 step that counts from 0.

    Raises:
      ValueError: an unknown schedule, or a field that it cannot work with.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(f'config.optimizer.schedule is {config.schedule!r}: choose one of {", ".join(SCHEDULES)}')
    if config.warmup_steps < 0:
        raise ValueError(f'config.optimizer.warmup_steps is {config.warmup_steps}: set 0 for none, or a positive number')
    if config.schedule == 'polynomial' and config.polynomial_steps <= 0:
        raise ValueError(f'config.optimizer.polynomial_steps is {config.polynomial_steps}: set the steps until the rate is 0')

    def schedule(step):
        since = jnp.maximum(step - config.warmup_steps, 0)
        warmup = jnp.minimum(1.0, (step + 1) / (config.warmup_steps + 1))
        decay = jnp.float32(1)
        if config.schedule == 'step':
            for boundary in config.schedule_steps:
                decay *= jnp.where(since >= boundary, config.schedule_factor, 1.0)
        elif config.schedule == 'polynomial':
            decay = (1 - jnp.minimum(since, config.polynomial_steps) / config.polynomial_steps)**POLYNOMIAL_POWER
        return jnp.asarray(config.learning_rate * warmup * decay, jnp.float32)

    return schedule


def make(config, params: Mapping[str, Any]) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping by global norm, then AdamW, over the trained entries of `params`.

    The weight decay is decoupled, lr * weight_decay * p, and acts on every trained tensor, biases and norm scales too.
    Entries of mmaudio.FROZEN get zero updates, count in no norm, and have no optimizer state. The second moment is float32;
    the first is kept in config.first_moment_dtype and computed with in float32.

    Args:
      config: the section `optimizer` of the configuration.
      params: the parameters, or their shapes; mapping with the official top-level names.

    Returns:
      (optax transformation on trees like `params`, schedule fn(step) -> lr).

    Raises:
      ValueError: a trained leaf is not float32, or the schedule is wrong.
    """
    labels = trained_labels(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise ValueError(f'parameter {jax.tree_util.keystr(path)} is {leaf.dtype}: parameters and their moments are '
                             'float32, whatever config.model.dtype is; convert it before training')
    if config.first_moment_dtype not in MOMENT_DTYPES:
        raise ValueError(f'config.optimizer.first_moment_dtype is {config.first_moment_dtype!r}: choose one of '
                         f'{", ".join(MOMENT_DTYPES)}')
    schedule = make_schedule(config)
    trained = optax.chain(_clipped_adam(config), optax.add_decayed_weights(config.weight_decay),
                          _skippable(optax.scale_by_learning_rate(schedule)))
    return optax.partition({'trained': trained, 'frozen': optax.set_to_zero()}, labels), schedule


def _skippable(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state stays as it was unless `use`."""

    def update(updates, state, params=None, *, use=True, **_):
        updates, new = inner.update(updates, state, params)
        return updates, choose(use, new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def choose(use: Any, new: Any, old: Any) -> Any:
    """The tree `new` where `use` (bool []), else the tree `old`."""
    return jax.tree.map(lambda n, o: jnp.where(use, n, o), new, old)


def _clipped_adam(config) -> optax.GradientTransformationExtraArgs:
    """Adam of gradients times min(1, clip_norm / (norm + 1e-6)), as PyTorch clips; its state stays as it was unless `use`.

    The first moment is rounded to config.first_moment_dtype between steps.
    """
    b1, b2 = config.betas
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=config.eps)
    cast = lambda state, dtype: state._replace(mu=optax.tree.cast(state.mu, dtype))

    def next_state(gradients, factor, state):
        return adam.update(jax.tree.map(lambda gradient: gradient * factor, gradients), state)[1]

    def update(updates, state, params=None, *, use=True, **_):
        del params
        factor = jnp.minimum(1.0, config.clip_norm / (optax.tree.norm(updates) + 1e-6))
        old = cast(state, jnp.float32)  # optax's own mu_dtype would multiply in bfloat16, where 0.9 is 0.8984
        # A branch is not fused with what uses its results: CPUs would compute the moments twice, from copies of the old ones.
        new = jax.lax.platform_dependent(
            updates, factor, old,
            cpu=lambda *args: jax.lax.cond(use, next_state, lambda *args: args[-1], *args),
            default=lambda *args: choose(use, next_state(*args), args[-1]))
        means, squares = optax.tree.bias_correction(new.mu, b1, new.count), optax.tree.bias_correction(new.nu, b2, new.count)
        updates = jax.tree.map(lambda mean, square: mean / (jnp.sqrt(square) + config.eps), means, squares)
        return updates, cast(new, config.first_moment_dtype)

    return optax.GradientTransformationExtraArgs(lambda params: cast(adam.init(params), config.first_moment_dtype), update)


def updates_done(opt_state: Any) -> jax.Array:
    """How many steps changed the parameters, int32 []: the place in the schedule. Steps that were left out do not count."""
    (_, count), *_ = optax.tree.get_all_with_path(opt_state, 'count')
    return count
