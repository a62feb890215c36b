"""The sounds of a split: made once, resumed, never of another network; and scored against the media of its records."""
import json
import shutil

import numpy as np
import pytest
import soundfile

from configs import base
from mmaudio_jax import checkpoints
from mmaudio_jax import embeddings
from mmaudio_jax import evaluate
from mmaudio_jax import records
from mmaudio_jax import score
from mmaudio_jax import score_inputs
from mmaudio_jax import split_sounds
from mmaudio_jax.sequence import Sequence
from tests import scored_folders
from tests import trained_run

NAMES = [f'clip_{index}' for index in range(trained_run.CLIPS)]


@pytest.fixture(name='trained', scope='module')
def fixture_trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        workdir = tmp_path_factory.mktemp('run')
        trained_run.make(workdir, with_split=True)
        yield workdir


def _config(**changes):
    config = trained_run.make_config()
    config.score.update(sample=True, protocol='impacts', duration_s=trained_run.DURATION_S, sheets=1)
    config.score.update(changes)
    return config


def _scored(workdir, config):
    evaluate.evaluate(config, workdir)
    return json.loads((workdir / 'scores.json').read_text())


def test_missing_weights_of_the_metrics_are_said_before_sampling(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(split_sounds, 'write', lambda *_: pytest.fail('hours of sampling'))
    config = _config(metrics=('onset_f1', 'is_panns'), weights=str(tmp_path))
    with pytest.raises(FileNotFoundError, match='the published weights of panns are missing'):
        evaluate.evaluate(config, trained)


def test_made_once_and_resumed(trained, capsys):
    made = split_sounds.write(_config(), trained)
    folder = made['clip_0'].parent
    assert list(made) == NAMES and sorted(path.stem for path in folder.glob('*.flac')) == NAMES
    sounds = {name: soundfile.read(folder / f'{name}.flac')[0] for name in NAMES}
    assert all(len(sound) == 16_000 and sound.std() > 0 for sound in sounds.values())
    assert json.loads((folder / 'settings.json').read_text())['step'] == trained_run.STEP
    (folder / 'clip_3.flac').unlink()
    assert split_sounds.write(_config(), trained) == made
    np.testing.assert_array_equal(soundfile.read(folder / 'clip_3.flac')[0], sounds['clip_3'])
    capsys.readouterr()
    split_sounds.write(_config(), trained)
    assert '5 sounds, 0 of them new' in capsys.readouterr().out
    other = _config()
    other.sampling.guidance = 3.0
    other.evaluate.max_clips = 2
    others = split_sounds.write(other, trained)
    assert others['clip_0'].parent != folder and list(others) == NAMES[:2]
    assert np.abs(soundfile.read(others['clip_0'])[0] - sounds['clip_0']).max() > 1e-3


def test_sounds_of_other_data_or_weights_are_others(trained, tmp_path):
    config, run = _config(), tmp_path / 'run'
    config.evaluate.max_clips, config.data_dir = 2, str(tmp_path / 'moved')
    shutil.copytree(trained / 'ema', run / 'ema')
    shutil.copytree(trained / 'records', tmp_path / 'moved' / 'records')
    folder = split_sounds.write(config, run)['clip_0'].parent
    assert folder.name == split_sounds.write(_config(), trained)['clip_0'].parent.name  # the place does not count
    folders = [folder]
    metadata = tmp_path / 'moved' / 'records' / 'impacts' / 'metadata.json'
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), 'made_with': {'tables': {'test': 'of other clips'}}}))
    folders.append(split_sounds.write(config, run)['clip_0'].parent)
    trained_run.write_codec(tmp_path / 'moved', config, seed=2)
    with pytest.raises(checkpoints.CheckpointError, match='codec.npz: is not the codec of the network in .*fitted again since'):
        split_sounds.write(config, run)
    for seed in (0, 1):
        shutil.rmtree(run / 'ema')
        trained_run.write_weights(run, config, seed=seed)
        folders.append(split_sounds.write(config, run)['clip_0'].parent)
    assert len(set(folders)) == 4


def test_sounds_of_another_vocoder_or_encoder_are_others(trained, tmp_path):
    config = _config()
    config.weights.update(folder=str(tmp_path), cache=str(tmp_path / 'cache'), verify=False)
    parts = split_sounds._network(config, trained, Sequence(**config.sequence))
    parts.config['extract'].update(encoder='official', codec='official')
    config.extract.encoder, config.sampling.negative_prompt = 'official', 'music'
    names = [split_sounds._folder(config, trained, trained, parts).name]
    for name in ('best_netG.pt', 'open_clip_pytorch_model.bin', 'v1-44.pth'):  # the last is of the other rate
        (tmp_path / name).write_bytes(b'mine')
        names.append(split_sounds._folder(config, trained, trained, parts).name)
    (tmp_path / 'best_netG.pt').write_bytes(b'another')
    names.append(split_sounds._folder(config, trained, trained, parts).name)
    assert len(set(names)) == 4 and names[2] == names[3]


def test_a_split_is_scored_against_its_own_media(trained, capsys):
    report = _scored(trained, _config())
    row = report['systems']['impacts']
    assert (report['asked'], row['paired'], row['missing'], row['short']) == (5, 5, [], {})
    score = row['scores']['onset_f1']
    assert score['clips'] == 4 and '1 clips without a true onset are left out' in score['note']
    assert 'impacts, onset F1: over 4 of 5 clips' in capsys.readouterr().out
    assert (trained / 'scores' / 'clip_0.png').is_file()


def test_its_videos_are_references_too(trained, tmp_path, monkeypatch):
    scored_folders.use(monkeypatch)
    metrics = ('fd_vgg', 'kl_panns', 'desync')
    weights = str(scored_folders.write_weights(tmp_path))
    config = _config(protocol='vggsound', metrics=metrics, weights=weights)
    config.evaluate.max_clips = 4
    scores = _scored(trained, config)['systems']['impacts']['scores']
    assert {name: scores[name].get('clips') for name in metrics} == dict.fromkeys(metrics, 4)


def test_beside_other_systems_and_a_folder_against_the_records(trained, tmp_path):
    made = split_sounds.write(_config(), trained)
    (tmp_path / 'theirs').mkdir()
    for name in NAMES:
        sound, rate = soundfile.read(made[name])
        soundfile.write(tmp_path / 'theirs' / f'{name}.wav', sound, rate)
    report = _scored(trained, _config(compare=f'theirs={tmp_path / "theirs"}'))
    assert list(report['systems']) == ['impacts', 'theirs']
    assert abs(report['differences']['theirs − impacts']['onset_f1']['value']) < 1e-9
    (tmp_path / 'theirs' / 'clip_1.wav').unlink()
    config = _config(sample=False, generated=str(tmp_path / 'theirs'), references='records')
    with pytest.raises(ValueError, match=r'1 missing \(clip_1\) of 5 clips asked for'):
        evaluate.evaluate(config, trained)


def test_sync_features_of_records_serve_again(tmp_path):
    """For DeSync: eight tokens a segment, in order; clips without pictures have none."""
    config = base.get_config()
    schema = records.schema_of(config)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in schema.shapes.items()}
    texts = {'caption': '', 'duration_s': 8.0, 'text_exists': False}
    sync = np.random.default_rng(0).normal(size=(192, 768)).astype(np.float16)
    examples = [{**zeros, **texts, 'id': name, 'sync_features': sync, 'video_exists': name != 'b'} for name in 'abc']
    folder = tmp_path / 'records' / 'vggsound'
    folder.mkdir(parents=True)
    records.write_shard(folder / records.shard_name('vggsound', 'test', 0, 1), map(schema.encode, examples))
    records.write_metadata(folder, 'vggsound', schema, {'test': [3]}, {})
    found = split_sounds.SyncFeatures(config, tmp_path)
    assert list(found) == ['a', 'c'] and len(found) == 2
    segments = found['c']['segments']
    assert segments.shape == (24, 8, 768) and segments.dtype == np.float32
    np.testing.assert_array_equal(segments[23, 7], sync[191])
    np.testing.assert_array_equal(segments[1, 0], sync[8])
    protocol = score.Protocol(8.0, ('desync',), '')
    settings = embeddings.Settings(tmp_path, tmp_path, 8.0, 2, 2)
    sources = score_inputs.References({}, {}, {}, {})  # no video is needed
    scoring = score.Scoring(config, protocol, settings, sources)
    reference, asked, lacking = score._references(scoring, set(), found)
    assert reference == {'synchformer_picture': found} and asked == {'a', 'c'} and not lacking
    with pytest.raises(ValueError, match='1 clips cannot be scored; b: no reference for synchformer_picture'):
        score._references(scoring, {'b'}, found)
    pairing = score_inputs.Pairing(('a', 'c'), (), ())
    systems = {'ours': score.System(tmp_path, 2, pairing, {}, {}, {}, {'desync': 'not computed'}, {})}
    for used in (False, True):
        config.score.record_features = used
        text = score.score_tables.markdown(score._report(scoring, systems, asked, lacking, {}, 0.0))
        assert ('DeSync: the picture features are those of the records' in text) == used
    config.extract.encoder = 'pixels'
    with pytest.raises(ValueError, match="needs records of the 'official' encoder, not of 'pixels'"):
        split_sounds.SyncFeatures(config, tmp_path)


def test_two_records_of_one_id_are_refused(trained, tmp_path):
    config = _config()
    shutil.copytree(trained / 'ema', tmp_path / 'ema')
    trained_run.write_codec(tmp_path, config)
    trained_run.write_split(tmp_path, config, 'the same')
    with pytest.raises(ValueError, match='records/impacts: two records of its split test have one id; extract it again'):
        split_sounds.write(config, tmp_path)


def test_ids_with_slashes(trained, tmp_path):
    config = _config()
    shutil.copytree(trained / 'ema', tmp_path / 'ema')
    trained_run.write_codec(tmp_path, config)
    trained_run.write_split(tmp_path, config, 'one/of/{}')
    made = split_sounds.write(config, tmp_path)
    assert list(made) == [f'one/of/{index}' for index in range(trained_run.CLIPS)]
    written = {name: path.stat().st_mtime_ns for name, path in made.items()}
    assert _scored(tmp_path, config)['systems']['impacts']['paired'] == trained_run.CLIPS
    assert {name: path.stat().st_mtime_ns for name, path in split_sounds.write(config, tmp_path).items()} == written
    evaluate.evaluate(trained_run.make_config(), tmp_path)
    assert {path.name for path in (tmp_path / 'generated' / 'test' / 'one' / 'of').iterdir()} == {
        '0.mp4', '0.png', '1.mp4', '1.png'}


@pytest.mark.parametrize('name', ['/etc/a', '../a', 'a/../../b', 'a/', './a', ''])
def test_an_id_does_not_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match=f"cannot hold a file for the record '{name}', whose id is no path inside of a folder"):
        split_sounds.place_of(tmp_path, name, '.flac')


def test_mistakes(trained, tmp_path):
    with pytest.raises(ValueError, match='train first'):
        split_sounds.write(_config(), tmp_path)
    config = _config()
    config.model.fused_blocks = 2
    with pytest.raises(ValueError, match='config.model.fused_blocks'):
        split_sounds.write(config, trained)
    config = _config()
    config.sequence.rate, config.generate.pretrained = '44k', str(trained)
    with pytest.raises(ValueError, match='is a network of 16k, but the records are of 44k'):
        split_sounds.write(config, trained)
    config.sequence.rate, config.extract.encoder = '16k', 'official'
    with pytest.raises(ValueError, match="knows features of the encoder 'pixels', but the records hold those of 'official'"):
        split_sounds.write(config, trained)
    with pytest.raises(ValueError, match="'impacts' is the name of the network that is sampled"):
        evaluate.evaluate(_config(compare='impacts=x'), trained)
    table = trained / 'media' / 'impacts' / 'test.jsonl'
    text = table.read_text()
    try:
        table.write_text('\n'.join(text.splitlines()[1:]))
        with pytest.raises(ValueError, match=r'test.jsonl: has no row for 1 of the 5 records \(clip_0\)'):
            evaluate.evaluate(_config(), trained)
    finally:
        table.write_text(text)
