"""Samples during training: the sound of a few validation clips and its spectrogram, beside the truth through the codec."""
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
import functools
import itertools
import pathlib
import re
import shutil
from typing import Any, Callable

import jax
import numpy as np

from mmaudio_jax import codec
from mmaudio_jax import hosts
from mmaudio_jax import input_pipeline
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import plots
from mmaudio_jax import record_sampler
from mmaudio_jax import train_step
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store


def make_sample(config, prepared: train_step.Prepared, mesh: jax.sharding.Mesh, sequence: Sequence,
                records: pathlib.Path, workdir: pathlib.Path) -> Callable[[int, train_step.TrainState], str]:
    """fn(step, state) that writes workdir/samples/<step>: a FLAC file and a PNG for each clip; '' or why it could not.

    The clips are the first config.train.sample_clips of config.input.validation's split 'validation'. The weights are the
    stored average whose width is nearest to config.ema.synthesis_sigma_rel; the negative prompt is ''. A folder that is
    there is left as it is. No samples are made when train.sample_every or train.sample_clips is 0. What process 0 alone does,
    decoding and writing, leaves nothing when it fails, and does not end the run.

    Args:
      config: the run's ConfigDict.
      prepared: the network on the mesh, and where its parameters are; the averages may be split otherwise.
      mesh: of the run.
      sequence: lengths of the clips.
      records: folder of the record sets and of codec.npz.
      workdir: of the run.

    Raises:
      FileNotFoundError, ValueError: the validation set or the codec's file is not there, or rules for activations do not fit
        the sampler; before training rather than during it.
    """
    if not config.train.sample_every or not config.train.sample_clips:
        return lambda step, state: ''
    examples = list(itertools.islice(input_pipeline.read_split(config, records, config.input.validation, 'validation'),
                                     config.train.sample_clips))
    decoder_of = functools.partial(codec.make, config.extract.codec, sequence, records / 'codec.npz',
                                   store.loader(config.weights))
    _try(decoder_of)
    size = partitioning.rounded_up(mesh, len(examples), 'config.train.sample_clips')
    sample = record_sampler.make(config, prepared.network, mesh, sequence, size)
    jax.eval_shape(functools.partial(sample, examples=examples), prepared.state.params)
    gather = jax.jit(lambda params: params, out_shardings=partitioning.shardings_of(prepared.state.params))

    def write(step: int, state: train_step.TrainState) -> str:
        folder = workdir / 'samples' / str(step)
        if hosts.agreed(folder.exists()):
            return ''
        average = gather(_average(state, config.ema.synthesis_sigma_rel))
        latents = hosts.to_host(sample(average, examples))[:len(examples)]
        if jax.process_index() != 0:
            return ''
        truth = np.stack([np.asarray(example['latent_mean'], np.float32) for example in examples])
        try:
            decoder = decoder_of()  # anew each time: its weights would stay in the device's memory
            _write_clips(folder, examples, decoder.decode(latents), decoder.decode(truth), sequence)
        except Exception as error:  # a disk, a codec's file, librosa, the device's memory: none of it is worth the run
            return f'{type(error).__name__}: {error}'.splitlines()[0]
        return ''
    return write


def _try(decoder_of: Callable[[], codec.Codec]) -> None:
    """Reads the codec's weights on process 0, which alone decodes; raises on every process when they cannot be read."""
    failure: Exception | None = None
    try:
        if jax.process_index() == 0:
            decoder_of().program()
    except (ValueError, OSError) as error:
        failure = error
    if hosts.agreed(failure is not None):
        raise failure or ValueError('process 0 cannot read the codec with which samples are decoded')


def _average(state: train_step.TrainState, sigma_rel: float) -> Any:
    """The running average whose width is nearest to sigma_rel."""
    nearest = min(range(len(state.ema.sigma_rels)), key=lambda index: abs(state.ema.sigma_rels[index] - sigma_rel))
    return state.ema.averages[nearest]


def _write_clips(folder: pathlib.Path, examples: Sequence_[Mapping[str, Any]], sounds: np.ndarray, truths: np.ndarray,
                 sequence: Sequence) -> None:
    """One FLAC and one PNG a clip; the folder is renamed when all are written, and removed when they cannot be."""
    partial = folder.with_name(f'.{folder.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for number, (example, sound, truth) in enumerate(zip(examples, np.asarray(sounds), np.asarray(truths), strict=True)):
            name = f'{number:02d}_' + re.sub(r'[^\w.-]+', '_', str(example['id']))[:80]
            sound, truth = sound[:sequence.samples], truth[:sequence.samples]
            media.write_audio(partial / f'{name}.flac', sound, sequence.sample_rate_hz)
            rows = {f'generated: {example["caption"]}': sound, 'truth, through the codec': truth}
            plots.spectrogram(partial / f'{name}.png', rows, sequence.sample_rate_hz)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
