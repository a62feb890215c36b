"""Power-function averages of the weights, and their synthesis after training.

Source: EDM2 (arXiv 2312.02696), section 3 and appendix C.

An average with exponent gamma gives the weights of update u, seen at update s >= u, a share proportional to u^gamma. Its
width relative to the length of training is sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)). Two
averages that are stored now and then suffice to build the average of any other width afterwards.
"""
from typing import Any, NamedTuple, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import mmaudio

MAX_SIGMA_REL = 12**-0.5  # gamma = 0, the plain mean of all weights


class Snapshot(NamedTuple):
    """One stored average: its exponent gamma, the number of updates that it has seen, and the averaged parameters."""
    gamma: float
    step: int
    params: Any


@flax.struct.dataclass
class EMAState:
    """Running averages.

    Attributes:
      count: int32 [], steps seen so far, also those that were left out.
      averages: one tree like the parameters for each of sigma_rels, in their order, float32.
      sigma_rels: relative widths (static).
    """
    count: jax.Array
    averages: tuple[Any, ...]
    sigma_rels: tuple[float, ...] = flax.struct.field(pytree_node=False)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the average with relative width sigma_rel, solved in float64.

    Raises:
      ValueError: sigma_rel is not above 0 and at most 0.2887.
    """
    if not 0 < sigma_rel <= MAX_SIGMA_REL:
        raise ValueError(f'EMA width sigma_rel {sigma_rel} is not between 0 and {MAX_SIGMA_REL:.4f}; change '
                         'config.ema.sigma_rels or config.ema.synthesis_sigma_rel (0.05 is usual)')
    inverse = float(sigma_rel)**-2
    return max(float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()), 0.0)


def init(params: Any, sigma_rels: Sequence[float]) -> EMAState:
    """State before the first update; the averages hold `params` until then.

    Args:
      params: the parameters, any pytree of float arrays.
      sigma_rels: relative widths, e.g. (0.05, 0.1).

    Raises:
      ValueError: a width out of range.
    """
    for sigma_rel in sigma_rels:
        sigma_rel_to_gamma(sigma_rel)
    copy = lambda: jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)  # own buffers, because the state is donated
    return EMAState(count=jnp.zeros([], jnp.int32), averages=tuple(copy() for _ in sigma_rels), sigma_rels=tuple(sigma_rels))


def update(state: EMAState, params: Any) -> EMAState:
    """One update of every average with the parameters after an optimizer step.

    average += (1 - beta) (params - average), beta = (s / (s + 2))^((1 + gamma) / 2), s = this update, counted from 1; at
    s = 1 the average becomes a copy of `params`. beta is the geometric mean of EDM2's factor (1 - 1/u)^(1 + gamma) at
    u = s + 1 and u = s + 2, whose product telescopes.

    Args:
      state: averages so far.
      params: parameters like those given to `init`.

    Returns:
      The new state.
    """
    count = state.count + 1
    s = count.astype(jnp.float32)
    averages = []
    for sigma_rel, average in zip(state.sigma_rels, state.averages, strict=True):
        # 1 - beta directly: after many steps it is tiny, and float32 would lose it in the difference.
        rate = -jnp.expm1((1 + sigma_rel_to_gamma(sigma_rel)) / 2 * jnp.log1p(-2 / (s + 2)))
        averages.append(jax.tree.map(lambda a, p, rate=rate: jnp.where(count == 1, p, a + rate * (p - a)), average, params))
    return EMAState(count=count, averages=tuple(averages), sigma_rels=state.sigma_rels)


def synthesize(snapshots: Sequence[Snapshot], target_sigma_rel: float, target_step: int) -> Any:
    """The average of any width at any stored step: the least-squares combination of all snapshots (EDM2 appendix C).

    The coefficients are not normalised, so the entries of mmaudio.FROZEN, which never change, are taken from the newest
    snapshot instead of being scaled by the sum of the coefficients.

    Args:
      snapshots: stored averages; their trees are alike.
      target_sigma_rel: relative width of the wanted average.
      target_step: number of updates that it has seen; one of the stored ones.

    Returns:
      Parameters, float32 numpy leaves.

    Raises:
      ValueError: no snapshots, the step is not stored, a snapshot given twice, or a width out of range.
    """
    gammas = np.array([snapshot.gamma for snapshot in snapshots], np.float64)
    steps = np.array([snapshot.step for snapshot in snapshots], np.float64)
    stored = sorted({int(step) for step in steps})
    if target_step not in stored:
        raise ValueError(f'no EMA snapshot of step {target_step} is stored; stored steps: {stored or "none"}. Choose one of '
                         'them, or train on with a smaller config.ema.snapshot_every')
    if len(set(zip(gammas, steps))) < len(snapshots):
        raise ValueError('the same EMA snapshot (gamma, step) is given twice; remove the copy from the folder ema/')
    matrix = _correlation(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    wanted = _correlation(steps, gammas, np.float64(target_step), np.float64(sigma_rel_to_gamma(target_sigma_rel)))
    coefficients = np.linalg.solve(matrix, wanted)
    newest = int(np.argmax(steps))

    def combine(path, *leaves):
        if path and isinstance(path[0], jax.tree_util.DictKey) and path[0].key in mmaudio.FROZEN:
            return np.asarray(leaves[newest], np.float32)
        total = sum(coefficient * np.asarray(leaf, np.float64) for coefficient, leaf in zip(coefficients, leaves, strict=True))
        return np.asarray(total, np.float32)

    trees = [snapshot.params for snapshot in snapshots]
    return jax.tree_util.tree_map_with_path(combine, trees[0], *trees[1:])


def _correlation(step_a, gamma_a, step_b, gamma_b) -> np.ndarray:
    """Inner product of two profiles that end at step_a and step_b (EDM2 appendix C), in float64."""
    ratio = step_a / step_b
    power = np.where(step_a < step_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * ratio**power
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(step_a, step_b))
