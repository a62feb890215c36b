"""A network and a data set so small that a run takes seconds, and runs in processes of their own that can be killed."""
import faulthandler
import json
import multiprocessing
import os
import pathlib
import time
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from mmaudio_jax import distributed
from mmaudio_jax import input_pipeline
from mmaudio_jax import partitioning
from mmaudio_jax import split_sounds
from mmaudio_jax import train
from mmaudio_jax import train_log
from mmaudio_jax.hosts import own_rows
from mmaudio_jax.sequence import Sequence
from tests import records_test

TRAIN_CLIPS, VALIDATION_CLIPS = 24, 8
CHECKPOINT_EVERY = 3
STUCK_AFTER_S = 240
RULES = (('hidden/kernel', (None, 'fsdp')), ('hidden|out', ()))  # of the network below


class Network(nn.Module):
    """The interface of MMAudio with one hidden layer: compiles in a second, and every condition changes the velocity."""
    latent_channels: int
    clip_width: int = 1024
    sync_width: int = 768
    text_width: int = 1024
    text_length: int = 77
    hidden_size: int = 64
    dtype: Any = jnp.float32
    scan_layers: bool = True  # set by the sampler; there is one layer
    joint_blocks: int = 1  # from here on: only read by the count of operations, which is not this network's
    fused_blocks: int = 0
    version: int = 1
    sync_fusion: str = 'none'
    mlp: str = 'linear'

    def setup(self):
        constant = lambda name, shape: self.param(name, nn.initializers.zeros, shape)
        self.latent_mean = constant('latent_mean', (1, 1, self.latent_channels))
        self.latent_std = constant('latent_std', (1, 1, self.latent_channels))
        self.empty_string_feat = constant('empty_string_feat', (self.text_length, self.text_width))
        self.empty_clip_feat = constant('empty_clip_feat', (1, self.clip_width))
        self.empty_sync_feat = constant('empty_sync_feat', (1, self.sync_width))
        self.hidden = nn.Dense(self.hidden_size)
        self.out = nn.Dense(self.latent_channels)

    def __call__(self, latents, t, clip, sync, text):
        means = jnp.concatenate([clip.mean(1), sync.mean(1), text.mean(1), t[:, None]], axis=-1)[:, None]
        conditions = jnp.broadcast_to(means, (*latents.shape[:2], means.shape[-1]))
        return self.out(nn.silu(self.hidden(jnp.concatenate([latents, conditions], axis=-1))))

    def preprocess_conditions(self, clip, sync, text, latent_length):
        del latent_length
        return clip, sync, text

    def velocity(self, latents, t, conditions):
        return self(latents, t, *conditions)

    def empty_features(self, batch, clip_length, sync_length):
        return (jnp.broadcast_to(self.empty_clip_feat, (batch, clip_length, self.clip_width)),
                jnp.broadcast_to(self.empty_sync_feat, (batch, sync_length, self.sync_width)),
                jnp.broadcast_to(self.empty_string_feat, (batch, self.text_length, self.text_width)))

    def normalize(self, latents):
        return (latents - self.latent_mean) / self.latent_std

    def unnormalize(self, latents):
        return latents * self.latent_std + self.latent_mean


def make_config(**train_fields):
    """12 steps of batches of 8; a checkpoint, a snapshot and a validation now and then; no samples."""
    config = base.get_config()
    config.name = 'tiny'
    config.sequence.duration_s = records_test.SCHEMA.duration_s
    config.extract.encoder, config.extract.codec = 'pixels', 'pca'
    config.input.mixture, config.input.validation, config.input.statistics = (('bells', 2),), 'bells', 'bells'
    config.input.batch_size = config.input.validation_batch_size = 8
    config.input.workers = 0
    # Network's layers are not those of MMAudio.
    config.sharding.rules = RULES
    config.model.update(hidden_size=64, num_heads=1, joint_blocks=2, fused_blocks=1, dtype='float32')
    config.optimizer.update(learning_rate=1e-3, warmup_steps=5, schedule='constant')
    config.ema.snapshot_every = 4
    config.train.update(total_steps=12, log_every=2, validate_every=4, sample_every=0, sample_clips=2,
                        checkpoint_every=CHECKPOINT_EVERY)
    config.train.update(train_fields)
    return config


def write_records(workdir: pathlib.Path) -> None:
    """The record set 'bells' in workdir/records."""
    lengths = {'train': [TRAIN_CLIPS], 'validation': [VALIDATION_CLIPS]}
    records_test.write_set(workdir / 'records' / 'bells', lengths)


def build_network(model_config, sequence) -> Network:
    """Stands in for models.mmaudio.build."""
    del model_config
    return Network(sequence.latent_channels)


def start_child(target: Callable[..., None], output: pathlib.Path, devices: int, *args: Any) -> Any:
    """`target`(*`args`) in a process forked from a server in which everything is imported, but no device started.

    Its output goes to a file; it has that many devices, 0 for all. After STUCK_AFTER_S it says where it is, and ends.
    """
    output.unlink(missing_ok=True)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['tests.tiny_run'])
    process = context.Process(target=_in_child, args=(target, str(output), devices, *args))
    process.start()
    return process


def _in_child(target: Callable[..., None], output: str, devices: int, *args: Any) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(STUCK_AFTER_S, exit=True)
    if devices:
        os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={devices}'
    target(*args)


def read_epoch(folder: str, hosts: dict) -> None:
    """One of several processes reads an epoch; writes (row, value) of its rows of every batch to folder/epoch_<index>.json."""
    config = make_config()
    config.hosts.update(hosts)
    with distributed.joined(config.hosts, alone=False):
        mesh = partitioning.make_mesh({'data': -1})
        iterator = input_pipeline.train_iterator(config, pathlib.Path(folder) / 'records', mesh)
        seen = []
        for _ in range(2 * TRAIN_CLIPS // config.input.batch_size):
            shards = next(iterator)['latent_mean'].addressable_shards
            seen.append([(shard.index[0].start + row, float(value)) for shard in shards
                         for row, value in enumerate(np.asarray(shard.data)[:, 0, 0])])
        iterator.close()
        (pathlib.Path(folder) / f'epoch_{hosts["index"]}.json').write_text(json.dumps(seen))


class AsItIs:
    """In place of a codec: the latents are the sound."""

    def program(self):
        return (), lambda parameters, latents: latents


class TwiceTheFirstChannel:
    """In place of a codec."""

    def program(self):
        return np.float32(2), lambda gain, latents: gain * latents[..., 0]


def sample(folder: str, hosts: dict) -> None:
    """One of several processes samples the validation split with random weights.

    The first writes the latents, and each one those waveforms of the first batch that are its own.
    """
    config = make_config()
    config.hosts.update(hosts)
    config.mesh.update(data=-1, fsdp=2)
    config.sampling.update(num_steps=2, batch_size=4)
    with distributed.joined(config.hosts, alone=False):
        sequence = Sequence(**config.sequence)
        model = build_network(config.model, sequence)
        records = pathlib.Path(folder) / 'records'
        examples = list(input_pipeline.read_split(config, records, 'bells', 'validation'))[:6]  # the last batch is filled up
        shapes = (sequence.latent_length, sequence.latent_channels), (), (8, 1024), (8, 768), (77, 1024)
        init = jax.jit(lambda: model.init(jax.random.key(0), *(jnp.zeros((1, *shape)) for shape in shapes))['params'])
        params = {**jax.tree.map(np.asarray, init()), 'latent_std': np.ones((1, 1, sequence.latent_channels), np.float32)}
        latents = split_sounds.sample(config, model, params, examples, sequence, AsItIs())
        if jax.process_index() == 0:
            np.save(pathlib.Path(folder) / f'latents_{hosts["count"]}.npy', latents)
        run = split_sounds.make_sampler(config, model, params, sequence, *split_sounds.mesh_and_size(config),
                                        TwiceTheFirstChannel())
        rows = own_rows(run(examples[:4], 0))
        np.savez(pathlib.Path(folder) / f'rows_{hosts["count"]}_{jax.process_index()}.npz',
                 **{str(row): waveform for row, waveform in rows.items()})


def _train(workdir: str, fields: dict, cache: str, hosts: dict, devices: int, pause_s: float) -> None:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    train.mmaudio.build = build_network
    add = train_log.TrainLog.add
    train_log.TrainLog.add = lambda *args: (time.sleep(pause_s), add(*args))
    config = make_config(**fields)
    config.hosts.update(hosts)
    if devices:
        config.mesh.update(data=-1, fsdp=2)
    with distributed.joined(config.hosts, alone=not hosts):
        train.train(config, pathlib.Path(workdir))


class Run:
    """train.train in a child process.

    Args:
      workdir: of the run; its output is in output_<index>.txt there.
      cache: folder of compiled programs.
      hosts: fields of config.hosts, when it is one of several processes.
      devices: how many this process has, in a mesh with fsdp 2; 0: all eight, data parallel.
      pause_s: after every step.
      train_fields: of config.train.
    """

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, hosts: dict | None = None, devices: int = 0,
                 pause_s: float = 0.0, **train_fields):
        hosts = hosts or {}
        self.output_path = workdir / f'output_{hosts.get("index", 0)}.txt'
        self.process = start_child(_train, self.output_path, devices, str(workdir), train_fields, str(cache), hosts, devices,
                                   pause_s)

    def output(self) -> str:
        """What the run has printed so far."""
        return self.output_path.read_text() if self.output_path.exists() else ''

    def wait_for(self, text: str, count: int = 1) -> None:
        """Returns when the run has printed the text that often, or has ended."""
        while self.output().count(text) < count and self.process.is_alive():
            time.sleep(0.01)

    def kill(self) -> None:
        """As `kill -9` does."""
        self.process.kill()
        self.process.join()

    def finish(self, code: int = 0) -> str:
        """The output of a run that ends with this exit code."""
        self.process.join(STUCK_AFTER_S + 30)
        everything = '\n'.join(path.read_text() for path in sorted(self.output_path.parent.glob('output_*.txt')))
        assert self.process.exitcode == code, everything
        return self.output()
