"""Tables of any folder; listing_test.py has what is common to all layouts."""
import pytest

from tests.layouts_test import write_sound
from tests.listing_test import make
from tests.listing_test import write


def test_a_table_of_ids_and_captions_names_the_files(tmp_path):
    """As those that MMAudio publishes for its sets of sounds."""
    write(tmp_path / 'source' / 'train.tsv', 'id\tcaption\n1021\train on a roof\n')
    write_sound(tmp_path / 'source' / 'flac' / '1021.flac', 2.0)
    tables, report = make(tmp_path, 'folder_csv')
    assert tables['train'][0]['audio'].endswith('flac/1021.flac') and tables['train'][0]['caption'] == 'rain on a roof'
    assert not any(report['counts'].values())


def test_an_id_is_a_file_once_for_every_start_and_not_beside_unknown_columns(tmp_path):
    write(tmp_path / 'source' / 'train.csv', 'id,caption,start_s\n7.1,rain,0\n7.1,wind,1.5\n')
    write_sound(tmp_path / 'source' / '7.1.flac', 4.0)
    tables, report = make(tmp_path, 'folder_csv')
    assert [row['id'] for row in tables['train']] == ['7.1_000000', '7.1_000001.5'] and not any(report['counts'].values())
    write(tmp_path / 'other' / 'source' / 'train.csv', 'filename,id,caption\n7.1.flac,a,rain\n')
    write_sound(tmp_path / 'other' / 'source' / '7.1.flac', 4.0)
    with pytest.raises(ValueError, match='has no column file or video or audio'):
        make(tmp_path / 'other', 'folder_csv')
