"""Id lists of config.clips.exclude: what they take out, and what is said when it is nothing."""
import pytest

from tests.layouts_test import write_sound
from tests.listing_test import make
from tests.listing_test import write


@pytest.mark.parametrize('name, text', [
    ('ids.txt', 'sub/b.wav\nown\n'), ('ids.txt', 'sub/b\nown\n'),
    ('list.csv', 'file,caption,split,label\nsub/b.wav,x,,\nd.wav,x,,\n'), ('ids.json', '["sub/b.wav", "", "own"]')])
def test_an_id_list_takes_out_what_a_csv_names(tmp_path, capsys, name, text):
    source = tmp_path / 'source'
    write(source / 'list.csv', 'file,caption,id\na.wav,a,\nsub/b.wav,b,\nd.wav,d,own\n')
    for file in ('a.wav', 'sub/b.wav', 'd.wav'):
        write_sound(source / file, 1.2)
    write(tmp_path / name, text)
    tables, report = make(tmp_path, 'folder_csv', exclude=(('set', str(tmp_path / name)),))
    assert [row['id'] for row in tables['train']] == ['a'] and report['excluded'] == {str(tmp_path / name): 2}
    printed = capsys.readouterr().out
    assert f'2 excluded by {tmp_path / name}' in printed and 'WARNING' not in printed


def test_test_clips_are_not_taken_out(tmp_path, capsys):
    """A published test set stays whole, whatever overlaps other sets."""
    source = tmp_path / 'source'
    write(source / 'list.csv', 'file,caption,split\na.wav,a,\nb.wav,b,\nc.wav,c,test\nd.wav,d,val\n')
    for file in ('a.wav', 'b.wav', 'c.wav', 'd.wav'):
        write_sound(source / file, 1.2)
    write(tmp_path / 'ids.txt', 'b\nc\nd\n')
    tables, report = make(tmp_path, 'folder_csv', exclude=(('set', str(tmp_path / 'ids.txt')),))
    assert [row['id'] for row in tables['test']] == ['c'] and list(report['excluded'].values()) == [2]
    assert 'b' not in [row['id'] for rows in tables.values() for row in rows] and report['lists']['named_but_tested'] == ['c']
    write(tmp_path / 'ids.txt', 'c\n')
    (tmp_path / 'media' / 'set' / 'clips_report.json').unlink()
    for _ in range(2):
        make(tmp_path, 'folder_csv', exclude=(('set', str(tmp_path / 'ids.txt')),))
    assert 'WARNING' not in capsys.readouterr().out


def test_an_id_list_that_takes_nothing_out_is_said_loudly(tmp_path, capsys):
    write_sound(tmp_path / 'source' / 'rain' / 'bell.wav', 1.2)
    write(tmp_path / 'ids.txt', 'bell.wav\n')
    make(tmp_path, 'folder_csv', exclude=(('set', str(tmp_path / 'ids.txt')),))
    printed = capsys.readouterr().out
    assert "NOTHING: none of its 1 ids, such as 'bell', is the source or the id of a clip, such as 'rain/bell' and" in printed
    assert f'0 excluded by {tmp_path / "ids.txt"}' in printed
    make(tmp_path, 'folder_csv', exclude=(('set', str(tmp_path / 'ids.txt')),))
    assert 'ids.txt excluded nothing when the tables were made' in capsys.readouterr().out


def test_id_lists_may_be_put_away_but_not_changed(tmp_path):
    ids, listed = tmp_path / 'ids.txt', {'exclude': (('set', str(tmp_path / 'ids.txt')),)}
    for name in ('bell', 'drum'):
        write(tmp_path / 'source' / f'{name}.mp4')
    write(ids, 'drum')
    before = make(tmp_path, 'folder_csv', **listed)
    ids.rename(tmp_path / 'put away')
    assert make(tmp_path, 'folder_csv', **listed) == before
    with pytest.raises(ValueError, match='were made with exclude = .*ids.txt.*, the configuration says {}'):
        make(tmp_path, 'folder_csv')
    with pytest.raises(ValueError, match="the configuration says {.*ids.txt.*other.txt': ''}"):
        make(tmp_path, 'folder_csv', exclude=(*listed['exclude'], ('set', str(tmp_path / 'other.txt'))))
    write(ids, 'bell')
    with pytest.raises(ValueError, match='were made with exclude = '):
        make(tmp_path, 'folder_csv', **listed)
