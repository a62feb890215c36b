"""Distribution metrics: the reference's numbers, closed forms, degenerate inputs, and intervals against the plain bootstrap."""
import numpy as np
import pytest
import scipy.linalg

from mmaudio_jax import metrics_distribution as metrics
from tests.golden import evaluation_goldens as goldens


@pytest.fixture(name='draws', scope='module')
def fixture_draws():
    random = np.random.RandomState(1234)
    first = random.normal(size=(400, 32)).astype(np.float32)
    second = (1.3 * random.normal(size=(500, 32)) + 0.2).astype(np.float32)
    return first, second, 3 * random.normal(size=(123, 527)), 3 * random.normal(size=(123, 527))


def test_goldens(draws):
    first, second, logits, reference_logits = draws
    assert abs(metrics.frechet(first, second).value - goldens.entry('front', 'fd Ran')) < 1e-5  # measured 3.2e-7
    rank_deficient = metrics.frechet(first[:20], second[:25])
    assert abs(rank_deficient.value - goldens.entry('front', 'fd same')) < 1e-5  # measured 1.1e-7
    assert 'biased upwards' in rank_deficient.note and not metrics.frechet(first, second).note
    kl = metrics.kl_divergences(logits, reference_logits).mean()
    assert abs(kl - goldens.entry('front', 'kl next')['softmax_KL_gt_pred']) < 1e-5  # measured 1.8e-7
    parts, golden = metrics.inception_scores(logits), goldens.entry('front', 'is of')
    assert abs(parts.mean() - golden['inception_score_mean']) < 1e-5  # measured 1.5e-8
    assert abs(parts.std() - golden['inception_score_std']) < 1e-5
    assert metrics.inception(logits).value == parts.mean()


def _reference_formula(first, second):
    covariances = [np.cov(part, rowvar=False) for part in (first, second)]
    shift = first.mean(0) - second.mean(0)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real


def test_frechet_distance_is_the_reference_formula():
    random = np.random.default_rng(0)
    for rows, width in ((300, 40), (60, 64), (2, 5)):
        first, second = random.normal(size=(rows, width)), 0.5 + random.normal(size=(rows + 3, width)) @ np.diag(
            random.uniform(0.1, 3, width))
        value = metrics.frechet(first, second).value
        np.testing.assert_allclose(value, _reference_formula(first, second), rtol=1e-5)
        assert abs(metrics.frechet(first, first).value) < 1e-10
        np.testing.assert_allclose(metrics.frechet(second, first).value, value, rtol=1e-10)


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    """Samples whose means and covariances are exactly known."""
    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T * np.sqrt(7 / 8)  # covariance: identity
    scales = np.array([1.0, 2.0, 0.5])
    value = metrics.frechet(corners, corners * scales + 3.0).value
    np.testing.assert_allclose(value, 3 * 9 + ((1 - scales)**2).sum(), rtol=1e-12)


def test_intervals_agree_with_the_plain_bootstrap():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(600, 4)), 0.7 + random.gamma(2.0, size=(500, 4))
    result = metrics.frechet(first, second)
    plain = [_reference_formula(first[random.integers(600, size=600)], second[random.integers(500, size=500)])
             for _ in range(600)]
    low, high = np.quantile(plain, [0.025, 0.975])
    np.testing.assert_allclose(result.high - result.low, high - low, rtol=0.05)  # measured 0.011
    assert result.low < result.value < result.high
    np.testing.assert_allclose((result.low + result.high) / 2, (low + high) / 2, rtol=0.05)


def test_rows_of_one_clip_are_resampled_together():
    random = np.random.default_rng(2)
    first, second = random.normal(size=(200, 3)) + 1, random.normal(size=(200, 3))
    single = metrics.frechet(first, second)
    repeated = metrics.frechet(np.repeat(first, 4, axis=0), np.repeat(second, 4, axis=0), [4] * 200, [4] * 200)
    assert repeated.clips == 200
    np.testing.assert_allclose(repeated.high - repeated.low, single.high - single.low, rtol=0.1)
    with pytest.raises(ValueError, match='200 vectors cannot be those of clips with 199'):
        metrics.frechet(first, second, [1] * 199)


def test_mean_and_its_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    result = metrics.mean(values)
    half_width = 1.96 * values.std() / 20
    np.testing.assert_allclose([result.value, result.low, result.high],
                               values.mean() + np.array([0, -half_width, half_width]), atol=0.02)
    one = metrics.mean(np.array([0.5]))
    assert (one.value, one.low, one.high, one.note) == (0.5, 0.5, 0.5, 'one clip: no interval')


def test_differences_resample_a_clip_in_both_systems_at_once():
    values = np.random.default_rng(3).normal(2.0, 1.0, 400)
    paired = metrics.difference(metrics.mean(values + 0.1 + 1e-2 * values[::-1]), metrics.mean(values))
    assert 0.1 < paired.low < paired.value < paired.high < 0.14 and paired.high - paired.low < 0.003
    random = np.random.default_rng(4)
    reference, system = random.normal(size=(300, 3)), random.normal(size=(300, 3)) + 0.5
    near = metrics.difference(metrics.frechet(system + 1e-3 * reference, reference), metrics.frechet(system, reference))
    alone = metrics.frechet(system, reference)
    assert near.high - near.low < 0.05 * (alone.high - alone.low)
    with pytest.raises(ValueError, match='same clips, not 300 and 299'):
        metrics.difference(alone, metrics.frechet(system[:299], reference))


def test_offsets_are_averaged_without_sign():
    np.testing.assert_allclose(metrics.offset_sizes(np.array([[-1.0, 1.0], [0.2, 0.0]])), [1.0, 0.1])


def test_cosines():
    np.testing.assert_allclose(metrics.cosines([[2, 0], [1, 1], [0, 0]], [[3, 0], [-1, -1], [1, 1]]), [1, -1, 0], atol=1e-15)


def test_kl_is_of_the_reference_from_the_sample():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    expected = (p * np.log(p / q)).sum()
    np.testing.assert_allclose(metrics.kl_divergences(np.log(q)[None] + 4, np.log(p)[None] - 1), [expected], rtol=1e-12)


def test_inception_score_of_certain_and_uniform_classes():
    certain = np.tile(1e4 * np.eye(4), (10, 1))
    assert metrics.inception_scores(certain).max() <= 4 + 1e-9
    np.testing.assert_allclose(metrics.inception_scores(np.zeros((30, 7))), 1, rtol=1e-12)
    random = np.random.default_rng(4)
    logits = 2 * random.normal(size=(300, 20))
    result = metrics.inception(logits)
    assert result.low < result.value < result.high and result.clips == 300
    parts = metrics._splits(300)
    plain = []
    for _ in range(300):
        again = logits.copy()
        for rows in parts:
            again[rows] = logits[random.choice(rows, len(rows))]
        plain.append(metrics.inception_scores(again).mean())
    np.testing.assert_allclose(result.high - result.low, np.subtract(*np.quantile(plain, [0.975, 0.025])), rtol=0.2)


def test_what_is_not_defined_is_an_error_and_never_a_number():
    ok = np.ones((3, 2))
    broken = np.array([[np.nan, 0], [1, 1], [2, 2]])
    for call, words in ((lambda: metrics.frechet(ok[:1], ok), 'two or more vectors'),
                        (lambda: metrics.frechet(broken, ok), 'features .* not finite'),
                        (lambda: metrics.frechet(ok, broken), 'reference .* not finite'),
                        (lambda: metrics.frechet(ok, np.ones((3, 3))), 'one width'),
                        (lambda: metrics.inception_scores(np.ones((9, 5))), '10 parts'),
                        (lambda: metrics.kl_divergences(ok, ok[:2]), 'in pairs'),
                        (lambda: metrics.cosines(broken, ok), 'not finite'),
                        (lambda: metrics.mean(np.zeros(0)), 'one finite value a clip'),
                        (lambda: metrics.offset_sizes(np.zeros(3)), 'clips, crops'),
                        (lambda: metrics.mean(np.array([1.0, np.nan])), 'one finite value a clip')):
        with pytest.raises(ValueError, match=words):
            call()
    assert metrics.frechet(ok, ok + 2).value == 8.0  # no spread at all is defined
