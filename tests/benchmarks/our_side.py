"""Our models as rows of the comparison: jitted, float32, on the CPU."""
from collections.abc import Callable
from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import s_16k
from mmaudio_jax import ema
from mmaudio_jax import optimizer
from mmaudio_jax import train_step
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import clip as clips
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import synchformer as synchformers
from mmaudio_jax.models import vae as vaes
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import bigvgan as bigvgan_weights
from mmaudio_jax.weights import clip as clip_weights
from mmaudio_jax.weights import mmaudio as mmaudio_weights
from mmaudio_jax.weights import synchformer as synchformer_weights
from mmaudio_jax.weights import vae as vae_weights

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], np.ndarray]


def on_device(tree: Any) -> Any:
    """The arrays of nested dictionaries as JAX arrays; empties the dictionaries, so that the weights are never held twice."""
    if not isinstance(tree, dict):
        return jnp.asarray(tree)
    return {name: on_device(tree.pop(name)) for name in list(tree)}


def _run(function: Callable, *arguments: Any) -> Run:
    jitted = jax.jit(function)
    return lambda: np.asarray(jitted(*arguments))


def _network(tensors: Arrays) -> tuple[Any, Any]:
    config = s_16k.get_config()
    model = mmaudio.build(dict(config.model) | {'dtype': 'float32'}, Sequence('16k', 8.0))
    return model, on_device(mmaudio_weights.to_params(tensors, model))


def flow(tensors: Arrays, inputs: Arrays) -> Run:
    """One velocity of small_16k; the conditions are prepared beforehand."""
    model, params = _network(tensors)
    apply = lambda method: lambda params, *args: model.apply({'params': params}, *args, method=method)
    prepare = jax.jit(apply('preprocess_conditions'), static_argnums=4)
    conditions = prepare(params, inputs['clip'], inputs['sync'], inputs['text'], inputs['latents'].shape[1])
    return _run(apply('velocity'), params, inputs['latents'], inputs['t'], conditions)


def train(tensors: Arrays, inputs: Arrays) -> Run:
    """One training step with given draws, its state donated; returns loss and gradient norm."""
    config = s_16k.get_config()
    config.optimizer.eps = 1e-8
    model, params = _network(tensors)
    tx, schedule = optimizer.make(config.optimizer, params)
    state = train_step.TrainState(jnp.int32(0), params, tx.init(params), ema.init(params, config.ema.sigma_rels))
    holder = [state]
    del state, params
    steps = iter(range(len(inputs['t'])))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, draws):
        return train_step.step_with_draws(state, model, tx, schedule, config.flow.min_sigma, batch, draws)[:2]

    def run():
        x = {name: array[index] for index in [next(steps)] for name, array in inputs.items()}
        exists = np.ones(len(x['t']), bool)
        batch = {'latent_mean': x['latent_mean'], 'latent_std': x['latent_std'], 'clip_features': x['clip'],
                 'sync_features': x['sync'], 'text_features': x['text'], 'video_exists': exists, 'text_exists': exists}
        draws = train_step.Draws(x['posterior_noise'], x['noise'], x['t'], x['drop_video'], x['drop_video'], x['drop_text'])
        holder[0], metrics = step(holder.pop(), batch, draws)
        return np.array([metrics['loss'], metrics['grad_norm']])

    return run


def vae(rate: str) -> Callable[[Arrays, Arrays], Run]:
    """Latents → mel."""

    def build(tensors, inputs):
        model = vaes.build(rate)
        params = vae_weights.to_params(tensors, model)
        del params['encoder']
        return _run(lambda params, x: model.apply({'params': params}, x, method='decode'), on_device(params), inputs['latents'])

    return build


def vocoder(rate: str) -> Callable[[Arrays, Arrays], Run]:
    """Mel → waveform."""

    def build(tensors, inputs):
        model = bigvgan.build(rate)
        params = on_device(bigvgan_weights.to_params(tensors, model))
        return _run(lambda params, x: model.apply({'params': params}, x), params, inputs['mel'])

    return build


def synchformer(tensors: Arrays, inputs: Arrays) -> Run:
    """Frames of one segment → its eight tokens."""
    model = synchformers.build('visual', jnp.float32)
    params = on_device(synchformer_weights.to_params(tensors, model))
    return _run(lambda params, x: model.apply({'params': params}, x), params, inputs['frames'])


def clip(tensors: Arrays, inputs: Arrays) -> Run:
    """One frame → its feature."""
    model = clips.build('vit_h_14_378', jnp.float32)
    params = clip_weights.to_params(tensors, model)
    del params['text']
    return _run(lambda params, x: model.apply({'params': params}, x, method='encode_image'), on_device(params), inputs['frame'])


BUILDERS = {
    'flow': flow,
    'train': train,
    'train_compiled': train,
    'vae_16k': vae('16k'),
    'vae_44k': vae('44k'),
    'vocoder_16k': vocoder('16k'),
    'vocoder_44k': vocoder('44k'),
    'synchformer': synchformer,
    'clip': clip,
}
