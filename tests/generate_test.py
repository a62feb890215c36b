"""Files in, files out: what is written, skipped, refused, and what happens to the others when one fails."""
import json
import shutil

import av
import jax
import numpy as np
from PIL import Image
import pytest
import soundfile

from mmaudio_jax import generate
from mmaudio_jax import generate_jobs
from mmaudio_jax import hosts
from mmaudio_jax import media
from mmaudio_jax import pipeline
from tests import full_disk
from tests import trained_run
from tests.media_test import write_video


@pytest.fixture(name='small_network', scope='module', autouse=True)
def fixture_small_network():
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        yield


@pytest.fixture(name='workdir', scope='module')
def fixture_workdir(tmp_path_factory, small_network):
    workdir = tmp_path_factory.mktemp('run')
    trained_run.make(workdir)
    videos = workdir / 'videos'
    trained_run.write_video(videos / 'a.b.mp4')
    (videos / 'broken.mp4').write_bytes(b'not a video')
    trained_run.write_video(videos / 'c.mp4', 1)
    (videos / 'notes.txt').touch()
    return workdir


def _config(workdir, **fields):
    config = trained_run.make_config()
    config.generate.update(input=str(workdir / 'videos'), output=str(workdir / 'out'))
    config.generate.update(fields)
    return config


def test_a_folder(workdir, capfd):
    assert generate.generate(_config(workdir), workdir) == 1
    captured = capfd.readouterr()
    assert 'broken.mp4' in captured.err and '1 of 3 failed' in captured.err
    names = sorted(path.name for path in (workdir / 'out').iterdir())
    results = [f'{stem}.{suffix}' for stem in ('a.b', 'c') for suffix in ('flac', 'json', 'mp4', 'png')]
    assert names == [*results, 'report.jsonl']
    before = (workdir / 'out' / 'c.flac').stat().st_mtime_ns
    assert generate.generate(_config(workdir), workdir) == 1
    assert capfd.readouterr().out.count('nothing to do') == 2
    assert (workdir / 'out' / 'c.flac').stat().st_mtime_ns == before
    (workdir / 'out' / 'c.png').unlink()
    generate.generate(_config(workdir), workdir)
    assert capfd.readouterr().out.count('nothing to do') == 1 and (workdir / 'out' / 'c.png').exists()


def test_names_that_are_not_utf8(workdir, tmp_path, capfd):
    trained_run.write_video(tmp_path / 'a.mp4')
    trained_run.write_video(tmp_path / 'bad\udcff.mp4')
    config = _config(workdir, input=str(tmp_path), output=str(tmp_path / 'out'))
    for status in ('done', 'kept'):
        assert generate.generate(config, workdir) == 0
        rows = list(map(json.loads, (tmp_path / 'out' / 'report.jsonl').read_text().splitlines()))
        assert [(row['name'], row['status']) for row in rows] == [('a', status), ('bad\udcff', status)]
    assert (tmp_path / 'out' / 'bad\udcff.png').exists() and not capfd.readouterr().err


def test_a_picture_that_cannot_be_drawn_fails_no_input(workdir, tmp_path, capfd, monkeypatch):

    def refuse(*_):
        raise TypeError('set_text(): incompatible function arguments\nand more')

    config = _config(workdir, input='', prompt='rain', output=str(tmp_path))
    assert generate.generate(config, workdir) == 0
    next(tmp_path.glob('*.json')).write_text('[]')  # as another program's
    monkeypatch.setattr(generate.plots, 'spectrogram', refuse)
    config.sampling.seed = 7
    assert generate.generate(config, workdir) == 0
    assert '.png was not drawn: set_text(): incompatible function arguments\n' in capfd.readouterr().err
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.flac', '.json', '.jsonl']
    row = json.loads((tmp_path / 'report.jsonl').read_text())
    assert row['status'] == 'done' and [name.split('.')[1] for name in row['files']] == ['flac']


def test_a_result_of_another_vocoder_or_encoder_is_made_again(workdir, tmp_path):
    config = _config(workdir)
    config.weights.update(folder=str(tmp_path), cache=str(tmp_path / 'cache'), verify=False)
    pipe = generate._load(config, workdir)
    pipe.config['extract'].update(encoder='official', codec='official')
    weights = [generate._weights(config, workdir, pipe)]
    assert weights[0]['codec'] is None and 'encoder' not in weights[0]  # as older results have it
    for name in ('v1-16.pth', 'best_netG.pt', 'open_clip_pytorch_model.bin', 'synchformer_state_dict.pth'):
        (tmp_path / name).write_bytes(b'mine')
        found = generate._weights(config, workdir, pipe)
        assert found not in weights, name
        weights.append(found)


def test_one_file_with_other_settings_is_made_again(workdir):
    config = _config(workdir, input=str(workdir / 'videos' / 'c.mp4'), output=str(workdir / 'one'), audio_format='wav')
    assert generate.generate(config, workdir) == 0
    first = (workdir / 'one' / 'c.wav').read_bytes()
    config.sampling.seed = 7
    assert generate.generate(config, workdir) == 0
    assert (workdir / 'one' / 'c.wav').read_bytes() != first
    assert json.loads((workdir / 'one' / 'c.json').read_text())['settings']['seed'] == 7
    second = (workdir / 'one' / 'c.wav').read_bytes()
    config.sampling.schedule = 'quadratic'
    assert generate.generate(config, workdir) == 0
    assert (workdir / 'one' / 'c.wav').read_bytes() != second


def test_results_of_other_weights_are_made_again(tmp_path, capfd):
    """Trained anew in the same folder, with as many steps."""
    config = trained_run.make(tmp_path)
    config.generate.update(prompt='rain', output=str(tmp_path / 'out'))
    sounds = []
    for change in (lambda *_: None, lambda *_: None, _train_anew):
        change(tmp_path, config)
        assert generate.generate(config, tmp_path) == 0
        sounds.append(next((tmp_path / 'out').glob('*.flac')).read_bytes())
    assert capfd.readouterr().out.count('nothing to do') == 1
    assert sounds[0] == sounds[1] and len(set(sounds)) == 2
    trained_run.write_codec(tmp_path, config, seed=2)
    with pytest.raises(ValueError, match='is not the codec of the network'):
        generate.generate(config, tmp_path)


def _train_anew(workdir, config):
    shutil.rmtree(workdir / 'ema')
    trained_run.write_weights(workdir, config, seed=1)


def test_fields_of_the_config_reach_the_job_and_all_devices_are_used(workdir):
    config = _config(workdir, input=str(workdir / 'videos' / 'c.mp4'), prompt='rain', duration_s=1.0)
    config.sampling.update(negative_prompt='music', seed=7, batch_size=3)
    job, = generate_jobs.jobs(config.generate, config.sampling)
    assert (job.prompt, job.negative_prompt, job.seed, job.duration_s) == ('rain', 'music', 7, 1.0)
    config.mesh.fsdp = 16  # of a slice of sixteen chips: here there are eight
    pipe = generate._load(config, workdir)
    assert dict(pipe._mesh.shape) == {'data': 1, 'fsdp': jax.local_device_count(), 'tensor': 1} and pipe.batch_size == 3


def test_the_original_sound_is_an_option(workdir):
    config = _config(workdir, input=str(workdir / 'videos' / 'c.mp4'), output=str(workdir / 'kept'), original_sound='keep',
                     video_format='mkv')
    assert generate.generate(config, workdir) == 0
    with av.open(str(workdir / 'kept' / 'c.mkv')) as container:
        assert len(container.streams.audio) == 2


def test_a_prompt_alone(workdir):
    assert generate.generate(_config(workdir, input='', output='', prompt='a glass/strikes'), workdir) == 0
    names = sorted(path.suffix for path in (workdir / 'generated').iterdir())
    assert names == ['.flac', '.json', '.jsonl', '.png']


def test_the_rows_of_a_csv(workdir, tmp_path, capfd):
    """Lengths, prompts, seeds, an image, a prompt alone, a file that is missing and one that was cut off; then once more."""
    whole = (workdir / 'videos' / 'c.mp4').read_bytes()
    (tmp_path / 'cut.mp4').write_bytes(whole[:len(whole) // 2])
    trained_run.write_video(tmp_path / 'v.mp4', 3, 1.4)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / 'i.png')
    (tmp_path / 'list.csv').write_text('video,prompt,negative_prompt,seed,duration_s,image\n'
                                       'v.mp4,a glass,,7,,\n'
                                       'v.mp4,,"noise, hum",,0.8,\n'
                                       'missing.mp4,a,,,,\n'
                                       '\n'
                                       'cut.mp4,a,,,,\n'
                                       ',,,,,i.png\n'
                                       ',rain,,,1.5,\n')
    config = _config(workdir, input=str(tmp_path / 'list.csv'), output=str(tmp_path / 'out'), prompt='wood', verbose=True)
    assert generate.generate(config, workdir) == 1
    captured = capfd.readouterr()
    assert 'missing.mp4: FAILED' in captured.err and 'cut.mp4: FAILED' in captured.err and '2 of 6 failed' in captured.err
    assert 'flow and codec (2 sounds of 1.5 s, 2 steps): ' in captured.out  # v.mp4 (rounded up) and rain share a batch
    rows = {row['name']: row for row in map(json.loads, (tmp_path / 'out' / 'report.jsonl').read_text().splitlines())}
    rain = next(name for name in rows if name.startswith('rain'))
    statuses = {name: row['status'] for name, row in rows.items()}
    assert statuses == {'v_2': 'done', 'v_3': 'done', 'missing': 'failed', 'cut': 'failed', 'i': 'done', rain: 'done'}
    assert rows['missing']['error'].endswith('missing.mp4: no such file') and rows['v_2']['seed'] == 7
    assert rows['v_3']['prompt'] == 'wood' and rows['v_3']['negative_prompt'] == 'noise, hum'
    assert rows['v_2']['files'] == ['v_2.flac', 'v_2.mp4', 'v_2.png'] and rows[rain]['files'] == [f'{rain}.flac', f'{rain}.png']
    lengths = {name: soundfile.info(tmp_path / 'out' / f'{name}.flac').frames for name in ('v_2', 'v_3', 'i', rain)}
    assert lengths == {'v_2': 22_400, 'v_3': 12_800, 'i': 16_000, rain: 24_000}
    assert not [path for path in (tmp_path / 'out').iterdir() if path.name.startswith('.')]
    alone = _config(workdir, input=str(tmp_path / 'v.mp4'), output=str(tmp_path / 'alone'), prompt='a glass')
    alone.sampling.seed = 7
    assert generate.generate(alone, workdir) == 0
    sounds = [soundfile.read(path)[0] for path in (tmp_path / 'out' / 'v_2.flac', tmp_path / 'alone' / 'v.flac')]
    assert np.std(sounds[0] - sounds[1]) / np.std(sounds[1]) < 0.02  # the same in a batch and alone
    assert generate.generate(config, workdir) == 1
    assert capfd.readouterr().out.count('nothing to do') == 4
    statuses = [json.loads(line)['status'] for line in (tmp_path / 'out' / 'report.jsonl').read_text().splitlines()]
    assert sorted(statuses) == ['failed', 'failed', 'kept', 'kept', 'kept', 'kept']


def test_what_mp4_cannot_hold_is_encoded_anew_with_a_warning(workdir, tmp_path, capfd):
    write_video(tmp_path / 'a.webm', codec='libvpx')
    config = _config(workdir, input=str(tmp_path / 'a.webm'), output=str(tmp_path / 'out'), original_sound='mix')
    assert generate.generate(config, workdir) == 0
    error = capfd.readouterr().err
    assert 'generate: ' in error and 'a.mp4: mp4 cannot hold vp8 video: encoded anew\n' in error
    assert 'a.webm: has no sound of its own\n' in error
    assert media.probe(tmp_path / 'out' / 'a.mp4').duration_s == 1.0


def test_a_batch_that_fails_is_tried_one_by_one(workdir, tmp_path, capfd, monkeypatch):
    whole = pipeline.Pipeline.generate_batch

    def fails_for_some(self, batch, frames, settings):
        if any(one.prompt == 'bad' for one in batch):
            raise ValueError('too much')
        return whole(self, batch, frames, settings)

    monkeypatch.setattr(pipeline.Pipeline, 'generate_batch', fails_for_some)
    (tmp_path / 'list.csv').write_text('prompt\ngood\nbad\nbetter\n')
    config = _config(workdir, input=str(tmp_path / 'list.csv'), output=str(tmp_path / 'out'))
    assert generate.generate(config, workdir) == 1
    assert 'FAILED: too much' in capfd.readouterr().err
    assert len(list((tmp_path / 'out').glob('*.flac'))) == 2


def test_each_process_does_its_share(workdir, tmp_path, monkeypatch):
    (tmp_path / 'list.csv').write_text('prompt\na\nb\nc\n')
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(hosts, 'agreed', lambda value: value)
    for process, prompts in ((0, 'ac'), (1, 'b')):
        monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
        config = _config(workdir, input=str(tmp_path / 'list.csv'), output=str(tmp_path / 'out'))
        assert generate.generate(config, workdir) == 0
        lines = (tmp_path / 'out' / f'report_{process}.jsonl').read_text().splitlines()
        assert ''.join(json.loads(line)['prompt'] for line in lines) == prompts
    assert len(list((tmp_path / 'out').glob('*.flac'))) == 3


def test_a_full_disk_is_reported_and_leaves_nothing(workdir, tmp_path, capfd):
    config = _config(workdir, input='', prompt='rain', output=str(tmp_path), duration_s=2.0)
    with full_disk.after(8192):
        assert generate.generate(config, workdir) == 1
    assert '.flac: File too large' in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['report.jsonl']


@pytest.mark.parametrize('text,message', [
    ('', r'list.csv: is empty; the columns are video, image, prompt, negative_prompt, seed, duration_s'),
    ('video,prompt\n', 'list.csv: has no rows'),
    ('video,title\na.mp4,b\n', "list.csv: unknown column 'title'; the columns are video"),
    ('prompt,caption\na,b\n', "list.csv: the column 'prompt' stands there twice"),
    ('name,prompt\n../a,b\n', "list.csv:2: name is '../a'; it names files, without a folder"),
    ('video,video\na.mp4,b\n', "list.csv: the column 'video' stands there twice"),
    ('seed\n3\n', 'list.csv: has none of the columns video, image and prompt'),
    ('video,prompt\na.mp4\n', 'list.csv:2: 1 cells, but the header has 2 columns'),
    ('prompt,seed\nrain,x\n', "list.csv:2: seed is 'x', not a whole number"),
    ('prompt,duration_s\nrain,2\nrain,long\n', "list.csv:3: duration_s is 'long', not a number of seconds"),
    ('video,prompt,seed\n,,3\n', 'list.csv:2: neither a video, nor an image, nor a prompt'),
    ('video,image\na.mp4,b.png\n', 'list.csv:2: both a video and an image'),
    ('video\n"a.mp4\n', 'list.csv, line 2: the row that starts there cannot be read'),
])
def test_bad_csv(workdir, tmp_path, text, message):
    (tmp_path / 'list.csv').write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        generate.generate(_config(workdir, input=str(tmp_path / 'list.csv')), workdir)
    assert '\n' not in str(error.value)


def test_a_csv_as_other_tables(workdir, tmp_path):
    """In Latin-1, with a cell of several lines, and a file whose name a Mac has taken apart."""
    (tmp_path / 'u\u0308ber.mp4').touch()
    (tmp_path / 'list.csv').write_bytes('video,prompt,name\n\xfcber.mp4,"rain,\nthen\nsun",a\n,"b",a\n'.encode('latin-1'))
    config = _config(workdir, input=str(tmp_path / 'list.csv'))
    first, second = generate_jobs.jobs(config.generate, config.sampling)
    assert first.video.exists() and (first.name, second.name) == ('a_2', 'a_5')


def test_every_job_has_a_name_of_its_own(workdir, tmp_path):
    for name in ('a.mp4', 'a.mkv', 'a_mp4.mov', 'a_mkv_.mov', 'b.mp4'):
        (tmp_path / name).touch()
    config = _config(workdir, input=str(tmp_path))
    assert [(job.video.name, job.name) for job in generate_jobs.jobs(config.generate, config.sampling)] == [
        ('a.mkv', 'a_mkv'), ('a.mp4', 'a_mp4_'), ('a_mkv_.mov', 'a_mkv_'), ('a_mp4.mov', 'a_mp4'), ('b.mp4', 'b')]
    config.generate.input = str(tmp_path / 'list.csv')
    for second in ('clip', 'Clip'):  # the same file on macOS
        (tmp_path / 'list.csv').write_text(f'video\nclip.mp4\n{second}.mp4\nclip_2.mkv\n')
        names = [job.name for job in generate_jobs.jobs(config.generate, config.sampling)]
        assert names == ['clip_2_', f'{second}_3', 'clip_2']


def test_a_published_table_of_names_and_captions(workdir, tmp_path):
    (tmp_path / 'list.csv').write_text('name,caption,seed\n97151,a sewing machine,\n97152,a sewing machine,\n3,rain,5\n')
    config = _config(workdir, input=str(tmp_path / 'list.csv'))
    first, second, seeded = generate_jobs.jobs(config.generate, config.sampling)
    assert (first.name, first.prompt, first.seed) == ('97151', 'a sewing machine', 42) and first.index != second.index
    assert (seeded.name, seeded.seed, seeded.index) == ('3', 5, 0)


def test_the_sounds_of_a_set_begin_with_different_noise(workdir, tmp_path):
    """Those of a folder and of a CSV, whatever else is in it; a single input has the first noise of its seed."""
    (tmp_path / 'list.csv').write_text('name,caption\na,rain\nb,rain\n')
    config = _config(workdir, input=str(tmp_path / 'list.csv'), output=str(tmp_path / 'out'), duration_s=1.0)
    assert generate.generate(config, workdir) == 0
    once, other = ((tmp_path / 'out' / name).read_bytes() for name in ('a.flac', 'b.flac'))
    assert once != other
    (tmp_path / 'list.csv').write_text('name,caption\nnew,rain\nb,rain\n')
    config.generate.output = str(tmp_path / 'again')
    assert generate.generate(config, workdir) == 0
    assert (tmp_path / 'again' / 'b.flac').read_bytes() == other
    config = _config(workdir, input='', prompt='rain')
    assert [job.index for job in generate_jobs.jobs(config.generate, config.sampling)] == [0]


def test_hidden_files_are_no_videos(workdir, tmp_path, capfd):
    for name in ('._mac.mp4', '.hidden.mp4'):
        (tmp_path / name).touch()
    config = _config(workdir, input=str(tmp_path))
    with pytest.raises(ValueError, match='no videos'):
        generate_jobs.jobs(config.generate, config.sampling)
    (tmp_path / 'mac.mp4').touch()
    assert [job.name for job in generate_jobs.jobs(config.generate, config.sampling)] == ['mac']
    assert 'passes over' not in capfd.readouterr().out


def test_a_cell_of_no_seconds_is_as_long_as_the_video(workdir, tmp_path):
    (tmp_path / 'list.csv').write_text('video,duration_s\na.mp4,0\nb.mp4,\nc.mp4,2\n')
    config = _config(workdir, input=str(tmp_path / 'list.csv'), duration_s=3.0)
    assert [job.duration_s for job in generate_jobs.jobs(config.generate, config.sampling)] == [None, 3.0, 2.0]


def test_same_stem_and_mistakes(workdir, tmp_path):
    for name in ('x.mp4', 'x.webm', 'y.mov'):
        (tmp_path / name).touch()
    config = _config(workdir, input=str(tmp_path))
    assert [job.name for job in generate_jobs.jobs(config.generate, config.sampling)] == ['x_mp4', 'x_webm', 'y']
    for fields, message in (({'input': ''}, 'nothing to generate'), ({'input': 'https://a.b/c.mp4'}, 'is an address; download'),
                            ({'input': str(tmp_path / 'no')}, 'no such file'), ({'input': str(workdir)}, 'no videos'),
                            ({'output': str(workdir / 'videos')}, 'would be overwritten'),
                            ({'original_sound': 'louder'}, 'config.generate.original_sound is .louder.; it must be one of'),
                            ({'video_format': 'avi'}, 'config.generate.video_format is .avi.; it must be one of mp4, m4v'),
                            ({'original_db': float('nan')}, 'config.generate.original_db is nan; a number of dB from -200 to'),
                            ({'pretrained': 'small_17k'}, "'small_17k' is neither an official network")):
        with pytest.raises(ValueError, match=message):
            generate.generate(_config(workdir, **fields), workdir)
