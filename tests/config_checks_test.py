"""Every published config passes; the messages are in run_test.py and train_test.py."""
import importlib

import pytest

from mmaudio_jax import config_checks
from mmaudio_jax import partitioning
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence


@pytest.mark.parametrize('name', ['base', 'impacts', 's_16k', 's_44k', 'm_44k', 'l_44k', 'l_44k_v2', 'ablations.table'])
def test_every_config_is_in_order(name):
    config = importlib.import_module(f'configs.{name}').get_config()
    config_checks.check(config)
    assert mmaudio.build(config.model, Sequence(**config.sequence)).hidden_size % 64 == 0
    partitioning.rules_of(config)


@pytest.mark.parametrize('field, value, message', [
    ('flow.text_dropout', float('nan'), 'is nan; it must be from 0 to 1'),
    ('input.batch_size', -4, 'is -4; it must be at least 1'),
    ('input.balance', ('one', 0.5), r"is \('one', 0.5\); it must be a tuple of \(record set, exponent\) tuples with a comma"),
    ('input.shares', (('bbc', '0.5'),), r"is \(\('bbc', '0.5'\),\); the share '0.5' must be a number.*: '\(\('bbc', 0.5\),\)'"),
    ('input.balance', (('bbc', '1'),), r"is .*; the exponent '1' must be a number, not in quotes: '\(\('bbc', 0.5\),\)'"),
    ('input.balance', (('bbc', float('nan')),), 'is .*; the exponent nan must be a number'),
    ('input.mixture', (('bbc', True),), r"is .*; the repeats True must be a number, not in quotes: '\(\('bbc', 5\),\)'"),
    ('extract.ray_resources', ('GPU', 1.0), r"is \('GPU', 1.0\); it must be a tuple of \(resource, amount\) tuples"),
    ('extract.workers', 0, 'is 0; it must be at least 1'), ('score.batch_size', 0, 'is 0; it must be at least 1'),
    ('evaluate.onset_windows_s', (), r'is \(\); it must hold numbers of seconds, at least one'),
    ('evaluate.onset_windows_s', (float('nan'),), r'is \(nan,\); it must hold numbers of seconds, at least one'),
    ('train.compiler_options', (('xla_tpu_scoped_vmem_limit_kib',),), r'is .*; it must be a tuple of \(option, value\) tuples'),
    ('train.compiler_options', (('xla_enable_async_all_gather', True),), 'is .*; the value True must be a string, in quotes'),
    ('seed', 2**32, 'is 4294967296; it must be from 0 to 4294967295'),
    ('sampling.seed', -1, 'is -1; it must be from 0 to 4294967295'),
    ('ema.sigma_rels', ('a',), r"is \('a',\); it must hold numbers"),
    ('optimizer.betas', (0.9, 'x'), 'is .*; it must hold numbers'),
    ('optimizer.betas', (0.9,), r'is \(0.9,\); it must be \(first, second\)'),
])
def test_a_field_that_cannot_be_used_is_named(field, value, message):
    config = importlib.import_module('configs.base').get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=f'config.{field} {message}'):
        config_checks.check(config)
