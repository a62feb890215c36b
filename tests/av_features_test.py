"""The TFDS builder over an extracted set."""
import numpy as np
import pytest

from data_pipelines import av_features
from tests import records_test


def test_reads_a_set_through_tfds(tmp_path):
    records_test.write_set(tmp_path / 'bells', {'train': [2, 0, 1], 'test': [1]})  # a shard whose clips were all rejected
    builder = av_features.AvFeatures(tmp_path / 'bells')
    assert builder.extraction['encoder'] == 'pixels'
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {'train': 3, 'test': 1}
    source = builder.as_data_source('train')
    assert [example['id'].decode() for example in source] == ['clip-000', 'clip-001', 'clip-002']
    expected = records_test.make_example(2)['sync_features'].astype(np.float16)
    np.testing.assert_array_equal(source[2]['sync_features'], expected)


def test_a_folder_that_is_no_set_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='not a record set'):
        av_features.AvFeatures(tmp_path)
