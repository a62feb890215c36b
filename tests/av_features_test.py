"""The TFDS builder over an extracted set."""
import numpy as np
import pytest
import tensorflow_datasets as tfds

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


@pytest.mark.parametrize('name', ['vggsound', 'audiocaps', 'clotho', 'audioset_sl', 'bbc', 'freesound', 'moviegen',
                                  'greatest_hits', 'impacts', 'impacts_sounds'])
def test_a_public_dataset_is_found_by_its_name(tmp_path, name):
    records_test.write_set(tmp_path / name, {'train': [1]}, name=name)
    source = tfds.data_source(name, split='train', data_dir=tmp_path)
    assert source[0]['id'].decode() == 'clip-000'
    assert tfds.builder(name, data_dir=tmp_path).extraction['codec'] == 'pca'
    with pytest.raises(FileNotFoundError, match='no such record set'):
        tfds.builder(name, data_dir=tmp_path / 'none')
