"""Averages and synthesis against the golden trajectory and against closed forms."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import ema
from tests.conftest import GOLDEN

SIGMA_RELS = (0.05, 0.1)
GOLDEN_BOUND = 1e-5  # measured 6e-8 for the live averages, 4.8e-7 for the synthesised ones


@pytest.fixture(name='golden', scope='module')
def fixture_golden():
    return np.load(GOLDEN / 'post_hoc_ema.npz')


def run(trajectory, every):
    """The final state and the snapshots after every `every` updates, over a `[steps, P]` trajectory of parameters."""

    def segment(state, rows):
        return jax.lax.scan(lambda s, row: (ema.update(s, {'w': row}), None), state, rows)[0]

    state = ema.init({'w': jnp.zeros_like(trajectory[0])}, SIGMA_RELS)
    snapshots = []
    for rows in trajectory.reshape(-1, every, trajectory.shape[1]):
        state = jax.jit(segment)(state, rows)
        snapshots += [ema.Snapshot(ema.sigma_rel_to_gamma(sigma_rel), int(state.count), average)
                      for sigma_rel, average in zip(state.sigma_rels, state.averages, strict=True)]
    return state, snapshots


def test_golden(golden):
    state, snapshots = run(golden['trajectory'], every=250)
    for sigma_rel, gamma in zip(SIGMA_RELS, golden['gammas']):
        assert ema.sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-9)
    live = np.stack([average['w'] for average in state.averages])
    np.testing.assert_allclose(live, golden['live'], rtol=0, atol=GOLDEN_BOUND)
    for i, sigma_rel in enumerate(golden['synthesis_sigma_rels']):
        for j, step in enumerate(golden['synthesis_steps']):
            result = ema.synthesize(snapshots, float(sigma_rel), int(step))['w']
            np.testing.assert_allclose(result, golden['synthesized'][i, j], rtol=0, atol=GOLDEN_BOUND)


def test_first_update_copies_the_weights():
    state = ema.update(ema.init({'w': jnp.array([7.0, 1e30])}, SIGMA_RELS), {'w': jnp.array([0.1, 3.0])})
    for average in state.averages:
        np.testing.assert_array_equal(average['w'], np.float32([0.1, 3.0]))


def test_late_updates_keep_their_precision():
    """After 300 000 updates 1 - beta is 2.6e-5: rounding beta to float32 first would be wrong by 0.1 %."""
    s = 300_000
    state = ema.init({'w': jnp.zeros(1)}, SIGMA_RELS).replace(count=jnp.int32(s - 1))
    state = ema.update(state, {'w': jnp.ones(1)})
    for sigma_rel, average in zip(SIGMA_RELS, state.averages):
        gamma = ema.sigma_rel_to_gamma(sigma_rel)
        expected = 1 - ((1 - 1 / (s + 1)) * (1 - 1 / (s + 2)))**((1 + gamma) / 2)
        np.testing.assert_allclose(average['w'], expected, rtol=1e-5)


@pytest.mark.parametrize('sigma_rel', [0.01, 0.05, 0.1, 0.25, ema.MAX_SIGMA_REL])
def test_gamma_gives_the_width(sigma_rel):
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    assert gamma >= 0
    assert np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize('sigma_rel', [0.0, -0.1, 0.3])
def test_impossible_width(sigma_rel):
    with pytest.raises(ValueError, match='sigma_rel'):
        ema.init({'w': jnp.zeros(1)}, (sigma_rel,))


def test_synthesis_of_a_stored_profile_is_that_snapshot():
    _, snapshots = run(np.random.RandomState(0).standard_normal((40, 3)).astype(np.float32), every=10)
    result = ema.synthesize(snapshots, 0.1, 30)
    expected = snapshots[5]
    assert expected.step == 30
    np.testing.assert_allclose(result['w'], expected.params['w'], atol=1e-6)


def test_frozen_entries_are_not_scaled():
    trees = [{'w': np.full(2, 1.0, np.float32), 'latent_std': np.full(2, 1.0, np.float32)} for _ in SIGMA_RELS]
    snapshots = [ema.Snapshot(ema.sigma_rel_to_gamma(s), 10, tree) for s, tree in zip(SIGMA_RELS, trees)]
    result = ema.synthesize(snapshots, 0.2, 10)
    assert abs(result['w'][0] - 1) > 0.01
    np.testing.assert_array_equal(result['latent_std'], [1, 1])


def test_bad_snapshots():
    snapshot = ema.Snapshot(7.0, 10, {'w': np.zeros(1)})
    with pytest.raises(ValueError, match='step 5.*stored steps: .10.'):
        ema.synthesize([snapshot], 0.05, 5)
    with pytest.raises(ValueError, match='none'):
        ema.synthesize([], 0.05, 5)
    with pytest.raises(ValueError, match='twice'):
        ema.synthesize([snapshot, snapshot], 0.05, 10)


def test_init_owns_its_buffers():
    params = {'w': jnp.ones(3)}
    state = ema.init(params, SIGMA_RELS)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in (params['w'], *(a['w'] for a in state.averages))}
    assert len(pointers) == 3
