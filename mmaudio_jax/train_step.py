"""One training step and one validation step: batch and draws → loss → gradient → parameters and averages.

All randomness of a step is fold_in(fold_in(key(seed), step), name); nothing random is stored in the state.
Source: MMAudio (arXiv 2412.15322), sections 3.1 and 4.1.
"""
import functools
from typing import Any, Callable, Mapping, NamedTuple
import zlib

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmaudio_jax import ema
from mmaudio_jax import flow_matching
from mmaudio_jax import optimizer
from mmaudio_jax import partitioning
from mmaudio_jax.sequence import Sequence

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

# Options of the TPU compiler for config.train.async_gradients: sums of gradients go on beside the products of the backward
# pass. Two allow it, on v5e alone: elsewhere newer compilers refuse them. One keeps sums apart, because the compiler waits for
# those that it joins. The last: a sum and a product at once need more vector memory than each alone.
ASYNC_GRADIENTS = {
    'xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter': 'true',
    'xla_enable_async_reduce_scatter_fusion': 'true',
    'xla_tpu_ars_combiner_threshold_in_bytes': '1000000',
    'xla_tpu_scoped_vmem_limit_kib': '24576',
}
# The same where sparse cores can sum (v5p, v6e): weights are gathered beside the products, too.
ASYNC_GRADIENTS_SPARSE = {
    'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': 'true',
    'xla_tpu_enable_sparse_core_collective_offload_all_gather': 'true',
    'xla_tpu_enable_sparse_core_collective_offload_all_reduce': 'true',
    'xla_tpu_enable_async_collective_fusion': 'true',
    'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
    'xla_tpu_overlap_compute_collective_tc': 'true',
    'xla_enable_async_all_gather': 'true',
}
ASYNC_GRADIENTS_OF = {  # by the names that JAX gives to v5e, v5p and v6e
    **dict.fromkeys(('TPU v5 lite', 'TPU v5e'), ASYNC_GRADIENTS),
    **dict.fromkeys(('TPU v5', 'TPU v5p', 'TPU v6 lite', 'TPU v6e'), ASYNC_GRADIENTS_SPARSE),
}


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32 [], steps taken, also those that were left out because they were not finite.
      params: parameters of models.mmaudio.MMAudio, float32, with the constants latent_mean, latent_std, empty_string_feat.
      opt_state: state of optimizer.make's transformation.
      ema: running averages of the parameters.
    """
    step: jax.Array
    params: Any
    opt_state: Any
    ema: ema.EMAState


@flax.struct.dataclass
class Draws:
    """The random numbers of one step.

    Attributes:
      posterior_noise: `[B, N, C]` standard normal; picks a latent from the distribution that the VAE gave.
      noise: `[B, N, C]` standard normal; x0 of the path.
      t: `[B]` times; 0 is noise, 1 is data.
      drop_clip, drop_sync, drop_text: `[B]` bool; the condition is withheld so that guidance has an empty case. This is
        not the mask of examples without video or text.
    """
    posterior_noise: jax.Array
    noise: jax.Array
    t: jax.Array
    drop_clip: jax.Array
    drop_sync: jax.Array
    drop_text: jax.Array


def named_key(key: jax.Array, name: str) -> jax.Array:
    """The key for the use `name`: independent of the order in which names are asked for."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def sample_draws(key: jax.Array, config, batch: Batch) -> Draws:
    """Draws for a training step.

    CLIP and sync are dropped together with probability config.flow.video_dropout, or each on its own when
    config.flow.independent_video_dropout; text always on its own, with probability config.flow.text_dropout.

    Args:
      key: the key of the step.
      config: the configuration; its section `flow` is read.
      batch: its `latent_mean` `[B, N, C]` gives the shapes.

    Returns:
      Draws, float32 and bool.
    """
    shape = batch['latent_mean'].shape
    drop = lambda name, rate: jax.random.bernoulli(named_key(key, name), rate, shape[:1])
    drop_clip = drop('drop_clip', config.flow.video_dropout)
    independent = config.flow.independent_video_dropout
    return Draws(posterior_noise=jax.random.normal(named_key(key, 'posterior_noise'), shape),
                 noise=jax.random.normal(named_key(key, 'noise'), shape),
                 t=flow_matching.sample_times(named_key(key, 't'), shape[0]),
                 drop_clip=drop_clip,
                 drop_sync=drop('drop_sync', config.flow.video_dropout) if independent else drop_clip,
                 drop_text=drop('drop_text', config.flow.text_dropout))


def per_example_loss(params: Any, model, min_sigma: float, batch: Batch, draws: Draws) -> jax.Array:
    """Flow-matching loss of every example, a pure function of its arguments.

    Args:
      params: parameters of `model`.
      model: models.mmaudio.MMAudio.
      min_sigma: of the path (flow_matching.interpolate).
      batch: latent_mean and latent_std `[B, N, C]`, clip_features `[B, V, 1024]`, sync_features `[B, S, 768]`,
        text_features `[B, 77, 1024]`, of any float dtype, cast to float32 here; video_exists and text_exists `[B]` bool.
      draws: the random numbers.

    Returns:
      `[B]` float32.
    """
    apply = lambda method, *args: model.apply({'params': params}, *args, method=method)
    read = lambda name: batch[name].astype(jnp.float32)
    latents = apply('normalize', read('latent_mean') + read('latent_std') * draws.posterior_noise)
    clip, sync, text = read('clip_features'), read('sync_features'), read('text_features')
    empty_clip, empty_sync, empty_text = apply('empty_features', clip.shape[0], clip.shape[1], sync.shape[1])
    # An example without video has no features to speak of (whatever the record holds); one whose video is dropped has them.
    # Both look alike to the network, but only the second is random.
    no_video, no_text = ~batch['video_exists'], ~batch['text_exists']
    clip = _replace(clip, empty_clip, no_video | draws.drop_clip)
    sync = _replace(sync, empty_sync, no_video | draws.drop_sync)
    text = _replace(text, empty_text, no_text | draws.drop_text)
    x_t = flow_matching.interpolate(draws.noise, latents, draws.t, min_sigma)
    velocity = model.apply({'params': params}, x_t, draws.t, clip, sync, text)
    return flow_matching.loss(velocity, flow_matching.target(draws.noise, latents, min_sigma))


def init_state(config, model, sequence: Sequence, statistics: tuple[np.ndarray, np.ndarray],
               empty_string_feat: np.ndarray) -> TrainState:
    """A new state at step 0; can be traced by jax.eval_shape and jax.jit as long as the arrays are numpy.

    Args:
      config: the configuration.
      model: models.mmaudio.MMAudio.
      sequence: lengths of the training clips (no parameter depends on them).
      statistics: (mean `[C]`, std `[C]`) of the latents, kept in the parameters as latent_mean and latent_std.
      empty_string_feat: `[77, 1024]` encoding of ''.

    Returns:
      TrainState.

    Raises:
      ValueError: statistics or empty_string_feat of a wrong shape, not finite, or a std that is not positive.
    """
    constants = {'latent_mean': statistics[0], 'latent_std': statistics[1], 'empty_string_feat': empty_string_feat}
    for name, value in constants.items():
        if not np.isfinite(value).all():
            raise ValueError(f'{name} is not finite: the records or the encoder that it was measured on are damaged')
    if (np.asarray(statistics[1]) <= 0).any():
        raise ValueError('latent_std has a channel without spread: config.input.statistics names a record set with too few '
                         'clips or with constant ones; choose another set or extract more clips')
    key = named_key(jax.random.key(config.seed), 'init')
    zeros = lambda length, width: jnp.zeros((1, length, width), jnp.float32)
    params = dict(model.init(key, zeros(sequence.latent_length, model.latent_channels), jnp.zeros(1),
                             zeros(sequence.clip_length, model.clip_width), zeros(sequence.sync_length, model.sync_width),
                             zeros(model.text_length, model.text_width))['params'])
    for name, value in constants.items():
        if np.size(value) != params[name].size or np.shape(value)[-1:] != params[name].shape[-1:]:
            raise ValueError(f'{name} has shape {np.shape(value)}, the network wants {params[name].shape}: do '
                             'config.sequence.rate and the encoder match those of the records?')
        params[name] = jnp.asarray(value, jnp.float32).reshape(params[name].shape)
    return state_of(config, params)


def state_of(config, params: Any) -> TrainState:
    """The state at step 0 around given parameters; can be traced."""
    tx, _ = optimizer.make(config.optimizer, params)
    return TrainState(step=jnp.zeros([], jnp.int32),
                      params=params,
                      opt_state=tx.init(params),
                      ema=ema.init(params, config.ema.sigma_rels))


def apply_gradients(state: TrainState, tx: optax.GradientTransformation, gradients: Any, use: jax.Array) -> TrainState:
    """The state after one optimizer step and one update of the averages; parameters and moments stay unless `use` (bool [])."""
    updates, opt_state = tx.update(gradients, state.opt_state, state.params, use=use)
    params = optimizer.choose(use, optax.apply_updates(state.params, updates), state.params)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema.update(state.ema, params))


def loss_and_gradients(params: Any, model, min_sigma: float, batch: Batch, draws: Draws,
                       microbatches: int) -> tuple[jax.Array, jax.Array, Any]:
    """The mean loss, the losses `[B]`, and the gradients of the mean, zero where frozen.

    Args:
      params, model, min_sigma, batch, draws: as for per_example_loss.
      microbatches: parts of the batch that are computed one after the other; divides B. The result is the same to rounding.
    """

    def mean_loss(params, batch, draws):
        losses = per_example_loss(optimizer.stop_frozen(params), model, min_sigma, batch, draws)
        return jnp.mean(losses), losses

    compute = jax.value_and_grad(mean_loss, has_aux=True)
    if microbatches == 1:
        (loss, losses), gradients = compute(params, batch, draws)
        return loss, losses, gradients

    def add(carry, part):
        (loss, losses), gradients = compute(params, *part)
        return jax.tree.map(jnp.add, carry, (loss, gradients)), losses

    # Part m has the rows m, m + microbatches, …: so each device computes on its own rows in every part.
    split = lambda rows: jnp.moveaxis(rows.reshape(-1, microbatches, *rows.shape[1:]), 1, 0)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros([]), params))
    sums, losses = jax.lax.scan(add, zeros, jax.tree.map(split, (dict(batch), draws)))
    loss, gradients = jax.tree.map(lambda total: total / microbatches, sums)
    return loss, losses.T.reshape(-1), gradients


def step_with_draws(state: TrainState, model, tx: optax.GradientTransformation, schedule: optax.Schedule, min_sigma: float,
                    batch: Batch, draws: Draws, microbatches: int = 1) -> tuple[TrainState, Metrics, tuple[jax.Array, Any]]:
    """A step with given random numbers.

    Args:
      state: the state before the step.
      model, min_sigma, batch, draws, microbatches: as for loss_and_gradients.
      tx, schedule: what optimizer.make returned.

    Returns:
      (the new state; the metrics of make_train_step; (losses `[B]`, gradients like the parameters, zero where frozen)).
    """
    loss, losses, gradients = loss_and_gradients(state.params, model, min_sigma, batch, draws, microbatches)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    metrics = {'loss': loss, 'grad_norm': norm, 'learning_rate': schedule(optimizer.updates_done(state.opt_state))}
    return apply_gradients(state, tx, gradients, finite), metrics, (losses, gradients)


def make_train_step(config, model, tx: optax.GradientTransformation,
                    schedule: optax.Schedule) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure step, to be jitted by the caller with its shardings and the state donated.

    Args:
      config: the configuration; `seed`, `flow` and `train.microbatches` are read.
      model: models.mmaudio.MMAudio, on several devices as partitioning.OnMesh.
      tx, schedule: what optimizer.make returned.

    Returns:
      fn(state, batch) -> (state, metrics), metrics as float32 []: loss (mean over the batch), grad_norm (before clipping),
      learning_rate. When loss or grad_norm is not finite, parameters and moments stay as they were; the step counts, and
      the averages see the same parameters once more.
    """

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        draws = sample_draws(key, config, batch)
        state, metrics, _ = step_with_draws(state, model, tx, schedule, config.flow.min_sigma, batch, draws,
                                            config.train.microbatches)
        return state, metrics

    return train_step


class Prepared(NamedTuple):
    """A training step ready to be compiled.

    Attributes:
      init: (statistics, empty_string_feat) -> TrainState, see init_state.
      state: shapes and shardings of the TrainState.
      network: on the mesh.
      step: make_train_step's, jitted; the state that goes in is given up for the one that comes out.
    """
    init: Callable[[tuple[np.ndarray, np.ndarray], np.ndarray], TrainState]
    state: TrainState
    network: partitioning.OnMesh
    step: jax.stages.Wrapped


def prepare(config, model, sequence: Sequence, mesh: jax.sharding.Mesh) -> Prepared:
    """The step of a configuration on a mesh; nothing is computed yet.

    Raises:
      ValueError: microbatches, optimizer or rules do not fit (names the field).
    """
    partitioning.check_microbatches(mesh, config)
    init = functools.partial(init_state, config, model, sequence)
    channels, empty = sequence.latent_channels, np.zeros((model.text_length, model.text_width))
    shapes = jax.eval_shape(lambda: init((np.zeros(channels), np.ones(channels)), empty))
    shardings = partitioning.state_shardings(mesh, shapes, config)
    network = partitioning.on_mesh(model, mesh, config)
    step = jax.jit(make_train_step(config, network, *optimizer.make(config.optimizer, shapes.params)), donate_argnums=0,
                   in_shardings=(shardings, partitioning.batch_sharding(mesh)),
                   out_shardings=(shardings, partitioning.replicated(mesh)),
                   compiler_options=compiler_options(config, mesh.devices.flat[0]))
    return Prepared(init, partitioning.abstract(shapes, shardings), network, step)


def compiler_options(config, device: Any) -> dict[str, str] | None:
    """What a TPU's compiler is told of the step, None elsewhere; config.train.compiler_options overrides async_gradients.

    Raises:
      ValueError: async_gradients on a TPU of another kind.
    """
    if device.platform != 'tpu':
        return None
    given = dict(config.train.compiler_options)
    if not config.train.async_gradients:
        return given
    if device.device_kind not in ASYNC_GRADIENTS_OF:
        raise ValueError(f'config.train.async_gradients has no options for {device.device_kind!r}, only for '
                         f'{", ".join(ASYNC_GRADIENTS_OF)}: leave it False')
    return ASYNC_GRADIENTS_OF[device.device_kind] | given


def make_validation_step(config, model) -> Callable[[Any, Batch, jax.Array], jax.Array]:
    """The loss of examples with noise and times that belong to each example, so that runs and steps can be compared.

    Args:
      config: the configuration; `seed` and `flow` are read. Nothing is dropped.
      model: models.mmaudio.MMAudio.

    Returns:
      fn(params, batch, indices `[B]` int32) -> `[B]` float32; an example's loss depends on its index, not on its batch.
    """

    def draw(index, shape):
        key = jax.random.fold_in(named_key(jax.random.key(config.seed), 'validation'), index)
        keep = jnp.zeros([], bool)
        return Draws(posterior_noise=jax.random.normal(named_key(key, 'posterior_noise'), shape),
                     noise=jax.random.normal(named_key(key, 'noise'), shape),
                     t=flow_matching.sample_times(named_key(key, 't'), 1)[0],
                     drop_clip=keep, drop_sync=keep, drop_text=keep)

    def validation_step(params, batch, indices):
        draws = jax.vmap(lambda index: draw(index, batch['latent_mean'].shape[1:]))(indices)
        return per_example_loss(params, model, config.flow.min_sigma, batch, draws)

    return validation_step


def _replace(features: jax.Array, empty: jax.Array, mask: jax.Array) -> jax.Array:
    """`[B, L, F]` features, those of the examples in mask `[B]` replaced by empty `[B, L, F]`."""
    return jnp.where(mask[:, None, None], empty, features)
