"""A network and a data set so small that a run takes seconds, and runs in processes of their own that can be killed."""
import multiprocessing
import os
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import base
from mmaudio_jax import train
from tests import records_test

TRAIN_CLIPS, VALIDATION_CLIPS = 24, 8
CHECKPOINT_EVERY = 3


class Network(nn.Module):
    """The interface of MMAudio with one hidden layer: compiles in a second, and every condition changes the velocity."""
    latent_channels: int
    clip_width: int = 1024
    sync_width: int = 768
    text_width: int = 1024
    text_length: int = 77
    hidden_size: int = 64

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
    config.sharding.rules = (('hidden|out', ()), )  # Network's layers are not those of MMAudio
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


def _run_in_child(workdir: str, fields: dict, cache: str) -> None:
    log = os.open(f'{workdir}/output.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    train.mmaudio.build = build_network
    train.train(make_config(**fields), pathlib.Path(workdir))


class Run:
    """train.train in a child process that is forked from a server in which everything is imported, but no device started."""

    def __init__(self, workdir: pathlib.Path, cache: pathlib.Path, **train_fields):
        self.output_path = workdir / 'output.txt'
        self.output_path.unlink(missing_ok=True)
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['tests.tiny_run'])
        self.process = context.Process(target=_run_in_child, args=(str(workdir), train_fields, str(cache)))
        self.process.start()

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

    def finish(self) -> str:
        """The output of a run that ends with exit code 0."""
        self.process.join(300)
        assert self.process.exitcode == 0, self.output()
        return self.output()
