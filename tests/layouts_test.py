"""What all layouts share: media by name, listings, id lists, windows."""
import json
import re
import unicodedata

import numpy as np
import pytest
import soundfile

from configs import base
from data_pipelines import layouts
from data_pipelines import vggsound
from mmaudio_jax import generate_jobs
from mmaudio_jax import media


def write_sound(path, seconds: float = 1.0, rate: int = 8_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(round(seconds * rate)) / 5), rate)
    return path


def test_media_are_found_by_name_and_folder(tmp_path):
    for name in ('a/x.wav', 'b/x.flac', 'b/y.mp4', 'b/y.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = layouts.Media(tmp_path)
    assert found.count == 3 and found.find('x') == tmp_path / 'a/x.wav'
    assert found.find('x', within='B') == tmp_path / 'b/x.flac' and found.find('nothing', 'y') == tmp_path / 'b/y.mp4'
    assert found.find('z') is None


def test_folders_that_are_linked_again_are_read_once(tmp_path):
    """Else links to folders above go round until the system's limit."""
    file, outside = write_sound(tmp_path / 'set' / 'v2' / 'x.wav'), write_sound(tmp_path / 'elsewhere' / 'y.wav')
    write_sound(tmp_path / 'beside.wav')
    links = {'set/latest': '.', 'set/v3': 'v2', 'set/v2/data': '..', 'set/up': '..', 'set/z': '../elsewhere', 'set/a': 'v2'}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    assert list(layouts.Media(tmp_path / 'set')) == [file, tmp_path / 'set' / 'z' / outside.name]


@pytest.mark.parametrize('stored, asked', [('NFD', 'NFC'), ('NFC', 'NFD')])
def test_media_are_found_however_their_letters_are_composed(tmp_path, stored, asked):
    folder, name = (unicodedata.normalize(stored, word) for word in ('Wälder', 'café'))
    file = write_sound(tmp_path / folder / f'{name}.wav')
    write_sound(tmp_path / 'a' / f'{name}.wav')
    found = layouts.Media(tmp_path).find(unicodedata.normalize(asked, 'café'), within=unicodedata.normalize(asked, 'Wälder'))
    assert found == file and layouts.source_of(f'{name}.wav') == 'café'


def test_what_counts_as_a_video_does_so_everywhere(tmp_path):
    for name in ('x.M2TS', 'y.asf'):
        (tmp_path / name).touch()
    config = base.get_config()
    config.generate.input = str(tmp_path)
    assert layouts.Media(tmp_path).count == 2 == len(generate_jobs.jobs(config.generate, config.sampling))


def test_a_csv_is_read_and_what_is_odd_is_listed(tmp_path):
    path = tmp_path / 'list.csv'
    path.write_text('\ufeffid,caption,mood\n1,"a bell, twice",good\n2,short\n\n3,drum,bad\n4,a drum, too,bad\n')
    report = layouts.Report()
    rows = layouts.read_csv(path, report, ('id', 'caption'))
    assert [(line, row['caption']) for line, row in rows] == [(2, 'a bell, twice'), (5, 'drum')]
    assert report.lists['unknown_columns'] == ['list.csv: mood']
    assert report.lists['unusable_rows'] == [
        'list.csv, line 3: 2 columns, not 3',
        'list.csv, line 6: 4 columns, not 3; a cell that holds what parts the columns needs quotes']
    assert report.summary() == '1 unknown columns, 2 unusable rows'
    assert report.summary(with_first=True) == ('1 unknown columns (the first: list.csv: mood), 2 unusable rows (the first: '
                                               'list.csv, line 3: 2 columns, not 3)')
    with pytest.raises(ValueError, match="list.csv: has no column 'text'; its first line is"):
        list(layouts.read_csv(path, report, ('text', 'id')))


@pytest.mark.parametrize('text, error', [
    ('id,caption\n1,"two\nlines"\n2,"not closed\n3,drum\n', 'unexpected end of data'),
    ('id,caption\n1,"two\nlines"\n2,"closed" too early\n', "',' expected after '\"'"),
    ('id,caption\n1,"two\nlines"\n2,"' + 50_000 * '3,"drum"\n', "',' expected after '\"'"),
    ('id,caption\n1,"two\nlines"\n2,"' + 50_000 * '3,drum\n', 'field larger than field limit')])
def test_quotes_that_swallow_rows_are_refused_with_their_line(tmp_path, text, error):
    for name in ('list.csv', 'vggsound.csv'):
        (tmp_path / name).write_text(text)
        message = re.escape(f'{name}, line 4: the row that starts there cannot be read ({error}')
        with pytest.raises(ValueError, match=message):
            list(layouts.read_csv(tmp_path / name, layouts.Report(), ('id', 'caption')))
        with pytest.raises(ValueError, match=message):
            layouts.read_ids(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        list(vggsound.read(tmp_path, layouts.Media(tmp_path), layouts.Report()))


def test_listings_are_utf_8_or_latin_1(tmp_path):
    """Clotho 2.1's metadata are Latin-1."""
    path = tmp_path / 'clotho_metadata_evaluation.csv'
    for encoding in ('utf-8', 'utf-8-sig', 'latin-1'):
        path.write_bytes('file_name,manufacturer,sound_id\nx.wav,Andrés,4711\n'.encode(encoding))
        (_, row), = layouts.read_csv(path, layouts.Report(), ('file_name', 'sound_id'), ('manufacturer',))
        assert row == {'file_name': 'x.wav', 'manufacturer': 'Andrés', 'sound_id': '4711'}
        assert layouts.read_ids(path) == {'4711'}


@pytest.mark.parametrize('name, text, expected', [
    ('vggsound.csv', 'aaaaaaaaaa1,30,rain,test\naaaaaaaaaa2,40,rain,train\n', {'aaaaaaaaaa1'}),
    ('test.csv', 'audiocap_id,youtube_id,start_time,caption\n7,aaaaaaaaaa1,30,rain\n', {'aaaaaaaaaa1'}),
    ('clotho_metadata_evaluation.csv', 'file_name,keywords,sound_id\nx.wav,rain,4711\n', {'4711'}),
    ('vgg3-test.tsv', 'id\tlabel\naaaaaaaaaa1_000030\train\n', {'aaaaaaaaaa1'}),
    ('ids.txt', 'Yaaaaaaaaaa1.wav\n\n4711\n', {'aaaaaaaaaa1', '4711'}),
    ('blacklist.json', json.dumps({'AudioSet': ['Yaaaaaaaaaa1.wav'], 'FreeSound': ['4711']}), {'aaaaaaaaaa1'}),
    ('list.json', json.dumps(['x.y.wav']), {'x.y'}),
])
def test_id_lists(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert layouts.read_ids(tmp_path / name, 'AudioSet') == expected


@pytest.mark.parametrize('name, text', [
    ('list.csv', 'ytid,start,end,labels\naaaaaaaaaa1,30,40,rain\n'), ('vggsound.csv', 'aaaaaaaaaa1,30,rain,train\n'),
    ('list.csv', 'id,label\n,rain\n'), ('ids.txt', '\n'), ('list.json', '[]')])
def test_an_id_list_without_an_id_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f'{name}: holds no id; a csv or tsv needs one of the columns source, .*, or those of '
                                         'vggsound.csv without a header, .* config.clips.exclude'):
        layouts.read_ids(tmp_path / name)


def test_bad_id_lists_are_named(tmp_path):
    (tmp_path / 'list.json').write_text('{"AudioSet": []}')
    with pytest.raises(ValueError, match="list.json: has no list 'FreeSound'; it has AudioSet"):
        layouts.read_ids(tmp_path / 'list.json', 'FreeSound')
    for text, error in (('{"FreeSound": ["a"', r'is no JSON \(.*\); is it whole\?'),
                        ('{"FreeSound": 3}', 'is no list of ids, but 3; correct it'), ('[["a"]]', 'is no list of ids, but .*a'),
                        ('null', 'is no list of ids, but None')):
        (tmp_path / 'list.json').write_text(text)
        with pytest.raises(ValueError, match=f'list.json: {error}'):
            layouts.read_ids(tmp_path / 'list.json', 'FreeSound')
    with pytest.raises(FileNotFoundError, match='none.txt: no such id list'):
        layouts.read_ids(tmp_path / 'none.txt')


@pytest.mark.parametrize('seconds, expected', [
    (8.0, []), (8.1, [0.0]), (16.1, [0.0]), (16.2, [0.0, 8.1]), (25.0, [0.0, 8.45, 16.9]),
    (100.0, [0.0, 22.975, 45.95, 68.925, 91.9]), (10_800.0, [0.0, 2697.975, 5395.95, 8093.925, 10791.9])])
def test_windows_are_spread_evenly(seconds, expected):
    assert layouts.window_starts(round(seconds * 44_100), 44_100, 8.0, 'spread') == pytest.approx(expected, abs=4 / 44_100)


def test_windows_lie_on_the_samples_of_the_official_partition():
    """Starts for 20.123 s at 48 kHz: segments of int(48000 · 8.1) samples, (total - segment) // (count - 1) apart."""
    samples = 965_904
    starts = lambda samples, rate: [round(start * rate, 6) for start in layouts.window_starts(samples, rate, 8.0, 'spread')]
    assert starts(samples, 48_000) == [0, 577_104]
    assert starts(700_001, 22_050) == [0, 260_698, 521_396]


def test_clips_one_after_the_other():
    assert layouts.window_starts(44_100 * 25, 44_100, 8.0, 'all') == [0.0, 8.0, 16.0]


def test_the_length_of_a_sound(tmp_path):
    assert layouts.length_s(write_sound(tmp_path / 'a.flac', 1.5)) == (12_000, 8_000)
    (tmp_path / 'b.wav').write_bytes(b'nothing')
    assert layouts.length_s(tmp_path / 'b.wav') == f'{tmp_path}/b.wav: not a media file, or damaged or cut off'
    content = write_sound(tmp_path / 'c.wav', 1.5).read_bytes()
    place = content.index(b'data') + 4
    (tmp_path / 'c.wav').write_bytes(content[:4] + bytes(4) + content[8:place] + bytes(4) + content[place + 4:])  # a pipe's
    assert layouts.length_s(tmp_path / 'c.wav') == (12_000, 8_000)


def test_the_length_of_a_video_is_that_of_its_sound_or_of_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(media, 'probe', lambda path: media.MediaInfo(10.0, 5.0, 8_000))
    assert layouts.length_s(tmp_path / 'v.mp4') == (40_000, 8_000)
    assert layouts.length_s(tmp_path / 'v.mp4', of_sound=False) == (80_000, 8_000)
    monkeypatch.setattr(media, 'probe', lambda path: media.MediaInfo(10.0, 0.0, 0))
    assert layouts.length_s(tmp_path / 'v.mp4') == f'{tmp_path}/v.mp4: holds no sound'
