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


@pytest.mark.parametrize('section, name, value, message', [
    ('flow', 'text_dropout', float('nan'), 'nan; it must be from 0 to 1'),
    ('extract', 'workers', 0, '0; it must be at least 1'),
    ('score', 'batch_size', 0, '0; it must be at least 1'), ('score', 'workers', 0, '0; it must be at least 1')])
def test_a_field_that_is_no_number_within_its_range_is_named(section, name, value, message):
    config = importlib.import_module('configs.base').get_config()
    config[section][name] = value
    with pytest.raises(ValueError, match=f'config.{section}.{name} is {message}'):
        config_checks.check(config)
