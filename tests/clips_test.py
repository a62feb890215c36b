"""Clip tables: what is read, what is refused and by which line."""
import dataclasses
import json
import unicodedata

import pytest

from data_pipelines import clips

ROW = {'id': 'a', 'video': 'a.mp4', 'audio': None, 'caption': 'a bell', 'split': 'train'}


def write(path, *rows):
    path.write_text(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows))
    return path


def test_a_table_is_read_and_written_back(tmp_path):
    sound = {**ROW, 'id': 'b', 'video': None, 'audio': 'sounds/b.flac', 'start_s': 8, 'onset_times_s': [0.5]}
    table = clips.read_table(write(tmp_path / 'train.jsonl', ROW, sound))
    assert table[0] == clips.Clip('a', tmp_path / 'a.mp4', None, 'a bell', 'train', 0.0)
    assert table[1].audio == tmp_path / 'sounds/b.flac' and table[1].start_s == 8.0
    digest = clips.digests(tmp_path)
    clips.write_table(tmp_path / 'train.jsonl', map(dataclasses.asdict, table))
    assert clips.read_splits(tmp_path) == {'train': table}
    assert clips.digests(tmp_path) != digest  # the onset times are gone


def test_captions_with_rare_line_ends_are_one_line(tmp_path):
    """Unicode knows more line ends than JSON: captions from the web hold them."""
    captions = ['first\u2028second', 'one\x85two\u2029', 'three\x0b\x1c']
    rows = [{**ROW, 'id': str(i), 'caption': caption} for i, caption in enumerate(captions)]
    clips.write_table(tmp_path / 'train.jsonl', rows)
    assert [clip.caption for clip in clips.read_table(tmp_path / 'train.jsonl')] == captions


@pytest.mark.parametrize('bad, message', [
    ('{"id": ', 'line 2: Expecting value'),
    ('[]', 'line 2: is not a JSON object'),
    ({name: value for name, value in ROW.items() if name != 'caption'}, "line 2: has no 'caption'"),
    ({**ROW, 'id': 7}, "line 2: 'id' is 7, not a string"),
    ({**ROW, 'id': ''}, "line 2: 'id' is empty"),
    (ROW, "line 2: the id 'a' is that of line 1 already"),
    ({**ROW, 'id': 'b', 'video': None}, "line 2: 'video' and 'audio' are both null"),
    ({**ROW, 'id': 'b', 'split': 'test'}, "line 2: 'split' is 'test', but the table is train.jsonl"),
    ('{"id": "b\\ud83d", "video": "b.mp4", "audio": null, "caption": "", "split": "train"}', "line 2: 'id' is 'b.ud83d'"),
    ({**ROW, 'id': 'b', 'caption': 'rain \ud83d'}, "line 2: 'caption' is 'rain .ud83d', which holds half a character"),
    ({**ROW, 'id': 'b', 'start_s': -1}, "line 2: 'start_s' is -1"),
    ({**ROW, 'id': 'b', 'start_s': float('nan')}, "line 2: 'start_s' is nan"),
])
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f'train.jsonl, {message}'):
        clips.read_table(write(tmp_path / 'train.jsonl', ROW, bad))


@pytest.mark.parametrize('stored, named', [('NFD', 'NFC'), ('NFC', 'NFD'), ('NFD', 'NFD')])
def test_files_are_found_however_their_letters_are_composed(tmp_path, stored, named):
    file = tmp_path / unicodedata.normalize(stored, 'über.mp4')
    file.touch()
    row = {**ROW, 'video': unicodedata.normalize(named, 'über.mp4')}
    assert clips.read_table(write(tmp_path / 'train.jsonl', row))[0].video == file


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path):
    rows = [json.dumps({**ROW, 'id': name}) for name in 'ab']
    (tmp_path / 'train.jsonl').write_text(f'\ufeff{rows[0]}\r\n\n{rows[1]}\n \n')
    assert [clip.id for clip in clips.read_table(tmp_path / 'train.jsonl')] == ['a', 'b']


def test_a_table_in_latin_1_is_named(tmp_path):
    text = json.dumps(ROW) + '\n' + json.dumps({**ROW, 'id': 'café'}, ensure_ascii=False)
    (tmp_path / 'train.jsonl').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match='train.jsonl, line 2: is not UTF-8 .*; save the table as UTF-8'):
        clips.read_table(tmp_path / 'train.jsonl')


def test_missing_and_empty_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds none of train.jsonl, validation.jsonl, test.jsonl'):
        clips.read_splits(tmp_path)
    with pytest.raises(FileNotFoundError, match='train.jsonl: no such clip table'):
        clips.read_table(tmp_path / 'train.jsonl')
    with pytest.raises(ValueError, match='train.jsonl: the table is empty'):
        clips.read_table(write(tmp_path / 'train.jsonl'))
