"""Tables of any folder; listing_test.py has what is common to all layouts."""
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
