"""Every published layout, a few entries of it: the tables, and what the report says of the rest."""
import concurrent.futures
import json
import pathlib
import re
import time

import pytest

from configs import base
from data_pipelines import clips
from data_pipelines import listing
from tests.layouts_test import write_sound

IDS = [f'{letter * 10}{i}' for i, letter in enumerate('abcdefghij')]  # as YouTube's


class Inline:
    """In the place of worker processes, which take a second to start."""

    def __init__(self, count):
        assert count == 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def in_order(self, function, jobs, ahead, crashed):
        del ahead, crashed
        return ((job, function(job)) for job in jobs)


@pytest.fixture(name='inline', autouse=True)
def fixture_inline(monkeypatch, request):
    if request.function is not test_audiocaps:  # one with real workers
        monkeypatch.setattr(listing.processes, 'Workers', Inline)


def write(path, text=''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make(tmp_path, layout, **changes):
    """Lists tmp_path/source; returns ({split: rows}, report)."""
    config = base.get_config()
    config.sequence.duration_s = 1.0
    config.extract.workers = 1
    config.clips.update(datasets=(('set', layout, str(tmp_path / 'source')),), validation_clips=0, **changes)
    listing.make_tables(config, tmp_path)
    folder = tmp_path / 'media' / 'set'
    tables = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob('*.jsonl')}
    return tables, json.loads((folder / 'clips_report.json').read_text())


def test_vggsound_csv(tmp_path):
    source = tmp_path / 'source'
    write(source / 'data' / 'vggsound.csv', f'{IDS[0]},30,"dog barking, loud",train\n{IDS[1]},7,rain,train\n'
          f'{IDS[2]},0,rain,test\n{IDS[0]},30,again,train\n{IDS[3]},1,gone,train\n{IDS[4]},x,rain,train\n'
          f'{IDS[2]},9,rain,train\n{IDS[5]},3,,train\n')
    for name in (f'{IDS[0]}_000030', f'{IDS[1]}_7', f'{IDS[2]}_000000', f'{IDS[2]}_000009', f'{IDS[5]}_000003', 'unlisted'):
        write(source / 'videos' / f'{name}.mp4')
    tables, report = make(tmp_path, 'vggsound')
    assert [row['id'] for row in tables['train']] == [f'{IDS[0]}_000030', f'{IDS[1]}_000007', f'{IDS[5]}_000003']
    file = f'{source}/videos/{IDS[0]}_000030.mp4'
    assert tables['train'][0] == {'id': f'{IDS[0]}_000030', 'video': file, 'audio': None,
                                  'caption': 'dog barking, loud', 'split': 'train', 'start_s': 0.0,
                                  'label': 'dog barking, loud'}
    assert [row['id'] for row in tables['test']] == [f'{IDS[2]}_000000']
    assert {kind: found for kind, found in report['lists'].items() if found} == {
        'missing_files': [f'{IDS[3]}_000001'], 'duplicate_ids': [f'{IDS[0]}_000030'], 'empty_captions': [f'{IDS[5]}_000003'],
        'unusable_rows': [f"vggsound.csv, line 6: ['{IDS[4]}', 'x', 'rain', 'train']"], 'also_in_test': [f'{IDS[2]}_000009']}
    assert report['listed'] == 7 and report['clips'] == {'train': 3, 'test': 1} and report['unused_files'] == 2


def test_vggsound_lists(tmp_path):
    for part, name in (('train', IDS[0]), ('val', IDS[1]), ('test', IDS[2])):
        write(tmp_path / 'source' / f'vgg3-{part}.tsv', f'id\tlabel\tsource\n{name}_000010\train\tx\n')
        write(tmp_path / 'source' / f'{name}_000010.mp4')
    tables, report = make(tmp_path, 'vggsound')
    found = {split: rows[0]['id'][:11] for split, rows in tables.items()}
    assert found == {'train': IDS[0], 'validation': IDS[1], 'test': IDS[2]}
    assert report['counts']['unknown_columns'] == 3


def test_audiocaps(tmp_path):
    source, header = tmp_path / 'source', 'audiocap_id,youtube_id,start_time,caption\n'
    write(source / 'dataset' / 'train.csv', f'{header}1,{IDS[0]},30,a dog\n2,{IDS[1]},40,a cat\n3,{IDS[2]},5,tested\n')
    write(source / 'dataset' / 'test.csv', f'{header}4,{IDS[3]},0,one\n5,{IDS[3]},0,two\n6,{IDS[4]},0,none\n')
    for name in (f'{IDS[0]}_000030', f'Y{IDS[1]}', '3', f'Y{IDS[3]}'):
        write_sound(source / 'audio' / f'{name}.wav', 2.2)
    write(tmp_path / 'vgg.csv', f'{IDS[2]},5,rain,test\n{IDS[1]},5,rain,train\n')
    tables, report = make(tmp_path, 'audiocaps', exclude=(('set', str(tmp_path / 'vgg.csv')),))
    assert [(row['id'], row['caption']) for row in tables['train']] == [('1_0', 'a dog'), ('1_1', 'a dog'), ('2_0', 'a cat'),
                                                                        ('2_1', 'a cat')]
    assert tables['train'][1]['start_s'] == 1.1 and tables['train'][1]['audio'].endswith(f'{IDS[0]}_000030.wav')
    assert [row['caption'] for row in tables['test']] == ['one', 'one', 'two', 'two'] and tables['test'][0]['video'] is None
    assert report['excluded'] == {str(tmp_path / 'vgg.csv'): 1} and report['lists']['missing_files'] == ['6']


def test_clotho_uses_every_caption_and_every_window(tmp_path):
    source = tmp_path / 'source'
    columns = ','.join(f'caption_{i}' for i in range(1, 6))
    for part, name in (('development', 'Rain & wind.wav'), ('validation', 'b.wav'), ('evaluation', 'c.wav')):
        write(source / f'clotho_captions_{part}.csv', f'file_name,{columns}\n{name},1,2,3,4,5\n')
        write_sound(source / part / name, 2.5 if part == 'development' else 1.3)
    write(source / 'clotho_metadata_validation.csv',
          'file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\nb.wav,x,4711,y,z,u,v\n')
    (source / 'clotho_metadata_development.csv').write_bytes(  # Latin-1, as published
        'file_name,keywords,sound_id,sound_link,start_end_samples,manufacturer,license\nc.wav,x,Not found,y,z,Andrés,v\n'
        .encode('latin-1'))
    write(tmp_path / 'blacklist.json', json.dumps(['4711']))
    tables, report = make(tmp_path, 'clotho', exclude=(('set', str(tmp_path / 'blacklist.json')),))
    rain = tables['train']
    assert [(row['id'], row['caption'], row['start_s']) for row in rain] == [
        ('Rain & wind_0', '1', 0.0), ('Rain & wind_1', '2', 1.4), ('Rain & wind_2', '3', 0.0), ('Rain & wind_3', '4', 1.4),
        ('Rain & wind_4', '5', 0.0)]
    assert len(tables['test']) == 5 and report['excluded_ids'] == {str(tmp_path / 'blacklist.json'): ['b']}


def test_wavcaps_leaves_out_what_the_blacklist_names(tmp_path):
    source = tmp_path / 'source'
    rows = [{'id': f'Y{name}.wav', 'caption': name, 'audio': 'x', 'duration': 10.0} for name in IDS[:4]]
    rows[1]['mood'] = 'good'
    rows.append({'caption': 'no id'})
    write(source / 'json_files' / 'AudioSet_SL' / 'as_final.json', json.dumps({'num_captions_per_audio': 1, 'data': rows}))
    write(tmp_path / 'black.json', json.dumps({'AudioSet': [f'Y{IDS[0]}.wav'], 'FreeSound': []}))
    for name, seconds in ((IDS[0], 2), (IDS[1], 2), (IDS[2], 0.5)):
        write_sound(source / 'AudioSet_SL_flac' / f'Y{name}.flac', seconds)
    tables, report = make(tmp_path, 'audioset_sl', exclude=(('set', str(tmp_path / 'black.json')),))
    assert [row['id'] for row in tables['train']] == [f'Y{IDS[1]}']
    assert report['lists']['missing_files'] == [f'Y{IDS[3]}'] and report['lists']['too_short'] == [
        f'Y{IDS[2]}: 0.50 s, 1.10 s are needed (config.clips.short, or a start_s)']
    assert report['lists']['unknown_columns'] == ['as_final.json: mood']
    assert report['lists']['unusable_rows'] == ["as_final.json, entry 5: no object with an id: {'caption': 'no id'}"]


@pytest.mark.parametrize('text, message', [
    ('{"data": [', 'as_final.json: is no list of WavCaps .*; is it whole'), ('{"data": 3}', 'is no list of WavCaps'),
    ('[]', 'is no list of WavCaps'), ('{"num_captions_per_audio": "x", "data": []}', 'is no list of WavCaps'),
    ('{"data": [3, {"id": null}]}', '2 unusable rows .the first: as_final.json, entry 1: no object with an id: 3')])
def test_what_is_no_list_of_wavcaps_is_named(tmp_path, text, message):
    write(tmp_path / 'source' / 'as_final.json', text)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, 'audioset_sl')


def test_wavcaps_other_sources(tmp_path):
    source = tmp_path / 'source'
    for folder, name, number in (('BBC_Sound_Effects', 'bbc_final', '07'), ('FreeSound', 'fsd_final', 7)):
        rows = [{'id': number, 'caption_1': folder, 'caption_2': 'x'}, {'id': True}]
        write(source / 'json_files' / folder / f'{name}.json', json.dumps({'num_captions_per_audio': 2, 'data': rows}))
        write_sound(source / f'{folder}_flac' / f'{number}.flac', 1.2)
    for layout, folder, file in (('bbc', 'BBC_Sound_Effects', '07.flac'), ('freesound', 'FreeSound', '7.flac')):
        tables, report = make(tmp_path, layout)
        assert [row['caption'] for row in tables['train']] == [folder, 'x']
        assert tables['train'][0]['audio'] == f'{source}/{folder}_flac/{file}'
        assert report['lists']['unusable_rows'][0].endswith("entry 2: no object with an id: {'id': True}")
        (tmp_path / 'media' / 'set' / 'clips_report.json').unlink()


def test_half_characters_of_a_listing_are_replaced(tmp_path):
    write(tmp_path / 'source' / 'a.jsonl', '{"audio_prompt": "rain \\ud83d"}\n')
    write(tmp_path / 'source' / 'a.mp4')
    tables, _ = make(tmp_path, 'moviegen')
    assert tables['test'][0]['caption'] == 'rain \ufffd'


def test_names_that_are_no_text_can_be_extracted(tmp_path):
    write(tmp_path / 'source' / 'rain\udcff.mp4')
    tables, _ = make(tmp_path, 'folder_csv')
    table = clips.read_table(tmp_path / 'media' / 'set' / 'train.jsonl')
    assert tables['train'][0]['id'] == 'rain\ufffd' and table[0].video == tmp_path / 'source' / 'rain\udcff.mp4'


def test_moviegen(tmp_path):
    source = tmp_path / 'source'
    write(source / 'jsonl' / '12.jsonl', '{"audio_prompt": "crunch", "video_prompt": "an apple"}')
    write(source / 'all.jsonl', '{"id": 13, "audio_prompt": "splash", "mood": 1}\nnothing\n')
    for name in ('12', '13'):
        write(source / 'video_with_audio' / f'{name}.mp4')
    tables, report = make(tmp_path, 'moviegen')
    assert sorted((row['id'], row['caption']) for row in tables['test']) == [('12', 'crunch'), ('13', 'splash')]
    assert report['lists']['unknown_columns'] == ['all.jsonl: mood'] and report['counts']['unusable_rows'] == 1


def test_greatest_hits(tmp_path):
    source = tmp_path / 'source'
    write(source / 'train.txt', '2015-01-01\nlost\n')
    write(source / 'test.txt', '2015-02-02\n')
    for name in ('2015-01-01', '2015-02-02'):
        write_sound(source / f'{name}.wav', 2.4).rename(source / f'{name}_denoised.mp4')
    write(source / '2015-01-01_times.txt', '0.25 metal hit static\n0.5 plastic-bag scratch deform\n1.5 None hit None\nbad\n'
          '-1 metal hit static\n')
    write(source / '2015-02-02_times.txt', '')
    tables, report = make(tmp_path, 'greatest_hits')
    first, second = tables['train']
    assert first['caption'] == 'a drumstick hits metal, scratches plastic bag' and first['onset_times_s'] == [0.25, 0.5]
    assert second['caption'] == 'a drumstick touches things' and second['onset_times_s'] == [0.5] and second['start_s'] == 1.0
    assert len(tables['test']) == 2 and report['lists']['missing_files'] == ['lost_times.txt']
    assert report['lists']['unusable_rows'] == ["2015-01-01_times.txt, line 4: 'bad'",
                                                "2015-01-01_times.txt, line 5: '-1 metal hit static'"]


@pytest.mark.parametrize('layout, name, text, video', [
    ('vggsound', 'vggsound.csv', f'{IDS[0]},30,rain,test\n', f'b/{IDS[0]}_000030.mp4'),
    ('moviegen', '1.jsonl', '{"audio_prompt": "rain"}', 'b/1.mp4'), ('greatest_hits', '1_times.txt', '', 'b/1_denoised.mp4'),
    ('folder_csv', 'list.csv', 'video,caption,split\nx,rain,test\n', 'b/x.mp4'),
    ('folder_csv', 'list.csv', 'video,caption,split\nx.mp4,rain,test\n', 'b/x.mp4'),
    ('folder_csv', 'list.csv', 'video,caption,split\nx.avi,rain,test\n', 'b/x.mp4'),
    ('folder_csv', 'list.csv', 'file,caption,split\nx.mp4,rain,test\n', 'b/x.mp4')])
def test_videos_are_found_beside_sounds_of_their_name(tmp_path, layout, name, text, video):
    source = tmp_path / 'source'
    write(source / name, text)
    write(source / 'test.txt', '1')
    sound = write_sound(source / 'a.old' / pathlib.Path(video).with_suffix('.flac').name, 2.0)
    write_sound(source / 'b' / sound.name, 2.0).rename(source / video)
    tables, _ = make(tmp_path, layout)
    assert [row['video'] for row in tables['test'] if row['start_s'] == 0] == [str(source / video)]


@pytest.mark.parametrize('cell, found', [('x.wav', 'b/x.wav'), ('x', 'a/x.flac'), ('rain.1', 'c/rain.1.wav'),
                                         ('c/x.wav', 'c/x.flac')])
def test_the_file_that_a_csv_names_in_full_is_preferred(tmp_path, cell, found):
    """Of those in the folder that it names, if there are any."""
    source = tmp_path / 'source'
    for name in ('a/x.flac', 'b/x.wav', 'c/x.flac', 'c/rain.wav', 'c/rain.1.wav'):
        write(source / name)
    write(source / 'list.csv', f'audio,caption,start_s\n{cell},rain,0\n')
    tables, _ = make(tmp_path, 'folder_csv')
    assert tables['train'][0]['audio'] == str(source / found)


@pytest.mark.parametrize('layout, name, text', [
    ('folder_csv', 'x.csv', 'file,caption,split\nbell.mp4,rain,test\n'), ('folder_csv', 'x.txt', ''),
    ('vggsound', 'vgg-test.tsv', 'id\tlabel\nbell\train\n'), ('moviegen', 'bell.jsonl', '{"audio_prompt": "rain"}')])
def test_hidden_files_are_passed_over(tmp_path, layout, name, text):
    """macOS puts a '._NAME' beside every file of a disk that is not its own."""
    for hidden in ('', '._'):
        write(tmp_path / 'source' / f'{hidden}{name}', 'Mac OS X\n' if hidden else text)
        write(tmp_path / 'source' / f'{hidden}bell.mp4')
    tables, report = make(tmp_path, layout)
    (row,), = tables.values()
    assert row['id'] == 'bell' and not any(report['counts'].values()) and report['unused_files'] == 0


@pytest.mark.parametrize('text, reason', [
    ('file,caption\na.wav,a bell, twice\n', '1 unusable rows .the first: list.csv, line 2: 3 columns, not 2; a cell that'),
    ('file,caption\na.wav,a bell\n', '1 too short .the first: a: 1.00 s, 1.10 s are needed .config.clips.short, or a start_s')])
def test_a_listing_without_a_clip_names_the_first_reason(tmp_path, text, reason):
    write(tmp_path / 'source' / 'list.csv', text)
    write_sound(tmp_path / 'source' / 'a.wav', 1.0)
    with pytest.raises(ValueError, match=f'gives no clip of set; . are listed: {reason}'):
        make(tmp_path, 'folder_csv')


def test_any_folder_with_a_csv(tmp_path):
    source = tmp_path / 'source'
    write(source / 'list.csv', 'file,caption,split,start_s,label,mood\na.mp4,a film,val,,x,1\nsub/b.wav,long,,,y,1\n'
          'sub/b.wav,from there,test,0.5,y,1\nc.wav,,train,,y,1\nd.wav,d,dev,,y,1\nd.wav,d,,soon,y,1\n'
          '\nd.wav,too short\nd.wav,d,,nan,y,1\nd.wav,"two\nlines",,-3,y,1\n,rain,,,y,1\n')
    write(source / 'a.mp4')
    write_sound(source / 'sub' / 'b.wav', 3.4)
    write_sound(source / 'c.wav', 2)
    tables, report = make(tmp_path, 'folder_csv')
    assert tables['validation'][0]['video'] == str(source / 'a.mp4')
    assert tables['test'][0]['start_s'] == 0.5 and tables['test'][0]['label'] == 'y'
    assert 'train' not in tables  # b.wav is tested on, c.wav has no caption
    assert report['lists']['also_in_test'] == ['sub/b'] and report['lists']['empty_captions'] == ['c']
    assert report['lists']['unusable_rows'] == [
        "list.csv, line 6: split is 'dev'; it must be train, validation or test",
        "list.csv, line 7: start_s is 'soon', not a time in seconds from 0 on", 'list.csv, line 9: 2 columns, not 6',
        "list.csv, line 10: start_s is 'nan', not a time in seconds from 0 on",
        "list.csv, line 11: start_s is '-3', not a time in seconds from 0 on",
        'list.csv, line 13: names no file']


def test_rows_of_one_file_with_other_starts_are_clips_of_their_own(tmp_path):
    write(tmp_path / 'source' / 'list.csv', 'file,caption,start_s,id\nsub/b.wav,a,0,\nsub/b.wav,b,1.25,\nsub/b.wav,c,10,\n'
          'sub/b.wav,d,10.0,\nsub/b.wav,e,2,own\n')
    write_sound(tmp_path / 'source' / 'sub' / 'b.wav', 12)
    tables, report = make(tmp_path, 'folder_csv')
    assert [(row['id'], row['start_s']) for row in tables['train']] == [
        ('sub/b_000000', 0.0), ('sub/b_000001.25', 1.25), ('sub/b_000010', 10.0), ('own', 2.0)]
    assert report['lists']['duplicate_ids'] == ['sub/b_000010']


def test_a_folder_whose_names_are_the_captions(tmp_path):
    for name in ('wolf/GrowlLoud-02.wav', 'wolf/wolf_howl.flac', 'wolf/wolf_howl.wav', 'bell.ogg'):
        write_sound(tmp_path / 'source' / name, 0.5)
    tables, report = make(tmp_path, 'folder_csv', short='repeat')
    assert [(row['id'], row['caption'], row['label'], row['fill']) for row in tables['train']] == [
        ('bell', 'bell', 'bell', 'repeat'), ('wolf/GrowlLoud-02', 'wolf growl loud', 'wolf', 'repeat'),
        ('wolf/wolf_howl.flac', 'wolf howl', 'wolf', 'repeat'), ('wolf/wolf_howl.wav', 'wolf howl', 'wolf', 'repeat')]
    assert not any(report['counts'].values())


def test_a_file_that_is_named_as_a_window_of_another_is_renamed(tmp_path):
    for name, seconds in (('heavy', 3.4), ('heavy_1', 1.2), ('heavy_1_0', 1.2), ('heavy_2', 2.4)):
        write_sound(tmp_path / 'source' / 'rain' / f'{name}.wav', seconds)
    tables, report = make(tmp_path, 'folder_csv')
    files = [(row['id'].removeprefix('rain/'), pathlib.Path(row['audio']).stem) for row in tables['train']]
    assert files == [('heavy_0', 'heavy'), ('heavy_1', 'heavy'), ('heavy_2', 'heavy'), ('heavy_1_0', 'heavy_1'),
                     ('heavy_1_0_0', 'heavy_1_0'), ('heavy_2_0', 'heavy_2'), ('heavy_2_1', 'heavy_2')]
    assert report['lists']['renamed_ids'] == ['rain/heavy_1: is rain/heavy_1_0', 'rain/heavy_1_0: is rain/heavy_1_0_0']
    assert len(clips.read_table(tmp_path / 'media' / 'set' / 'train.jsonl')) == 7


def test_a_part_is_held_out_for_validation(tmp_path):
    for i in range(20):
        write_sound(tmp_path / 'source' / f'thing {i:02d}.wav', 1.2)
    config = base.get_config()
    config.sequence.duration_s, config.extract.workers = 1.0, 1
    config.clips.update(datasets=(('set', 'folder_csv', str(tmp_path / 'source')),), validation_clips=5)
    listing.make_tables(config, tmp_path)
    held, trained = ((tmp_path / 'media' / 'set' / f'{split}.jsonl').read_text() for split in ('validation', 'train'))
    assert held.count('\n') == 5 and trained.count('\n') == 15
    before = (tmp_path / 'media' / 'set' / 'clips_report.json').stat().st_mtime_ns
    listing.make_tables(config, tmp_path)
    assert (tmp_path / 'media' / 'set' / 'clips_report.json').stat().st_mtime_ns == before
    config.clips.validation_clips = 4
    with pytest.raises(ValueError, match='made with validation_clips = 5, the configuration says 4'):
        listing.make_tables(config, tmp_path)


def test_processes_that_start_together_list_a_dataset_once(tmp_path, monkeypatch):
    write_sound(tmp_path / 'source' / 'bell.wav', 1.2)
    config = base.get_config()
    config.sequence.duration_s, config.extract.workers = 1.0, 1
    config.clips.datasets = (('set', 'folder_csv', str(tmp_path / 'source')),)
    writes, write_table = [], listing.clips_lib.write_table

    def slow(path, rows):
        writes.append(path.name)
        time.sleep(0.3)
        write_table(path, rows)

    monkeypatch.setattr(listing.clips_lib, 'write_table', slow)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:  # locks of one file in several threads exclude each other, too
        list(threads.map(lambda _: listing.make_tables(config, tmp_path), range(3)))
    assert writes == ['train.jsonl'] and (tmp_path / 'media' / 'set' / 'train.jsonl').is_file()


def test_tables_are_there_while_they_are_written_anew(tmp_path, monkeypatch):
    write(tmp_path / 'source' / 'list.csv', 'file,caption,split\na.mp4,a,train\na.mp4,a,test\n')
    write(tmp_path / 'source' / 'a.mp4')
    folder, write_table = tmp_path / 'media' / 'set', listing.clips_lib.write_table
    write(folder / 'test.jsonl', 'of a run that was killed')
    write(folder / 'train.jsonl', 'of a run that was killed')

    def checked(path, rows):
        assert path.is_file()
        write_table(path, rows)

    monkeypatch.setattr(listing.clips_lib, 'write_table', checked)
    tables, _ = make(tmp_path, 'folder_csv')
    assert list(tables) == ['test'] and tables['test'][0]['id'] == 'a'  # what is tested on is not trained on


@pytest.mark.parametrize('layout, name, text', [
    ('folder_csv', 'list.csv', 'file,caption\n12.wav,a bell\n'), ('vggsound', 'vggsound.csv', f'{IDS[0]},30,bell,train\n'),
    ('audioset_sl', 'as_final.json', '{"data": [{"id": "12", "caption": "bell"}]}'),
    ('moviegen', '12.jsonl', '{"audio_prompt": "bell"}'), ('greatest_hits', '12_times.txt', '0.25 metal hit static')])
def test_a_listing_that_was_changed_is_noticed(tmp_path, layout, name, text):
    source = tmp_path / 'source'
    for media in ('12.wav', '12.mp4', f'{IDS[0]}_000030.mp4'):
        write_sound(source / 'x.wav', 1.2).rename(source / media)
    write(source / 'train.txt', '12')
    write(source / name, text)
    before = make(tmp_path, layout)
    assert str(source / name) in before[1]['made_with']['listings'] and make(tmp_path, layout) == before
    write(source / name, f'{text} ')
    with pytest.raises(ValueError, match=f'{name}: was changed since .*media/set was made of it; delete .*clips_report.json'):
        make(tmp_path, layout)
    source.rename(tmp_path / 'put away')
    assert make(tmp_path, layout) == before


def test_a_csv_whose_header_is_quoted(tmp_path):
    write(tmp_path / 'source' / 'list.csv', '"file","caption"\r\n"a.mp4","a film, silent"\r\n')
    write(tmp_path / 'source' / 'a.mp4')
    tables, report = make(tmp_path, 'folder_csv')
    assert [row['caption'] for row in tables['train']] == ['a film, silent'] and not any(report['counts'].values())


def test_windows_of_one_file_are_not_in_two_splits(tmp_path):
    for i in range(8):
        write_sound(tmp_path / 'source' / f'thing {i}.wav', 3.4)  # three windows
    config = base.get_config()
    config.sequence.duration_s, config.extract.workers = 1.0, 1
    config.clips.update(datasets=(('set', 'folder_csv', str(tmp_path / 'source')),), validation_clips=8)
    listing.make_tables(config, tmp_path)
    held, trained = ([json.loads(line)['audio'] for line in (tmp_path / 'media' / 'set' / f'{split}.jsonl').open()]
                     for split in ('validation', 'train'))
    assert len(held) == 6 and len(trained) == 18 and not set(held) & set(trained)


def test_files_of_one_source_are_not_in_two_splits(tmp_path):
    lines = ['file,caption,source,start_s']
    for i in range(8):
        write_sound(tmp_path / 'source' / f'{i}.wav', 1.2)
        lines.append(f'{i}.wav,thing,recording {i // 2},0')
    (tmp_path / 'source' / 'list.csv').write_text('\n'.join(lines) + '\n')
    config = base.get_config()
    config.sequence.duration_s, config.extract.workers = 1.0, 1
    config.clips.update(datasets=(('set', 'folder_csv', str(tmp_path / 'source')),), validation_clips=3)
    listing.make_tables(config, tmp_path)
    held = [json.loads(line)['id'] for line in (tmp_path / 'media' / 'set' / 'validation.jsonl').open()]
    numbers = sorted(int(re.match(r'\d', name)[0]) for name in held)
    assert len(numbers) == 2 and numbers[0] // 2 == numbers[1] // 2


@pytest.mark.parametrize('field, value', [('datasets', ('set', 'folder_csv', 'x')), ('datasets', (('set', 'folder_csv'),)),
                                          ('exclude', ('set', 'ids.txt'))])
def test_entries_without_their_inner_comma_are_explained(tmp_path, field, value):
    config = base.get_config()
    config.clips[field] = value
    with pytest.raises(ValueError, match=rf"config.clips.{field} is \(.*it must be a tuple of \(record set, .*'\(\(.*\),\)'"):
        listing.make_tables(config, tmp_path)


@pytest.mark.parametrize('field, value', [('datasets', ((1, 'folder_csv', 'x'),)), ('exclude', ((1, 'ids.txt'),))])
def test_names_that_are_no_strings_are_refused(tmp_path, field, value):
    config = base.get_config()
    config.clips[field] = value
    with pytest.raises(ValueError, match=rf'config.clips.{field} is \(.*; the record set 1 must be a string, in quotes'):
        listing.make_tables(config, tmp_path)


def test_a_set_that_is_named_twice_is_refused(tmp_path):
    config = base.get_config()
    config.clips.datasets = (('set', 'folder_csv', 'x'), ('set', 'vggsound', 'y'))
    with pytest.raises(ValueError, match="config.clips.datasets names 'set' 2 times; give every one a name of its own"):
        listing.make_tables(config, tmp_path)


@pytest.mark.parametrize('layout, message', [('vggsound', 'holds neither vggsound.csv nor lists'),
                                             ('audiocaps', 'holds none of train.csv'),
                                             ('clotho', 'holds none of clotho_captions'), ('bbc', 'holds no bbc_final.json'),
                                             ('moviegen', 'holds no .jsonl'), ('greatest_hits', 'holds neither train.txt'),
                                             ('folder_csv', 'gives no clip of set; 0 are listed'),
                                             ('vgg', "'vgg' is no layout; they are vggsound, ")])
def test_what_is_missing_is_named(tmp_path, layout, message):
    (tmp_path / 'source').mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path, layout)
