"""Extraction of a small rendered set: what the records hold, what is skipped, refused and resumed."""
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import base
from data_pipelines import clips
from data_pipelines import extract
from data_pipelines import impacts
from data_pipelines import processes
from data_pipelines import reading
from data_pipelines import shards
from mmaudio_jax import codec
from mmaudio_jax import encoders
from mmaudio_jax import input_pipeline
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

ROOT = pathlib.Path(__file__).parents[1]
SEQUENCE = Sequence('16k', 1.0)
TRAIN, TEST, SOUNDS = 7, 2, 3


def make_config(**changes):
    config = base.get_config()
    config.sequence.duration_s = SEQUENCE.duration_s
    config.extract.update(datasets=(('clips', 'media/clips'), ('sounds', 'media/sounds')), encoder='pixels', codec='pca',
                          codec_fit_dataset='clips', batch_size=2, clips_per_shard=3, workers=1, max_rejected=0.5)
    config.extract.update(changes)
    return config


def render(workdir: pathlib.Path) -> None:
    """media/clips with one broken, one silent and one short file in train; media/sounds."""
    rows: dict[str, list[dict]] = {'clips/train': [], 'clips/test': [], 'sounds/train': []}
    for seed in range(TRAIN + TEST + SOUNDS):
        part = 'clips/train' if seed < TRAIN else 'clips/test' if seed < TRAIN + TEST else 'sounds/train'
        folder = workdir / 'media' / part.split('/', maxsplit=1)[0]
        folder.mkdir(parents=True, exist_ok=True)
        sound = part.startswith('sounds')
        name = f'{seed:02d}.{"flac" if sound else "mp4"}'
        impacts.write_clip(impacts.Job(str(folder / name), seed, 1.1, 0 if sound else 64, 25))
        rows[part].append({'id': f'{seed:02d}', 'video': None if sound else name, 'audio': name if sound else None,
                           'caption': '' if seed == 1 else f'thing {seed}', 'split': part.split('/')[1]})
    folder = workdir / 'media' / 'clips'
    (folder / 'broken.mp4').write_bytes((folder / '00.mp4').read_bytes()[:500])
    media.write_audio(folder / 'silent.wav', np.zeros(20_000), 16_000)
    media.write_audio(folder / 'short.wav', np.ones(10_000) / 2, 16_000)
    for place, name in ((1, 'broken.mp4'), (4, 'silent.wav'), (5, 'short.wav')):
        video = name if name.endswith('mp4') else None
        rows['clips/train'].insert(place, {'id': name, 'video': video, 'audio': None if video else name, 'caption': 'no use',
                                           'split': 'train'})
    for part, lines in rows.items():
        path = workdir / 'media' / f'{part}.jsonl'
        path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture(name='workdir', scope='module')
def fixture_workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('extract')
    render(workdir)
    extract.extract(make_config(), workdir)
    return workdir


def load(workdir, name: str, split: str) -> list[dict]:
    source = records.load_source(workdir / 'records' / name, split, records.schema_of(make_config()))
    return [source[i] for i in range(len(source))]


def test_records_are_in_the_order_of_the_table(workdir):
    assert [example['id'] for example in load(workdir, 'clips', 'train')] == [f'{i:02d}' for i in range(TRAIN)]
    assert [example['caption'] for example in load(workdir, 'clips', 'test')] == ['thing 7', 'thing 8']
    examples = load(workdir, 'clips', 'train')
    assert [bool(example['text_exists']) for example in examples] == [True, False] + [True] * 5
    assert all(example['video_exists'] for example in examples)


def test_features_are_those_of_each_clip_alone(workdir):
    """Batches, padding and rejected neighbours change nothing."""
    encoder = encoders.make('pixels', SEQUENCE, store.load)
    pca = codec.make('pca', SEQUENCE, workdir / 'records' / 'codec.npz', store.load)
    request = reading.Request(encoder.frame_requests, 1.0, ((16_000, SEQUENCE.waveform_length),))
    table = {clip.id: clip for clip in clips.read_table(workdir / 'media' / 'clips' / 'train.jsonl')}
    for example in load(workdir, 'clips', 'train'):
        loaded, = reading.load([table[example['id']]], request)
        mean, std = pca.encode(loaded.waveforms[0][None])
        clip, sync = encoder.encode_video(*(stream[None] for stream in loaded.frames))
        expected = {'latent_mean': mean, 'latent_std': std, 'clip_features': clip, 'sync_features': sync,
                    'text_features': encoder.encode_text([table[example['id']].caption])}
        for name, value in expected.items():
            np.testing.assert_allclose(example[name].astype(np.float32), value[0], rtol=1e-3, atol=1e-3)  # float16


def test_encoders_are_given_what_there_is(workdir, monkeypatch):
    """They cut their work into calls of one size; the codec's calls follow the batch, which is filled up."""
    clip, *_ = clips.read_table(workdir / 'media' / 'clips' / 'train.jsonl')
    target = shards.Target(records.schema_of(make_config()), workdir, workdir / 'records' / 'codec.npz')
    extractor, sizes = shards.Extractor(shards.Plan('clips', workdir, (target,), 4, 1, {})), []
    for owner, name in ((encoders.PixelEncoder, 'encode_text'), (encoders.PixelEncoder, 'encode_video'),
                        (codec.PCACodec, 'encode')):
        monkeypatch.setattr(owner, name, lambda self, *args, call=getattr(owner, name): sizes.append(len(args[0])) or
                            call(self, *args))
    loaded, = reading.load([clip], extractor.request)
    extractor.encode([(clip, loaded), (clip, loaded)])
    assert sizes == [1, 2, 4]  # one caption, two videos


def test_sounds_have_no_video(workdir):
    for example in load(workdir, 'sounds', 'train'):
        assert not example['video_exists'] and example['text_exists']
        assert not example['clip_features'].any() and not example['sync_features'].any()
        assert example['latent_mean'].any()


def test_rejected_clips_are_listed_with_their_reason(workdir):
    lines = (workdir / 'records' / 'clips' / 'rejected.jsonl').read_text().splitlines()
    rejected = {row['id']: row['reason'] for row in map(json.loads, lines)}
    assert list(rejected) == ['broken.mp4', 'silent.wav', 'short.wav']
    for name, reason in (('broken.mp4', 'damaged'), ('silent.wav', 'silent (peak'), ('short.wav', 'ends at')):
        assert reason in rejected[name]


def test_a_second_run_does_nothing(workdir, capsys):
    before = {path: path.stat().st_mtime_ns for path in (workdir / 'records').rglob('*')}
    extract.extract(make_config(), workdir)
    assert {path: path.stat().st_mtime_ns for path in (workdir / 'records').rglob('*')} == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and 'nothing to extract' in lines[0]


def test_statistics_can_be_taken(workdir):
    config = make_config()
    config.input.statistics = 'clips'
    mean, std = input_pipeline.latent_statistics(config, workdir / 'records')
    assert mean.shape == std.shape == (20, ) and (std > 0).all()


@pytest.mark.parametrize('changes, field', [({'feature_dtype': 'bfloat16'}, 'feature_dtype'),
                                            ({'codec_fit_dataset': 'sounds'}, 'codec_fit_dataset'),
                                            ({'codec_fit_dataset': ''}, 'codec_fit_dataset'),
                                            ({'datasets': ()}, 'datasets is empty'),
                                            ({'datasets': ('clips', 'media/clips')}, r"extract.datasets is \('clips', 'media.*"
                                             r"""must be .*, also a single one: '\(\("record set", "folder of.*"\),\)'"""),
                                            ({'datasets': ('ab', 'cd')}, 'config.extract.datasets is '),
                                            ({'memmaps': (('clips', 'train'),)}, 'config.extract.memmaps is '),
                                            ({'datasets': ((1, 'media/clips'),)}, 'datasets is .* record set 1 must be a'),
                                            ({'datasets': 2 * (('clips', 'media/clips'),)}, "extract.datasets names 'clips' 2"),
                                            ({'memmaps': (('a', 'train', 'x'), ('a', 'train', 'y'))},
                                             "extract.memmaps names 'a, train' 2 times"),
                                            ({'encoder': 'none'}, 'config.extract.encoder'),
                                            ({'datasets': (('clips', 'media/none'), )}, 'media/none/train.jsonl')])
def test_other_settings_are_refused(workdir, changes, field):
    with pytest.raises((ValueError, FileNotFoundError), match=field):
        extract.extract(make_config(**changes), workdir)


@pytest.mark.parametrize('field, value', [('batch_size', 0), ('clips_per_shard', 0), ('workers', 0), ('ray_actors', 0),
                                          ('process_count', -1), ('max_rejected', float('nan')), ('feature_dtype', 'float32')])
def test_values_that_cannot_be_used_are_named_before_any_work(tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(extract.listing, 'make_tables', lambda *_: pytest.fail('was begun'))
    config = make_config(**{field: value})
    config.clips.datasets = (('clips', 'folder_csv', 'x'),)
    with pytest.raises(ValueError, match=f'config.extract.{field} is .*{value}.*; it must be'):
        extract.extract(config, tmp_path)


def test_other_clips_are_refused(workdir):
    path = workdir / 'media' / 'clips' / 'test.jsonl'
    before = path.read_text()
    try:
        path.write_text(before.splitlines()[0] + '\n')
        with pytest.raises(ValueError, match='records/clips: was made with other clip tables'):
            extract.extract(make_config(), workdir)
    finally:
        path.write_text(before)


def test_a_split_without_usable_clips_is_an_error(tmp_path):
    render_one = {'id': 'a', 'video': None, 'audio': 'a.wav', 'caption': '', 'split': 'train'}
    folder = tmp_path / 'media' / 'clips'
    folder.mkdir(parents=True)
    media.write_audio(folder / 'a.wav', np.sin(np.arange(20_000) / 9), 16_000)
    (folder / 'train.jsonl').write_text(json.dumps(render_one))
    (folder / 'test.jsonl').write_text(json.dumps({**render_one, 'audio': 'none.wav', 'split': 'test'}))
    with pytest.raises(ValueError, match='no clip of clips, split test, can be used; the first: .*none.wav: no such file'):
        extract.extract(make_config(datasets=(('clips', 'media/clips'), )), tmp_path)
    assert not (tmp_path / 'records' / 'clips').exists()


def sounds_workdir(tmp_path, clips: int, broken: int = 0) -> pathlib.Path:
    """media/sounds with noises of their own, of which the first are silent; three captions among them."""
    folder = tmp_path / 'media' / 'sounds'
    folder.mkdir(parents=True)
    rows = []
    for i in range(clips):
        noise = np.random.default_rng(i).standard_normal(18_000) * np.linspace(0, 0.1, 18_000) * (i >= broken)
        media.write_audio(folder / f'{i}.wav', noise, 16_000)
        rows.append({'id': f'{i}', 'video': None, 'audio': f'{i}.wav', 'caption': f'thing {i % 3}', 'split': 'train',
                     'label': f'{i % 2}'})
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path


def test_a_codec_that_has_nothing_to_be_fitted_to_names_the_reason(tmp_path, capsys):
    table = sounds_workdir(tmp_path, 4) / 'media' / 'sounds' / 'train.jsonl'
    text = table.read_text()
    table.write_text(text.replace('.wav', '.flac'))
    with pytest.raises(ValueError, match='^4 of the 4 clips of sounds that the pca codec is fitted to were rejected; the first:'
                                         r' .*sounds/0.flac: no such file\. 0 frames are too few'):
        extract.extract(sounds_config(), tmp_path)
    table.write_text(text.replace('"0.wav', '"0.flac'))
    extract.extract(sounds_config(), tmp_path)
    assert 'extract: 1 of the 4 clips of sounds that the pca codec is fitted to were rejected' in capsys.readouterr().out


def sounds_config(**changes):
    return make_config(datasets=(('sounds', 'media/sounds'),), codec_fit_dataset='sounds', **changes)


def test_a_split_without_usable_clips_costs_no_shard_of_the_others(tmp_path):
    sounds_workdir(tmp_path, 5)
    folder, partials = tmp_path / 'media' / 'sounds', [tmp_path / part / 'records' / '.sounds.partial' for part in ('', '44k')]
    row = {'id': 'a', 'video': None, 'audio': 'a.wav', 'caption': '', 'split': 'test'}
    (folder / 'test.jsonl').write_text(json.dumps(row))
    media.write_audio(folder / 'a.wav', np.ones(200) / 2, 16_000)
    config = sounds_config(rates=('16k', '44k'))
    with pytest.raises(ValueError, match='no clip of sounds, split test, can be used; the first: .*a.wav: the sound ends'):
        extract.extract(config, tmp_path)
    before = {path: path.stat().st_ino for partial in partials for path in partial.glob('sounds-*')}
    assert sorted(path.name for path in before) == sorted(2 * [f'sounds-train.array_record-0000{i}-of-00002' for i in (0, 1)])
    media.write_audio(folder / 'a.wav', np.sin(np.arange(20_000) / 9), 16_000)
    extract.extract(config, tmp_path)
    assert all(path.parents[1].joinpath('sounds', path.name).stat().st_ino == inode for path, inode in before.items())
    assert len(load(tmp_path, 'sounds', 'test')) == 1


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a set but its picture, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != '.png'}


def test_a_second_set_is_extracted_with_the_codec_of_the_first(tmp_path):
    """A folder has one codec: it serves sets that are extracted later, and is not fitted anew while a set needs it."""
    extract.extract(sounds_config(), sounds_workdir(tmp_path, 4))
    shutil.copytree(tmp_path / 'media' / 'sounds', tmp_path / 'media' / 'other')
    table = tmp_path / 'media' / 'other' / 'train.jsonl'
    table.write_text(table.read_text().replace('thing', 'other'))
    before = (tmp_path / 'records' / 'codec.npz').read_bytes()
    other = (('other', 'media/other'),)
    with pytest.raises(ValueError, match=r"records/sounds: .* fitted to 'sounds' .*codec.npz to 'other' .*codec_fit_dataset"):
        extract.extract(make_config(datasets=other, codec_fit_dataset='other'), tmp_path)
    assert (tmp_path / 'records' / 'codec.npz').read_bytes() == before
    extract.extract(make_config(datasets=other, codec_fit_dataset='sounds'), tmp_path)
    made = [records.read_metadata(tmp_path / 'records' / name)['made_with']['codec_fitted_to'] for name in ('sounds', 'other')]
    assert made[0] == made[1] and (tmp_path / 'records' / 'codec.npz').read_bytes() == before
    with pytest.raises(ValueError, match="codec_fit_dataset is 'clips', .*datasets: other; nor was .*codec.npz fitted to it"):
        extract.extract(make_config(datasets=other), tmp_path)


def test_two_rates_are_made_in_one_pass(tmp_path, monkeypatch):
    sounds_workdir(tmp_path, 5)
    calls = []
    monkeypatch.setattr(extract.shards_lib, 'loaded_clips', lambda *args, load=extract.shards_lib.loaded_clips:
                        calls.append(args) or load(*args))
    extract.extract(sounds_config(rates=('16k', '44k')), tmp_path)
    assert len(calls) == 3  # a fit for each codec, and one pass for both sets
    alone = tmp_path / 'alone'
    alone.mkdir()
    (alone / 'media').symlink_to(tmp_path / 'media')
    config = sounds_config()
    config.sequence.rate = '44k'
    extract.extract(config, alone)
    assert (tmp_path / '44k' / 'media' / 'sounds' / 'train.jsonl').is_file()  # where its evaluation looks
    ours, expected = contents(tmp_path / '44k' / 'records' / 'sounds'), contents(alone / 'records' / 'sounds')
    assert ours == expected and 'sounds-train.array_record-00001-of-00002' in ours
    assert len(records.load_source(tmp_path / 'records' / 'sounds', 'train', records.schema_of(sounds_config()))) == 5


def test_processes_share_the_shards_and_the_last_makes_the_set(tmp_path, capsys):
    sounds_workdir(tmp_path, 10)
    extract.extract(sounds_config(), tmp_path)
    expected = contents(tmp_path / 'records' / 'sounds')
    (tmp_path / 'records' / 'sounds').rename(tmp_path / 'one')
    extract.extract(sounds_config(process_index=1, process_count=2), tmp_path)
    assert 'process 1 of 2 made its shards' in capsys.readouterr().out
    partial = tmp_path / 'records' / '.sounds.partial'
    assert sorted(path.name for path in partial.glob('sounds-*')) == [
        f'sounds-train.array_record-0000{i}-of-00004' for i in (1, 3)]
    extract.extract(sounds_config(process_index=0, process_count=2), tmp_path)
    assert contents(tmp_path / 'records' / 'sounds') == expected and not partial.exists()
    with pytest.raises(ValueError, match='process_index is 2; of 2 processes it must be one of 0 to 1'):
        extract.extract(sounds_config(process_index=2, process_count=2, clips_per_shard=2), sounds_workdir(tmp_path / 'b', 2))
    with pytest.raises(ValueError, match='config.extract.process_count is 0; set it'):
        extract.extract(sounds_config(process_index=2, clips_per_shard=2), tmp_path / 'b')


def test_ray_that_is_not_installed_is_said(tmp_path, monkeypatch):
    sounds_workdir(tmp_path, 2)
    monkeypatch.setitem(sys.modules, 'ray', None)
    monkeypatch.delitem(sys.modules, 'data_pipelines.ray_executor', raising=False)
    with pytest.raises(ValueError, match=r"executor is 'ray', but ray is not installed; pip install -e '\.\[ray\]'"):
        extract.extract(sounds_config(executor='ray'), tmp_path)


@pytest.mark.slow
def test_two_processes_with_the_same_shards_do_not_disturb_each_other(tmp_path):
    sounds_workdir(tmp_path, 10)
    extract.extract(sounds_config(), tmp_path)
    expected = contents(tmp_path / 'records' / 'sounds')
    shutil.rmtree(tmp_path / 'records')
    code = ('import pathlib, sys; from data_pipelines import extract; from tests.extract_test import sounds_config\n'
            "if __name__ == '__main__': extract.extract(sounds_config(), pathlib.Path(sys.argv[1]))")
    (tmp_path / 'run.py').write_text(code)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    runs = [subprocess.Popen([sys.executable, tmp_path / 'run.py', tmp_path], env=environment, stdout=subprocess.DEVNULL)
            for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert contents(tmp_path / 'records' / 'sounds') == expected


@pytest.mark.parametrize('changes, message', [
    ({'clips_per_shard': 2}, r'sounds\.partial: another process is extracting sounds there, with other settings or clips;'),
    ({'duration_s': 0.8}, 'records: another process is extracting sounds there, with a codec that was fitted to')])
def test_another_extraction_deletes_nothing_while_one_runs(tmp_path, monkeypatch, changes, message):
    sounds_workdir(tmp_path, 4)
    other = sounds_config(**{name: value for name, value in changes.items() if name != 'duration_s'})
    other.sequence.duration_s = changes.get('duration_s', 1.0)
    extract_here = extract._extract_here

    def with_another(*args):
        monkeypatch.setattr(extract, '_extract_here', extract_here)
        before = (tmp_path / 'records' / 'codec.npz').read_bytes()
        with pytest.raises(ValueError, match=message):
            extract.extract(other, tmp_path)
        assert (tmp_path / 'records' / 'codec.npz').read_bytes() == before
        extract_here(*args)

    monkeypatch.setattr(extract, '_extract_here', with_another)
    extract.extract(sounds_config(), tmp_path)
    assert len(load(tmp_path, 'sounds', 'train')) == 4 and not list((tmp_path / 'records').glob('.*'))


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(processes.fcntl, 'flock', no_lock)
    extract.extract(sounds_config(), sounds_workdir(tmp_path, 4))
    assert len(load(tmp_path, 'sounds', 'train')) == 4 and not list((tmp_path / 'records').glob('.*'))


def test_shards_of_other_settings_that_nobody_works_at_are_deleted(tmp_path, capsys):
    sounds_workdir(tmp_path, 4)
    extract.extract(sounds_config(process_index=1, process_count=2), tmp_path)
    extract.extract(sounds_config(clips_per_shard=2), tmp_path)
    assert 'unfinished shards of other settings or clips are deleted' in capsys.readouterr().out
    assert len(load(tmp_path, 'sounds', 'train')) == 4


def test_files_are_utf_8_in_every_locale(tmp_path, monkeypatch):
    sounds_workdir(tmp_path, 4)
    (tmp_path / 'media' / 'sounds').rename(tmp_path / 'media' / 'wälder')
    table = tmp_path / 'media' / 'wälder' / 'train.jsonl'
    table.write_text(table.read_text(encoding='utf-8').replace('thing', 'bär'), encoding='utf-8')
    monkeypatch.setattr('io.text_encoding', lambda encoding, *_: encoding or 'ascii')  # what pathlib asks
    config = make_config(datasets=(('wälder', 'media/wälder'),), codec_fit_dataset='wälder')
    config.extract.update(process_index=1, process_count=2)
    extract.extract(config, tmp_path)
    config.extract.process_index = 0
    extract.extract(config, tmp_path)
    lines = (tmp_path / 'records' / 'wälder' / 'clips.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(line)['caption'] for line in lines] == ['bär 0', 'bär 1', 'bär 2', 'bär 0']


def test_captions_are_encoded_once(tmp_path, monkeypatch):
    sounds_workdir(tmp_path, 9)
    texts = []
    monkeypatch.setattr(encoders.PixelEncoder, 'encode_text', lambda self, captions, encode=encoders.PixelEncoder.encode_text:
                        texts.append(tuple(captions)) or encode(self, captions))
    extract.extract(sounds_config(), tmp_path)
    assert texts == [('thing 0', 'thing 1'), ('thing 2',)]  # batches of two; the shards have three clips


@pytest.mark.parametrize('broken, stops', [(20, False), (30, True)])
def test_too_many_rejected_clips_stop_the_job(tmp_path, broken, stops):
    sounds_workdir(tmp_path, 100, broken)
    config = sounds_config(max_rejected=0.25, clips_per_shard=50, batch_size=16)
    if stops:
        with pytest.raises(ValueError, match=r'sounds: 30 rejected .30 silent .peak #.. of 100 clips, more than '
                                             r'config.extract.max_rejected = 0.25 allows'):
            extract.extract(config, tmp_path)
    else:
        extract.extract(config, tmp_path)
        assert len((tmp_path / 'records' / 'sounds' / 'rejected.jsonl').read_text().splitlines()) == 20


def test_a_full_disk_stops_the_job_and_loses_no_finished_shard(tmp_path, monkeypatch):
    sounds_workdir(tmp_path, 9)
    commit, written = records.ShardWriter.commit, []

    def full(self):
        if len(written) == 1:
            raise OSError(28, 'No space left on device')
        written.append(self)
        commit(self)

    with monkeypatch.context() as patch:
        patch.setattr(records.ShardWriter, 'commit', full)
        with pytest.raises(OSError, match='No space left'):
            extract.extract(sounds_config(), tmp_path)
    partial = tmp_path / 'records' / '.sounds.partial'
    name = 'sounds-train.array_record-00000-of-00003'
    assert [path.name for path in partial.iterdir() if 'array_record' in path.name] == [name]
    before = (partial / name).stat().st_ino
    extract.extract(sounds_config(), tmp_path)
    assert (tmp_path / 'records' / 'sounds' / name).stat().st_ino == before


def test_balanced_sampling_reads_the_labels(tmp_path):
    sounds_workdir(tmp_path, 9)
    config = sounds_config()
    extract.extract(config, tmp_path)
    config.input.update(mixture=(('sounds', 2),), balance=(('sounds', 1.0),), batch_size=16, workers=0)
    mesh = partitioning.make_mesh({'data': -1})
    iterator = input_pipeline.train_iterator(config, tmp_path / 'records', mesh)
    assert next(iterator)['latent_mean'].shape[0] == 16 and iterator.get_state()['balance'] == [['sounds', 1.0]]
    iterator.close()


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes_and_reject_what_is_broken(tmp_path):
    """The fault run at a smaller size; at full size: tests/benchmarks/extract_faults.py."""
    command = [sys.executable, '-m', 'tests.benchmarks.extract_faults', f'--folder={tmp_path / "run"}', '--clips=80',
               '--broken=2', '--kills=3', '--fulls=0']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report['kills'] == 3 and report['rejected'] == 20 and not report['different_files']
