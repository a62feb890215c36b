"""Folders, tables and pairing by name: everything that could be dropped in silence is said."""
import json
import pathlib

import pytest

from mmaudio_jax import score_inputs


def _touch(folder, *names):
    folder.mkdir(exist_ok=True, parents=True)
    for name in names:
        (folder / name).write_text('')
    return folder


def test_a_folder_by_name(tmp_path):
    folder = _touch(tmp_path / 'a', 'b.wav', 'a.flac', 'notes.txt', '.hidden.wav')
    assert list(score_inputs.files(folder, ('.wav', '.flac'))) == ['a', 'b']
    _touch(folder, 'a.wav')
    with pytest.raises(ValueError, match='a.flac and a.wav have one name'):
        score_inputs.files(folder, ('.wav', '.flac'))
    with pytest.raises(FileNotFoundError, match='no such folder'):
        score_inputs.files(tmp_path / 'none', ('.wav',))


def test_systems():
    assert score_inputs.systems('out/ours', '') == {'ours': pathlib.Path('out/ours')}
    assert score_inputs.systems('', 'a=x b=y/z') == {'a': pathlib.Path('x'), 'b': pathlib.Path('y/z')}
    for generated, compare in (('', ''), ('x', 'a=y'), ('', 'a'), ('', 'a=x,a=y')):
        with pytest.raises(ValueError, match='config.score'):
            score_inputs.systems(generated, compare)


def test_pairing(tmp_path):
    pairing = score_inputs.pair({'a': 1, 'b': 2, 'x': 3}, {'a', 'b', 'c'}, True, tmp_path)
    assert (pairing.names, pairing.missing, pairing.extra) == (('a', 'b'), ('c',), ('x',))
    with pytest.raises(ValueError, match=r'1 missing \(c\) and 1 extra \(x\) of 3 clips asked for'):
        score_inputs.pair({'a': 1, 'b': 2, 'x': 3}, {'a', 'b', 'c'}, False, tmp_path)
    with pytest.raises(ValueError, match=r'none of its 1 clips \(a_denoised\)'):
        score_inputs.pair({'a_denoised': 1}, {'a'}, True, tmp_path)


def test_references_of_a_folder(tmp_path):
    folder = _touch(tmp_path / 'r', 'a.mp4', 'a.wav', 'b.webm')
    (folder / 'a_times.txt').write_text('0.5 metal hit\n1.25\n')
    (tmp_path / 'c.tsv').write_text('id\tlabel\na\ta dog, barking\n')
    found = score_inputs.references(str(folder), str(tmp_path / 'c.tsv'))
    assert found.sounds == {'a': folder / 'a.wav', 'b': folder / 'b.webm'}  # a sound goes before a video's track
    assert set(found.videos) == {'a', 'b'} and found.onsets == {'a': [0.5, 1.25]}
    assert found.captions == {'a': 'a dog, barking'}
    (tmp_path / 'd.csv').write_text('title,words\na,b\n')
    with pytest.raises(ValueError, match='d.csv: a row has none of the columns'):
        score_inputs.references('', str(tmp_path / 'd.csv'))
    (folder / 'b_times.txt').write_text('soon\n')
    with pytest.raises(ValueError, match='b_times.txt: a line does not begin with a time'):
        score_inputs.references(str(folder), '')


def test_references_of_a_table(tmp_path):
    row = {'id': 'a', 'audio': '', 'video': 'v/a.mp4', 'caption': 'a hit', 'onset_times_s': [1.0]}
    (tmp_path / 'test.jsonl').write_text(json.dumps(row) + '\n')
    found = score_inputs.references(str(tmp_path / 'test.jsonl'), '')
    assert found.sounds == found.videos == {'a': tmp_path / 'v/a.mp4'}
    assert (found.captions, found.onsets) == ({'a': 'a hit'}, {'a': [1.0]})
