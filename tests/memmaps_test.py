"""Memory maps of the official extraction become records. golden/memmap_meta.json was written by tensordict 0.15.3."""
import json
import re

import numpy as np
import pytest

from configs import base
from data_pipelines import extract
from data_pipelines import memmaps
from mmaudio_jax import records
from tests.conftest import GOLDEN

META = json.loads((GOLDEN / 'memmap_meta.json').read_text())
SCHEMA = records.Schema('16k', 1.0, 'float16', 'official', 'official')


def write(folder, column: str, video: bool, bad: bool = False) -> dict[str, np.ndarray]:
    """Maps of three examples, as `TensorDict.memmap_` writes them, and their tsv."""
    folder.mkdir(parents=True)
    tensors = {name: entry for name, entry in META.items() if isinstance(entry, dict) and (video or 'text' in name or name in
                                                                                           ('mean', 'std'))}
    rng, values = np.random.default_rng(0), {}
    for name, entry in tensors.items():
        values[name] = rng.standard_normal(entry['shape']).astype(np.float32)
        if bad:
            values[name][1] = np.nan
        (folder / f'{name}.memmap').write_bytes(values[name].tobytes())
    rest = {name: entry for name, entry in META.items() if not isinstance(entry, dict)}
    (folder / 'meta.json').write_text(json.dumps({**tensors, **rest}))
    rows = ''.join(f'id_{i}\t"thing {i}"\n' for i in range(3))
    folder.with_name(f'{folder.name}.tsv').write_text(f'id\t{column}\n{rows}')
    return values


def make_config(*maps):
    config = base.get_config()
    config.sequence.duration_s = 1.0
    config.extract.update(memmaps=maps, clips_per_shard=2, max_rejected=1.0)
    return config


def test_videos_and_sounds_are_imported(tmp_path):
    train, test = tmp_path / 'maps' / 'vgg-train', tmp_path / 'maps' / 'vgg-test'
    values = write(train, 'label', True)
    write(test, 'label', True, bad=True)
    sounds = write(tmp_path / 'maps' / 'clotho', 'caption', False)
    config = make_config(('vggsound', 'train', str(train)), ('vggsound', 'test', str(test)),
                         ('clotho', 'train', str(tmp_path / 'maps' / 'clotho')))
    extract.extract(config, tmp_path)
    source = records.load_source(tmp_path / 'records' / 'vggsound', 'train', SCHEMA)
    assert len(source) == 3
    for i in range(3):
        example = source[i]
        assert example['id'] == f'id_{i}' and example['caption'] == f'thing {i}' and example['video_exists']
        for name, tensor in memmaps.TENSORS.items():
            np.testing.assert_array_equal(example[name], values[tensor][i].astype(np.float16))
    rejected = (tmp_path / 'records' / 'vggsound' / 'rejected.jsonl').read_text().splitlines()
    assert [json.loads(line)['reason'] for line in rejected] == ['latent_mean is not finite as float16']
    sound = records.load_source(tmp_path / 'records' / 'clotho', 'train', SCHEMA)[2]
    assert not sound['video_exists'] and not sound['clip_features'].any()
    np.testing.assert_array_equal(sound['latent_std'], sounds['std'][2].astype(np.float16))
    card = json.loads((tmp_path / 'records' / 'vggsound' / 'card.json').read_text())
    assert card['labels']['count'] == 3 and card['splits']['test']['records'] == 2
    np.testing.assert_allclose(card['latents']['train']['mean'], values['mean'].mean((0, 1)), atol=1e-3)


def test_a_set_is_that_of_its_content_not_of_its_place(tmp_path, capsys):
    write(tmp_path / 'here' / 'vgg', 'label', True)
    extract.extract(make_config(('vgg', 'train', str(tmp_path / 'here' / 'vgg'))), tmp_path)
    (tmp_path / 'here').rename(tmp_path / 'there')
    capsys.readouterr()
    moved = make_config(('vgg', 'train', str(tmp_path / 'there' / 'vgg')))
    extract.extract(moved, tmp_path)
    assert 'records in' not in capsys.readouterr().out
    (tmp_path / 'there' / 'vgg.tsv').write_text('id\tlabel\na\tx\nb\ty\nc\tz\n')
    with pytest.raises(ValueError, match='vgg: was made with other clip tables'):
        extract.extract(moved, tmp_path)


def test_processes_share_the_shards_and_say_what_is_missing(tmp_path, capsys):
    write(tmp_path / 'vgg', 'label', True)
    config = make_config(('vgg', 'train', str(tmp_path / 'vgg')))
    config.extract.update(process_index=1, process_count=2)
    extract.extract(config, tmp_path)
    assert re.search(r'extract vgg: process 1 of 2 made its shards, \d+ s; others are still to come', capsys.readouterr().out)
    config.extract.process_index = 0
    extract.extract(config, tmp_path)
    said = capsys.readouterr().out
    assert re.search(rf'extract vgg: 3 records in {tmp_path}/records/vgg, \d+ s; none rejected', said)


def test_hosts_wait_for_each_other(tmp_path, monkeypatch):
    """The card is of the whole set, and so is what the next stage finds."""
    write(tmp_path / 'vgg', 'label', True)
    config = make_config(('vgg', 'train', str(tmp_path / 'vgg')))

    def other_host(_):
        with monkeypatch.context() as patch:
            patch.setattr(extract.jax, 'process_index', lambda: 1)
            patch.setattr(extract.multihost_utils, 'sync_global_devices', lambda _: None)
            extract.extract(config, tmp_path)
        assert not (tmp_path / 'records' / 'vgg' / 'card.json').exists()

    monkeypatch.setattr(extract.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(extract.multihost_utils, 'sync_global_devices', other_host)
    extract.extract(config, tmp_path)
    assert (tmp_path / 'records' / 'vgg' / 'card.json').is_file()


def test_examples_that_sound_alike_are_found(tmp_path):
    values = write(tmp_path / 'vgg', 'label', True)
    (tmp_path / 'vgg' / 'mean.memmap').write_bytes(np.repeat(values['mean'][:1], 3, axis=0).tobytes())
    extract.extract(make_config(('vgg', 'train', str(tmp_path / 'vgg'))), tmp_path)
    card = json.loads((tmp_path / 'records' / 'vgg' / 'card.json').read_text())
    assert card['near_duplicates']['largest'] == [['train/id_0', 'train/id_1', 'train/id_2']]


def test_what_does_not_fit_is_named(tmp_path):
    folder = tmp_path / 'vgg'
    write(folder, 'label', True)
    with pytest.raises(ValueError, match=r'vgg: mean is torch.float32 \[3, 32, 20\], not \[examples, 250, 20\]'):
        memmaps.open_maps(folder, records.Schema('16k', 8.0, 'float16', 'official', 'official'))
    tsv = folder.with_name('vgg.tsv')
    tsv.write_text('id\tlabel\nonly\tone\n')
    with pytest.raises(ValueError, match='vgg.tsv: has 1 rows, the tensors beside it have 3'):
        memmaps.open_maps(folder, SCHEMA)
    tsv.unlink()
    with pytest.raises(FileNotFoundError, match='vgg.tsv: missing'):
        memmaps.open_maps(folder, SCHEMA)
    (folder / 'std.memmap').write_bytes(b'')
    with pytest.raises(ValueError, match='std.memmap: is missing or not as long as meta.json says'):
        memmaps.open_maps(folder, SCHEMA)
    for text in ('{"mean": {', 'null', '{"mean": 3}', '{"mean": {"shape": 3}}', '{"mean": {"dtype": "torch.float32"}}'):
        (folder / 'meta.json').write_text(text)
        with pytest.raises(ValueError, match=r'vgg/meta.json: does not describe memory maps \(.*\); copy it again'):
            memmaps.open_maps(folder, SCHEMA)
    (folder / 'meta.json').unlink()
    with pytest.raises(FileNotFoundError, match='vgg: holds no meta.json'):
        memmaps.open_maps(folder, SCHEMA)


@pytest.mark.parametrize('there, missing', [memmaps.OF_VIDEO, memmaps.OF_VIDEO[::-1]])
def test_half_of_the_features_of_videos_is_refused(tmp_path, there, missing):
    write(tmp_path / 'vgg', 'label', True)
    meta = json.loads((tmp_path / 'vgg' / 'meta.json').read_text())
    del meta[missing]
    (tmp_path / 'vgg' / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"vgg/meta.json: names '{there}', but no tensor '{missing}'; videos have both"):
        memmaps.open_maps(tmp_path / 'vgg', SCHEMA)
