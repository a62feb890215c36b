"""The training loop. An exact resume depends on its order: save, evaluate, next batch, step, then log the step before.

An evaluation that was not done, or not to its end, is done by the run that goes on from its step: each part looks for its
result.
"""
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any, Callable

import jax
import numpy as np

from mmaudio_jax import checkpoints
from mmaudio_jax import config_checks
from mmaudio_jax import distributed
from mmaudio_jax import ema
from mmaudio_jax import encoders
from mmaudio_jax import flops
from mmaudio_jax import hosts
from mmaudio_jax import input_pipeline
from mmaudio_jax import partitioning
from mmaudio_jax import pretrained
from mmaudio_jax import snapshots
from mmaudio_jax import train_log
from mmaudio_jax import train_samples
from mmaudio_jax import train_step
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same during a run: data, network, compiled steps, files."""
    config: Any
    workdir: pathlib.Path
    iterator: Any
    checkpointer: checkpoints.Checkpointer
    log: train_log.TrainLog
    step: Callable  # (state, batch) -> (state, metrics); the state is donated
    validation_loss: Callable  # params -> float
    sample: Callable  # (step, state) -> '' or why there are none
    profile: train_log.Profile


def train(config, workdir: pathlib.Path) -> None:
    """Trains to config.train.total_steps, from the newest checkpoint in the workdir or from the beginning.

    Writes checkpoints/, ema/, logs/ and samples/. A second call does what is missing: nothing, when all steps are done.

    Args:
      config: the run's ConfigDict (configs/base.py).
      workdir: folder of the run; config.data_dir, or the workdir itself, holds records/.

    Raises:
      CheckpointError: the checkpoint is of another config (names the field), the disk is full, or another process trains here.
      NonFiniteError: loss, gradient or state is not finite; the last checkpoint is untouched.
      ValueError: a field of the config that cannot be trained with.
      ValueError, OSError: the records cannot be read on; one process has saved the step that it had reached, as it does when
        an evaluation fails, with whatever error.
      SystemExit: told to stop, after a save, if there was anything to save; code 0 after a preemption notice (SIGTERM), as at
        the end of training (the last line tells them apart), 130 after Ctrl-C.
    """
    train_log.silence()
    config_checks.check(config)
    _check_averages(config)
    workdir = pathlib.Path(workdir)
    with checkpoints.exclusive(workdir), checkpoints.Preemption() as preemption:
        checkpointer = checkpoints.Checkpointer(workdir, config.train, lambda: preemption.noticed)
        try:
            checkpointer.check(config)
            done = checkpointer.latest_step() or 0
            if hosts.agreed(done >= config.train.total_steps) and snapshots.exists(workdir, done):
                hosts.say(f'training: all {done} steps are done (config.train.total_steps), in {checkpointer.directory}')
                preempted = checkpointer.preempted()
            else:
                preempted = _run(config, workdir, checkpointer, preemption)
        except BaseException as error:
            if jax.process_count() == 1 or not distributed.is_lost(error):  # it would wait for a lost one's part
                _close_after(checkpointer, error)
            raise
        checkpointer.close()
    if preempted or preemption.noticed:  # the flag alone: after the loop asked for the last time, or without a loop
        raise SystemExit(preemption.exit_code)


def _close_after(checkpointer: checkpoints.Checkpointer, error: BaseException) -> None:
    """Ends what is being written after an error, which stays the one that ends the run; that of a checkpoint is said only."""
    try:
        checkpointer.close()
    except Exception as failed:
        if str(failed) != str(error):
            print(f'training: {failed}', file=sys.stderr, flush=True)


def _check_averages(config) -> None:
    """Raises ValueError for averages that no weights could be made of."""
    if not config.ema.sigma_rels:
        raise ValueError('config.ema.sigma_rels is empty: there would be no averages, and so no weights to sample from')
    for sigma_rel in (*config.ema.sigma_rels, config.ema.synthesis_sigma_rel):
        ema.sigma_rel_to_gamma(sigma_rel)


def _run(config, workdir: pathlib.Path, checkpointer: checkpoints.Checkpointer, preemption: checkpoints.Preemption) -> bool:
    """Prepares everything and runs the loop; whether it ended because of a preemption notice."""
    mesh = partitioning.make_mesh(config.mesh, config.sharding.slice_axis)
    sequence = Sequence(**config.sequence)
    model = mmaudio.build(config.model, sequence)
    prepared = train_step.prepare(config, model, sequence, mesh)
    records = pathlib.Path(config.data_dir or workdir) / 'records'
    iterator = input_pipeline.train_iterator(config, records, mesh)
    # What these refuse they refuse now: the statistics below are a pass over all records.
    validation_loss = _validation(config, prepared.network, records, mesh)
    sample = train_samples.make_sample(config, prepared, mesh, sequence, records, workdir)
    profile = train_log.Profile(workdir, config.train.profile_steps)
    restored = checkpointer.restore_latest(prepared.state, iterator, config)
    if restored is None:
        snapshots.check(workdir, config)
        if preemption.noticed:  # during the pass over all records it waits: the loop saves what the pass has found, as step 0
            hosts.say(f'told to stop before there was anything to save, at step 0 of {config.train.total_steps}; the same '
                      'command begins again')
            return True
        state, step = _first_state(config, model, sequence, prepared, records), 0
    else:
        state, step = restored
    snapshots.set_aside_later(workdir, step)
    log = train_log.TrainLog(workdir, config, step, config.input.batch_size * flops.training(model, sequence))
    log.say(_opening(config, mesh, prepared.state.params, step))
    job = Job(config=config, workdir=workdir, iterator=iterator, checkpointer=checkpointer, log=log,
              step=prepared.step, validation_loss=validation_loss, sample=sample, profile=profile)
    try:
        return _loop(job, state, step)
    except train_log.NonFiniteError as error:
        checkpointer.close()
        good = checkpointer.latest_step()
        kept = f'the checkpoint of step {good} is untouched' if good is not None else 'there is no checkpoint yet'
        raise train_log.NonFiniteError(f'training stopped: {error}; {kept}. Lower config.optimizer.learning_rate or clip_norm, '
                                       'or look for damaged records, and start again in another --workdir') from error
    finally:
        job.profile.close()
        log.close()
        iterator.close()


def _loop(job: Job, state: train_step.TrainState, step: int) -> bool:
    """Steps until total_steps or a preemption notice; whether it was the latter.

    `pending` is the step whose metrics are still on the device: they are read after the next step was sent off, so that the
    device never waits for the host, and before anything is kept of the state.
    """
    pending: tuple[int, Any] | None = None
    while True:
        preempted = job.checkpointer.preempted()
        last = step >= job.config.train.total_steps
        save = job.checkpointer.should_save(step)
        evaluate = not preempted and _evaluation_is_due(job.config, step, last)
        if save or evaluate:
            with job.log.pause():
                if pending:
                    job.log.add(*pending)
                    pending = None
                _check_finite(state, step)
                if save:
                    _save(job, state, step)
                if evaluate:
                    _evaluate_or_save(job, state, step, last)
        if last or preempted:
            job.checkpointer.wait()
            told = preempted or job.checkpointer.preempted()  # during the last evaluation, which takes its time
            job.log.say(_closing(job, step, told, evaluated=not preempted))
            return told
        job.profile.before(step + 1)
        started = time.monotonic()
        try:
            batch = next(job.iterator)
        except Exception:
            _save_what_is_whole(job, state, step, pending, f'the batch after step {step} cannot be read')
            raise
        read, idle = time.monotonic(), not pending or pending[1]['loss'].is_ready()
        state, metrics = job.step(state, batch)
        job.log.spent(read - started, time.monotonic() - read, idle)
        job.profile.after(step + 1, metrics)
        if pending:
            job.log.add(*pending)
        step += 1
        pending = (step, metrics)


def _save(job: Job, state: train_step.TrainState, step: int) -> None:
    """Starts to write the checkpoint of this step; what its log says is on the disk before."""
    job.log.close_interval()
    job.log.settle()
    job.checkpointer.save(step, state, job.iterator, job.config)


def _save_what_is_whole(job: Job, state: train_step.TrainState, step: int, pending: tuple[int, Any] | None,
                        reason: str) -> None:
    """Keeps this step when what comes after it failed; on one process, for several would have to agree on it.

    That it cannot be saved is said only: the error that ends the run is that of what failed first.
    """
    if jax.process_count() > 1 or step <= (job.checkpointer.latest_step() or 0):
        return
    if pending:
        job.log.add(*pending)
    _check_finite(state, step)
    try:
        _save(job, state, step)
        job.checkpointer.wait()
    except Exception as error:
        job.log.say(f'{reason}, and this step was not saved: {error}')
    else:
        job.log.say(f'{reason}: saved this step in {job.checkpointer.directory}')


def _evaluate_or_save(job: Job, state: train_step.TrainState, step: int, last: bool) -> None:
    """Evaluates; when that fails, the steps since the last checkpoint are kept nevertheless."""
    try:
        _evaluate(job, state, step, last)
    except Exception:
        _save_what_is_whole(job, state, step, None, f'the evaluation of step {step} failed')
        raise


def _evaluate(job: Job, state: train_step.TrainState, step: int, last: bool) -> None:
    """Validation loss, samples and the EMA snapshot that are due at this step; each does nothing when its result is there."""
    config = job.config
    if (last or _due(step, config.train.validate_every)) and not job.log.has(step, 'validation_loss'):
        loss = job.validation_loss(state.params)
        job.log.write(step, {'validation_loss': loss})
        job.log.say(f'step {step}: validation loss {loss:.4f}')
    if config.train.sample_every and (last or _due(step, config.train.sample_every)):
        failure = job.sample(step, state)
        if failure:
            job.log.say(f'step {step}: no samples: {failure}')
    if last or _due(step, config.ema.snapshot_every):
        averages = dict(zip(state.ema.sigma_rels, state.ema.averages, strict=True))
        snapshots.save(job.workdir, step, averages, config)


def _evaluation_is_due(config, step: int, last: bool) -> bool:
    every = (config.train.validate_every, config.train.sample_every, config.ema.snapshot_every)
    return last or any(_due(step, n) for n in every)


def _due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _first_state(config, model: mmaudio.MMAudio, sequence: Sequence, prepared: train_step.Prepared,
                 records: pathlib.Path) -> train_step.TrainState:
    """At step 0: the network as it is initialised, or with the weights of config.weights.start_from."""
    shardings = partitioning.shardings_of(prepared.state)
    if config.weights.start_from:
        placed = partitioning.spread(pretrained.to_train_on(config, model, records.parent), shardings.params)
        return jax.jit(functools.partial(train_step.state_of, config), out_shardings=shardings)(placed)
    load = store.loader(config.weights, config.weights.dtype)
    empty_string_feat = hosts.agreed(encoders.make(config.extract.encoder, sequence, load).encode_text([''])[0])
    statistics = input_pipeline.latent_statistics(config, records)
    return jax.jit(lambda: prepared.init(statistics, empty_string_feat), out_shardings=shardings)()


def _validation(config, model, records: pathlib.Path, mesh: jax.sharding.Mesh) -> Callable[[Any], float]:
    """fn(params) -> mean loss over config.input.validation_examples examples, with the same noise and times at every call."""
    batches = input_pipeline.validation_batches(config, records, mesh)
    rows = np.arange(batches.batch_size, dtype=np.int32)
    step = jax.jit(train_step.make_validation_step(config, model), out_shardings=partitioning.replicated(mesh))

    def loss(params) -> float:
        losses = []
        for number, batch in enumerate(batches):
            losses.append(np.asarray(step(params, batch, number * batches.batch_size + rows)))
        return float(np.mean(np.concatenate(losses)[:batches.count], dtype=np.float64))
    return loss


def _check_finite(state: train_step.TrainState, step: int) -> None:
    """Raises NonFiniteError when a number of the state is not finite: such a state is never kept."""
    if not checkpoints.is_finite(state):
        raise train_log.NonFiniteError(f'a parameter or an average is not finite after step {step}')


def _opening(config, mesh: jax.sharding.Mesh, params: Any, step: int) -> str:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    start = f'continuing from step {step}' if step else 'from the beginning'
    return (f'training {config.name} {start}: {count / 1e6:.2f} M parameters, batches of {config.input.batch_size} on '
            f'{mesh.size} {jax.default_backend()} device{"s" if mesh.size > 1 else ""}')


def _closing(job: Job, step: int, told: bool, evaluated: bool) -> str:
    """The last line: what was done, and what the same command will do; the exit code does not tell a stop from an end."""
    if not told:
        return f'trained {step} steps; checkpoints in {job.checkpointer.directory}'
    if evaluated:
        return (f'told to stop: trained all {step} steps, checkpoints in {job.checkpointer.directory}; the same command goes '
                'on with what comes after training')
    return (f'told to stop: saved step {step} of {job.config.train.total_steps} in {job.checkpointer.directory}; training is '
            'not finished, the same command goes on from there')
