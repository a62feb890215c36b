"""Evaluation of a split, with its controls: what the report says, what is skipped, and what is refused."""
import json
import os
import shutil
import unicodedata

import jax
import numpy as np
import pytest

from mmaudio_jax import checkpoints
from mmaudio_jax import encoders
from mmaudio_jax import evaluate
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import record_sampler
from mmaudio_jax import score_metrics
from mmaudio_jax import snapshots
from mmaudio_jax import split_sounds
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from tests import tiny_run
from tests import trained_run


@pytest.fixture(name='small_network', scope='module', autouse=True)
def fixture_small_network():
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        yield


@pytest.fixture(name='evaluated', scope='module')
def fixture_evaluated(tmp_path_factory, small_network):
    workdir = tmp_path_factory.mktemp('run')
    config = trained_run.make(workdir, with_split=True)
    evaluate.evaluate(config, workdir)
    return config, workdir


def test_report_has_every_figure_and_control(evaluated):
    config, workdir = evaluated
    report = json.loads((workdir / 'report.json').read_text())
    assert list(report['onsets']) == ['0.1', '0.05', '0.3'] and report['quoted_window_s'] == 0.1
    for rows in report['onsets'].values():
        assert list(rows) == ['generated', 'shuffled', 'codec', 'truth']
        for row in rows.values():
            assert row['clips'] + row['clips_without_truth'] == trained_run.CLIPS
        assert rows['truth']['clips_without_truth'] == 1
        assert rows['truth']['truths'] == trained_run.CLIPS - 1  # the onset at 5 s is not in a clip of 1 s
    assert (report['step'], report['clips'], report['seeds']['sampling']) == (10, trained_run.CLIPS, 42)
    assert report['config'] == checkpoints.to_json(config)
    assert not list(workdir.glob('.*'))
    assert len(evaluate.table(report).splitlines()) == 2 + 3 * 4


def test_clips_to_look_at(evaluated):
    _, workdir = evaluated
    names = sorted(path.name for path in (workdir / 'generated' / 'test').iterdir())
    assert names == ['clip_0.mp4', 'clip_0.png', 'clip_1.mp4', 'clip_1.png']


def test_a_second_run_does_nothing_and_a_changed_one_does(evaluated, capsys):
    config, workdir = evaluated
    before = (workdir / 'report.json').stat().st_mtime_ns
    config.train.log_every, config.sampling.batch_size, config.input.workers = 7, 5, 3  # no figure depends on these
    evaluate.evaluate(config, workdir)
    assert (workdir / 'report.json').stat().st_mtime_ns == before and 'nothing to do' in capsys.readouterr().out
    config.evaluate.onset_windows_s = (0.2, )
    try:
        evaluate.evaluate(config, workdir)
    finally:
        config.evaluate.onset_windows_s = (0.1, 0.05, 0.3)
    assert list(json.loads((workdir / 'report.json').read_text())['onsets']) == ['0.2']
    evaluate.evaluate(config, workdir)


def test_a_report_that_is_left_is_the_newer_one_again(evaluated):
    """Ablations take the newer of scores.json and report.json: what was asked for last."""
    config, workdir = evaluated
    report, scores = workdir / 'report.json', workdir / 'scores.json'
    before = report.read_text()
    os.utime(report, (1, 1))
    evaluate.evaluate(config, workdir)
    assert report.stat().st_mtime == 1  # there are no scores
    scores.touch()
    try:
        evaluate.evaluate(config, workdir)
        assert report.read_text() == before and report.stat().st_mtime_ns >= scores.stat().st_mtime_ns
    finally:
        scores.unlink()


def test_a_report_of_other_data_or_weights_is_made_anew(evaluated, tmp_path, capsys):
    _, workdir = evaluated
    config, run = trained_run.make_config(), tmp_path / 'run'
    shutil.copytree(workdir, run)
    for name in ('media', 'records'):
        (run / name).rename(tmp_path / name)
    config.data_dir = str(tmp_path)
    table, metadata = tmp_path / 'media' / 'impacts' / 'test.jsonl', tmp_path / 'records' / 'impacts' / 'metadata.json'

    def train_again():
        shutil.rmtree(run / 'ema')
        trained_run.write_weights(run, config, seed=1)

    changes = {'only moved': lambda: None, 'other tables': lambda: metadata.write_text(metadata.read_text() + ' '),
               'other onsets': lambda: table.write_text(table.read_text().replace('0.2', '0.21')), 'other weights': train_again}
    for name, change in changes.items():
        change()
        evaluate.evaluate(config, run)
        assert ('nothing to do' in capsys.readouterr().out) == (name == 'only moved'), name
    trained_run.write_codec(tmp_path, config, 2)
    with pytest.raises(checkpoints.CheckpointError, match='is not the codec of the network'):
        evaluate.evaluate(config, run)


def test_a_report_of_another_vocoder_or_encoder_is_made_anew(evaluated, tmp_path):
    _, workdir = evaluated
    config = trained_run.make_config()
    config.extract.update(encoder='official', codec='official')
    config.weights.update(folder=str(tmp_path), cache=str(tmp_path / 'cache'), verify=False)
    config.sampling.negative_prompt = 'music'
    identity = lambda: evaluate._identity(config, workdir, workdir, trained_run.STEP)
    report = tmp_path / 'report.json'
    report.write_text(json.dumps({name: value for name, value in identity().items() if name != 'encoder'}))  # an older one
    assert evaluate._matches(report, identity())
    for name in ('best_netG.pt', 'open_clip_pytorch_model.bin'):
        (tmp_path / name).write_bytes(b'mine')
        assert not evaluate._matches(report, identity()), name
        report.write_text(json.dumps(identity()))
        assert evaluate._matches(report, identity())


def test_sounds_that_are_not_finite_are_said(evaluated):
    _, workdir = evaluated
    config = trained_run.make_config()
    config.sampling.guidance = 1e38
    with pytest.raises(ValueError, match="5 of 5 generated sounds are not finite, first that of 'clip_0': lower"):
        evaluate.evaluate(config, workdir)


def _to_sample(config, workdir):
    """The network, its parameters, the examples of the split and their lengths."""
    sequence = Sequence(config.sequence.rate, config.sequence.duration_s)
    params, _ = snapshots.load_params(workdir)
    return mmaudio.build(config.model, sequence), params, list(split_sounds.examples(config, workdir)), sequence


def test_sampling_depends_neither_on_batches_nor_on_devices(evaluated):
    config, workdir = evaluated
    model, params, examples, sequence = _to_sample(config, workdir)
    examples = 2 * examples  # two batches, or one
    sample = lambda config: split_sounds.sample(config, model, params, examples, sequence, tiny_run.AsItIs())
    one = sample(config)
    more = trained_run.make_config()
    more.sampling.batch_size = 16
    np.testing.assert_allclose(one, sample(more), atol=5e-5)  # measured 1.8e-5
    assert one.shape == (2 * trained_run.CLIPS, sequence.latent_length, sequence.latent_channels)
    more.sampling.batch_size = 3  # rounded up to eight
    np.testing.assert_array_equal(one, sample(more))
    more.sampling.batch_size = 0
    with pytest.raises(ValueError, match='config.sampling.batch_size is 0; it must be at least 1'):
        sample(more)


def test_the_negative_prompt_of_the_config_is_the_samplers(evaluated):
    _, workdir = evaluated
    config = trained_run.make_config()
    to_sample = model, params, examples, sequence = _to_sample(config, workdir)
    without = split_sounds.sample(config, *to_sample, tiny_run.AsItIs())
    config.sampling.negative_prompt = 'metal'
    found = split_sounds.sample(config, *to_sample, tiny_run.AsItIs())
    negative, = encoders.make('pixels', sequence, None).encode_text(['metal'])
    mesh = partitioning.make_mesh({'data': -1})
    run = record_sampler.make(config, partitioning.on_mesh(model, mesh, config), mesh, sequence, 8)
    np.testing.assert_allclose(found, np.asarray(run(params, examples, 0, negative))[:len(examples)], atol=1e-6)
    assert np.abs(found - without).max() > 1e-3


def test_the_lag_of_the_config_is_subtracted_from_onsets():
    options, sequence = trained_run.make_config().evaluate, Sequence('16k', 1.0)
    sound = np.zeros(sequence.waveform_length, np.float32)
    sound[8_000:8_400] = np.random.default_rng(0).normal(size=400)
    times, rates = {}, {}
    for lag_s in (0.0, 0.25):
        options.onset_lag_s = lag_s
        _, onsets = evaluate.onset_scores(options, dict.fromkeys(('generated', 'codec', 'truth'), [sound]), [[0.5]], sequence)
        times[lag_s] = onsets['generated'][0].times_s
        rates[lag_s] = score_metrics.onset_rates(sound, sequence.sample_rate_hz, [0.5], options, 1.0, False)['f1']
    np.testing.assert_allclose(times[0.25], times[0.0] - 0.25)
    assert rates == {0.0: 1.0, 0.25: 0.0}


def test_shuffling_leaves_nothing_in_place_and_ruins_a_perfect_score():
    for count in (2, 3, 50):
        order = evaluate.derangement(count, 0)
        assert sorted(order) == list(range(count)) and all(i != other for i, other in enumerate(order))
        assert order == evaluate.derangement(count, 0)
    assert evaluate.derangement(50, 0) != evaluate.derangement(50, 1) and evaluate.derangement(1, 0) == []
    rate, generator = 16_000, np.random.default_rng(0)
    truths = [[0.3 + 0.37 * index] for index in range(5)]
    waveforms = [np.zeros(3 * rate, np.float32) for _ in truths]
    for waveform, (time_s, ) in zip(waveforms, truths):
        start = int(time_s * rate)
        waveform[start:start + 2000] = generator.normal(size=2000) * np.exp(-np.arange(2000) / 400)
    options = trained_run.make_config().evaluate
    scores, _ = evaluate.onset_scores(options, {'generated': waveforms, 'codec': waveforms, 'truth': waveforms}, truths,
                                      Sequence('16k', 3.0))
    assert scores['0.1']['generated']['macro']['f1'] == 1.0 and scores['0.1']['shuffled']['macro']['f1'] == 0.0


def test_tables_that_extraction_takes(tmp_path):
    """With a mark of their encoding, blank lines and names whose letters macOS takes apart."""
    stored, named = (unicodedata.normalize(form, 'é') for form in ('NFD', 'NFC'))
    media.write_audio(tmp_path / f'{stored}.wav', np.ones(32_000), 16_000)
    rows = [{'id': 'b', 'audio': None, 'video': 'b.mp4'},
            {'id': 'a', 'audio': f'{named}.wav', 'start_s': 0.5, 'onset_times_s': [0.1]}]
    table = tmp_path / 'test.jsonl'
    table.write_text('\ufeff' + ''.join(json.dumps(row) + '\n' for row in rows) + '\n', encoding='utf-8')
    found = evaluate._rows(table, ['a'])
    assert found == rows[1:] and evaluate._true_sounds(table, found, Sequence('16k', 1.0))[0].shape == (16_000,)
    with pytest.raises(ValueError, match="test.jsonl: 'b' has no onset_times_s; onsets can only be scored against"):
        evaluate._rows(table, ['a', 'b'])


def test_mistakes(evaluated, tmp_path):
    config, workdir = evaluated
    with pytest.raises(ValueError, match='train first'):
        evaluate.evaluate(config, tmp_path)
    other = trained_run.make_config()
    other.model.fused_blocks = 2
    with pytest.raises(ValueError, match='config.model.fused_blocks'):
        evaluate.evaluate(other, workdir)
    table = workdir / 'media' / 'impacts' / 'test.jsonl'
    text = table.read_text()
    other = trained_run.make_config()
    other.evaluate.max_clips = 3
    try:
        table.write_text('\n'.join(text.splitlines()[1:]))
        with pytest.raises(ValueError, match="no entry for 'clip_0'"):
            evaluate.evaluate(other, workdir)
        table.write_text(text.replace('[]', 'null'))
        with pytest.raises(ValueError, match='test.jsonl, line 5: onset_times_s is null; a list of seconds is needed'):
            evaluate.evaluate(other, workdir)
        table.unlink()
        with pytest.raises(FileNotFoundError, match='test.jsonl'):
            evaluate.evaluate(other, workdir)
    finally:
        table.write_text(text)
    assert jax.device_count() == 8
