"""The folder that a training run leaves, without the training: random weights, a codec fitted to noise, short clips."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from configs import impacts as impacts_config
from data_pipelines import impacts
from mmaudio_jax import codec
from mmaudio_jax import encoders
from mmaudio_jax import media
from mmaudio_jax import records
from mmaudio_jax import snapshots
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store
from tests import tiny_run

DURATION_S = 1.0
CLIPS = 5
STEP = 10


def use_network(monkeypatch) -> None:
    """A network that compiles in a second in the place of MMAudio."""
    monkeypatch.setattr(mmaudio, 'build', lambda model_config, sequence: tiny_run.Network(sequence.latent_channels))


def make_config():
    """impacts, one second, two sampling steps; batches of 8 because tests have 8 devices."""
    config = impacts_config.get_config()
    config.sequence.duration_s = DURATION_S
    config.model.update(joint_blocks=1, fused_blocks=1)
    config.sharding.rules = tiny_run.RULES
    config.sampling.update(num_steps=2, batch_size=8)
    config.generate.compilation_cache = False  # it is the process's: not for the other tests
    config.evaluate.save_clips = 2
    return config


def _sequence(config) -> Sequence:
    return Sequence(config.sequence.rate, config.sequence.duration_s)


def write_weights(workdir: pathlib.Path, config, step: int = STEP, seed: int = 0) -> None:
    """Snapshots of random weights, the same in every average."""
    sequence = _sequence(config)
    model = mmaudio.build(config.model, sequence)
    shapes = ((sequence.latent_length, sequence.latent_channels), (), (sequence.clip_length, 1024), (sequence.sync_length, 768),
              (77, 1024))
    params = jax.jit(model.init)(jax.random.key(0), *(jnp.zeros((1, *shape)) for shape in shapes))['params']
    leaves, structure = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)
    noisy = [np.asarray(leaf) + 0.02 * generator.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    params = jax.tree.unflatten(structure, noisy)
    params['latent_std'] = np.ones_like(params['latent_std'])
    snapshots.save(workdir, step, {width: params for width in config.ema.sigma_rels}, config)


def write_codec(workdir: pathlib.Path, config, seed: int = 1) -> None:
    """records/codec.npz, fitted to noise."""
    sequence = _sequence(config)
    (workdir / 'records').mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(size=(4, sequence.waveform_length)).astype(np.float32)
    codec.fit_pca([noise * scale for scale in (0.01, 0.1, 0.3)], sequence, workdir / 'records' / 'codec.npz')


def write_video(path: pathlib.Path, seed: int = 0, duration_s: float = DURATION_S) -> None:
    """An mp4 file of the built-in dataset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    impacts.write_clip(impacts.Job(str(path), seed, duration_s, 64, 25))


def write_split(workdir: pathlib.Path, config, ids: str = 'clip_{}') -> None:
    """media/impacts and records/impacts with a split 'test', its ids by number; the last clip's truth is empty."""
    sequence = _sequence(config)
    folder, set_folder = workdir / 'media' / 'impacts', workdir / 'records' / 'impacts'
    set_folder.mkdir(parents=True)
    encoder = encoders.make('pixels', sequence, store.load)
    coder = codec.make('pca', sequence, workdir / 'records' / 'codec.npz', store.load)
    rows, examples = [], []
    for index in range(CLIPS):
        row = {'id': ids.format(index), 'video': f'test/clip_{index}.mp4', 'audio': None, 'caption': f'clip number {index}',
               'split': 'test', 'onset_times_s': [0.2 + 0.1 * index, 5.0] if index < CLIPS - 1 else []}
        write_video(folder / row['video'], index)
        frames = media.read_frames(folder / row['video'], encoder.frame_requests, 0.0, DURATION_S)
        clip, sync = encoder.encode_video(*(stream[None] for stream in frames))
        sound = media.read_audio(folder / row['video'], sequence.sample_rate_hz, 0.0, DURATION_S)
        padded = np.pad(sound, (0, sequence.waveform_length - len(sound)))
        mean, std = coder.encode(padded[None])
        examples.append({'id': row['id'], 'caption': row['caption'], 'duration_s': DURATION_S, 'latent_mean': mean[0],
                         'latent_std': std[0], 'clip_features': clip[0], 'sync_features': sync[0],
                         'text_features': encoder.encode_text([row['caption']])[0], 'video_exists': True, 'text_exists': True})
        rows.append(row)
    (folder / 'test.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    schema = records.schema_of(config)
    records.write_shard(set_folder / records.shard_name('impacts', 'test', 0, 1), map(schema.encode, examples))
    records.write_metadata(set_folder, 'impacts', schema, {'test': [CLIPS]}, {})


def make(workdir: pathlib.Path, with_split: bool = False):
    """The config of the run that is now in workdir."""
    config = make_config()
    write_codec(workdir, config)
    write_weights(workdir, config)
    if with_split:
        write_split(workdir, config)
    return config
