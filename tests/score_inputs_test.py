"""Folders, tables and pairing by name: everything that could be dropped in silence is said."""
import json
import pathlib
import unicodedata

import numpy as np
import pytest
import soundfile

from mmaudio_jax import evaluation_media
from mmaudio_jax import score_inputs
from tests import broken_media


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
    assert score_inputs.systems('', ' a=my sounds,b=y, ') == {'a': pathlib.Path('my sounds'), 'b': pathlib.Path('y')}
    assert score_inputs.systems('', '') == {}
    for generated, compare in (('x', 'a=y'), ('', 'a'), ('', 'a=x,a=y'), ('', 'a=')):
        with pytest.raises(ValueError, match='--compare'):
            score_inputs.systems(generated, compare)


def test_pairing(tmp_path):
    pairing = score_inputs.pair({'a': 1, 'b': 2, 'x': 3}, {'a', 'b', 'c'}, True, tmp_path)
    assert (pairing.names, pairing.missing, pairing.extra) == (('a', 'b'), ('c',), ('x',))
    with pytest.raises(ValueError, match=r'1 missing \(c\) and 1 extra \(x\) of 3 clips asked for'):
        score_inputs.pair({'a': 1, 'b': 2, 'x': 3}, {'a', 'b', 'c'}, False, tmp_path)
    with pytest.raises(ValueError, match=r'none of its 1 clips \(a_denoised\)'):
        score_inputs.pair({'a_denoised': 1}, {'a'}, True, tmp_path)


def test_a_folder_without_a_sound_says_what_is_there(tmp_path):
    with pytest.raises(ValueError, match='a: holds no sound that can be scored .*: it is empty'):
        score_inputs.pair({}, {'a'}, True, _touch(tmp_path / 'a'))
    _touch(tmp_path / 'a', 'x.MP3', 'y.mp3', 'README', '.hidden')
    (tmp_path / 'a' / 'run').mkdir()
    with pytest.raises(ValueError, match='it holds 2 .mp3, 1 files without a suffix, 1 folders|it holds 2 .mp3, 1 folders, 1 '):
        score_inputs.pair({}, {'a'}, True, tmp_path / 'a')


def test_references_of_a_folder(tmp_path):
    folder = _touch(tmp_path / 'r', 'a.mp4', 'a.wav', 'b.webm')
    (folder / 'a_times.txt').write_text('0.5 metal hit\n1.25\n')
    (tmp_path / 'c.tsv').write_text('id\tlabel\na\ta dog, barking\n')
    found = score_inputs.references(str(folder), str(tmp_path / 'c.tsv'), 8.0)
    assert found.sounds == {'a': folder / 'a.wav', 'b': folder / 'b.webm'}  # a sound goes before a video's track
    assert set(found.videos) == {'a', 'b'} and found.onsets == {'a': [0.5, 1.25]}
    assert found.captions == {'a': 'a dog, barking'}
    (tmp_path / 'd.csv').write_text('title,words\na,b\n')
    with pytest.raises(ValueError, match='d.csv: a row has none of the columns'):
        score_inputs.references('', str(tmp_path / 'd.csv'), 8.0)


@pytest.mark.parametrize('text, message', [
    ('soon', "line 2: 'soon' is not a time in seconds, with which"), (',', "line 2: ',' is not a time in seconds, with which"),
    ('1,5', "line 2: '1,5' has a comma between two digits; write a decimal point"), ('nan', "line 2: 'nan' is not a time"),
    ('-1 metal', "line 2: '-1' is not a time in seconds from 0 on"), ('inf', "line 2: 'inf' is not a time")])
def test_onsets_that_are_no_times_are_refused_by_line(tmp_path, text, message):
    (_touch(tmp_path / 'r', 'b.mp4') / 'b_times.txt').write_text(f'0.5, metal\n{text}\n')
    with pytest.raises(ValueError, match=f'b_times.txt, {message}'):
        score_inputs.references(str(tmp_path / 'r'), '', 8.0)


def test_onsets_with_a_byte_order_mark_or_in_latin_1(tmp_path):
    (_touch(tmp_path / 'r', 'b.mp4') / 'b_times.txt').write_bytes(b'\xef\xbb\xbf0.5 metal\r\n1.25, caf\xe9\r\n')
    assert score_inputs.references(str(tmp_path / 'r'), '', 8.0).onsets == {'b': [0.5, 1.25]}


def test_every_kind_of_sound_and_video_is_seen_and_what_is_passed_over_is_said(tmp_path, capsys):
    folder = _touch(tmp_path / 'r', 'a.mp3', 'b.MPG', 'c.mts', 'd.docx', 'notes.txt')
    found = score_inputs.references(str(folder), '', 8.0)
    assert found.videos == {'b': folder / 'b.MPG', 'c': folder / 'c.mts'} and found.sounds['a'] == folder / 'a.mp3'
    told = capsys.readouterr().out
    assert f'score: passes over 2 of {folder}, which are not what is scored by their names, first d.docx' in told
    assert list(score_inputs.sounds(folder)) == ['a'] and 'passes over 4' in capsys.readouterr().out
    with pytest.raises(ValueError, match='other: holds no references'):
        score_inputs.references(str(_touch(tmp_path / 'other', 'd.docx')), '', 8.0)


def test_references_whose_names_have_an_ending(tmp_path):
    """Greatest Hits as it is unpacked; a folder without the ending serves as it is."""
    folder = _touch(tmp_path / 'hits', 'a_denoised.mp4', 'a_mic.mp4', 'a_denoised.wav', 'a_mic.wav')
    (folder / 'a_times.txt').write_text('0.5 metal hit\n')
    found = score_inputs.references(str(folder), '', 8.0, ending='_denoised')
    assert found.videos == {'a': folder / 'a_denoised.mp4'} and found.sounds == {'a': folder / 'a_denoised.wav'}
    assert set(found.onsets) == {'a'}
    plain = score_inputs.references(str(_touch(tmp_path / 'plain', 'a.mp4', 'b.mp4')), '', 8.0, ending='_denoised')
    assert set(plain.videos) == {'a', 'b'}


def test_tables_of_captions(tmp_path):
    path = tmp_path / 'captions.csv'
    path.write_bytes('\ufeffname,caption\nYa.b,"a dog, barking"\n'.encode())  # as spreadsheets write it
    assert score_inputs.references('', str(path), 8.0).captions == {'Ya.b': 'a dog, barking'}
    path.write_bytes('name,caption\na,un caf\xe9\n'.encode('latin-1'))
    assert score_inputs.references('', str(path), 8.0).captions == {'a': 'un caf\xe9'}
    for text, message in (('b,a dog, barking\n', 'line 2: 3 cells'), ('b,"a dog\n', 'line 2: the row that starts there')):
        path.write_text(f'name,caption\n{text}')
        with pytest.raises(ValueError, match=f'captions.csv, {message}'):
            score_inputs.references('', str(path), 8.0)
    path.write_text('name,caption\na,one\nb,two\na,three\n')
    with pytest.raises(ValueError, match=r"captions.csv: 1 names come twice \(a\); which caption is the clip's"):
        score_inputs.references('', str(path), 8.0)
    lines = tmp_path / 'captions.jsonl'
    for text, words in (('{"id": "a"\n', 'line 1: Expecting'), ('\n[]\n', 'line 2: is not a JSON object')):
        lines.write_text(text)
        with pytest.raises(ValueError, match=f'captions.jsonl, {words}'):
            score_inputs.references('', str(lines), 8.0)


def test_captions_of_other_clips_are_passed_over(capsys):
    assert score_inputs.captions_of({'b': 'x', 'a': 'y', 'c': 'z'}, {'a', 'd'}, 'all.csv') == {'a': 'y'}
    assert 'score: passes over 2 rows of all.csv, which are of other clips, first b' in capsys.readouterr().out
    assert score_inputs.captions_of({'a': 'y'}, {'a'}, 'all.csv') == {'a': 'y'} and not capsys.readouterr().out
    with pytest.raises(ValueError, match=r'all.csv: none of its 1 names \(b\) is that of one of the 2 clips \(a, c\)'):
        score_inputs.captions_of({'b': 'x'}, {'a', 'c'}, 'all.csv')


def test_references_of_a_table(tmp_path):
    row = {'id': 'a', 'audio': '', 'video': 'v/a.mp4', 'caption': 'a hit', 'onset_times_s': [1.0]}
    later = {'id': 'b', 'audio': 's/b.wav', 'video': None, 'start_s': 2.5}
    path = tmp_path / 'test.jsonl'
    path.write_text(json.dumps(row) + '\n' + json.dumps(later) + '\n')
    found = score_inputs.references(str(path), '', 8.0)
    assert found.videos == {'a': tmp_path / 'v/a.mp4'}
    assert found.sounds == {'a': tmp_path / 'v/a.mp4', 'b': evaluation_media.Part(tmp_path / 's/b.wav', 2.5, 8.0)}
    assert (found.captions, found.onsets) == ({'a': 'a hit'}, {'a': [1.0]})
    assert set(score_inputs.references(str(path), '', 8.0, ['b']).sounds) == {'b'}
    with pytest.raises(ValueError, match=r'no row for 1 of the 2 records \(c\)'):
        score_inputs.references(str(path), '', 8.0, ['a', 'c'])
    for times in ('null', '0.5', '["0.5"]', '[NaN]', '[1.0, -5]', '[true]', '[Infinity]'):
        path.write_text('{"id": "b"}\n{"id": "a", "onset_times_s": %s}' % times)
        with pytest.raises(ValueError) as error:
            score_inputs.references(str(path), '', 8.0)
        assert str(error.value).startswith(f'{path}, line 2: onset_times_s is {times}; a list of seconds is needed, each from')
    for start in ('-3', '"x"', 'NaN', 'true'):
        path.write_text('{"id": "a", "start_s": %s}' % start)
        with pytest.raises(ValueError, match=f'test.jsonl, line 1: start_s is {start}; seconds from 0 on are needed'):
            score_inputs.references(str(path), '', 8.0)
    path.write_text(2 * (json.dumps(row) + '\n'))
    with pytest.raises(ValueError, match='two rows have one id'):
        score_inputs.references(str(path), '', 8.0)


@pytest.mark.parametrize('stored, named', [('NFD', 'NFC'), ('NFC', 'NFD')])
def test_clips_pair_however_their_letters_are_composed(tmp_path, stored, named):
    there, asked = (unicodedata.normalize(form, 'café') for form in (stored, named))
    folder = _touch(tmp_path / 'a', f'{there}.wav')
    generated = score_inputs.files(folder, ('.wav',))
    references = score_inputs.files(_touch(tmp_path / 'b', f'{asked}.wav'), ('.wav',))
    assert score_inputs.pair(generated, set(references), False, folder).names == ('café',)
    (folder / 'test.jsonl').write_text(json.dumps({'id': asked, 'audio': f'{asked}.wav', 'caption': 'x'}))
    (folder / 'captions.csv').write_text(f'name,caption\n{there},y\n')
    found = score_inputs.references(str(folder / 'test.jsonl'), str(folder / 'captions.csv'), 8.0)
    assert found.sounds == {'café': folder / f'{there}.wav'} and found.captions == {'café': 'y'}
    found = score_inputs.references(str(folder / 'test.jsonl'), str(folder / 'captions.csv'), 8.0, [there])
    assert list(found.sounds) == [there] and found.captions == {there: 'y'}  # records keep their ids


def test_short_sounds(tmp_path):
    for name, seconds in (('a', 7.99), ('b', 3.0)):
        soundfile.write(tmp_path / f'{name}.flac', np.zeros(round(16_000 * seconds)), 16_000)
    (tmp_path / 'c.flac').write_text('damaged')
    assert score_inputs.short(score_inputs.files(tmp_path, ('.flac',)), 8.0) == {'b': 3.0}
    parts = {str(start): evaluation_media.Part(tmp_path / 'a.flac', start, 5.0) for start in (2.0, 6.0, 9.0)}
    assert score_inputs.short(parts, 5.0) == {'6.0': 1.99}  # from 9 s on nothing is read, which is an error
    broken_media.write_av(tmp_path / 'd.mp4', 0, seconds=2.0, sound_s=1.0)  # the sound counts, not the picture
    broken_media.write_av(tmp_path / 'e.mp4', 0, seconds=1.0, audio='')
    assert list(score_inputs.short(score_inputs.files(tmp_path, ('.mp4',)), 2.0)) == ['d']
