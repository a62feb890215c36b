"""The comparison with the official modules, as far as it runs without them."""
import numpy as np
import pytest

from tests.benchmarks import against_official
from tests.benchmarks import our_side
from tests.benchmarks import rows


def figures(result, seconds, gigabytes):
    return {'result': np.asarray(result, np.float32), 'first_s': 1.0, 'median_s': seconds, 'peak_gb': gigabytes}


def test_every_row_has_our_side():
    assert our_side.BUILDERS.keys() == rows.ROWS.keys()


@pytest.mark.parametrize('row', rows.ROWS)
def test_inputs_are_arrays(row):
    inputs = rows.ROWS[row].inputs(1.0)
    assert inputs and all(isinstance(array, np.ndarray) for array in inputs.values())


def test_lengths_follow_the_seconds():
    assert rows.ROWS['vae_16k'].inputs(8.0)['latents'].shape == (1, 250, 20)
    assert rows.ROWS['vocoder_44k'].inputs(8.0)['mel'].shape == (1, 690, 128)


def test_a_row_compares_time_memory_and_results():
    line = against_official.compare('flow', figures([0, 2], 2.0, 4.0), figures([0, 2.5], 1.0, 5.0))
    assert (line['time_ratio'], line['memory_ratio'], line['error']) == (0.5, 1.25, 0.5)
    assert against_official.line(line).startswith('| flow | 2.00 | 1.00 | 0.50 | 0.7 |')


def test_training_compares_every_step():
    line = against_official.compare('train', figures([[1, 10], [2, 20]], 1, 1), figures([[1, 10], [2, 21]], 1, 1))
    assert line['error'] == pytest.approx(0.05)


def test_a_side_that_fails_leaves_its_reason():
    line = against_official.compare('flow', {'error': 'no torch'}, figures([0], 1, 1))
    assert line['skipped'] == {'official': 'no torch'}
    assert 'no torch' in against_official.line(line)


def test_our_side_is_measured_alone():
    line = against_official.compare('flow', None, {**figures([0], 1.0, 5.0), 'first_s': 2.0})
    assert against_official.line(line) == '| flow | 1.00 | 2.0 | 5.00 |'
    assert 'no weights' in against_official.line(against_official.compare('flow', None, {'error': 'no weights'}))
