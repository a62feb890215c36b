"""Our models as rows of the comparison: compiled, float32, on the CPU."""
from collections.abc import Callable
from collections.abc import Mapping
import ctypes
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.weights import files
from mmaudio_jax.weights import store
from tests.benchmarks import rows

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], np.ndarray]


def _load(model: str, folder: pathlib.Path) -> tuple[Any, Any]:
    """The Flax module and its parameters, which stay in the mapped file and are read when they are used."""
    return store.build(model), store.load(model, **rows.places(folder))


def _compile(function: Callable, *arguments: Any, **options: Any) -> Any:
    """`function` compiled for arguments like these; what the compiler freed goes back to the system."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arguments)
    compiled = jax.jit(function, **options).lower(*shapes).compile()
    ctypes.CDLL(None).malloc_trim(0)
    return compiled


def _run(function: Callable, params: Any, *arguments: Any) -> Run:
    compiled = _compile(function, params, *arguments)
    params = jax.device_put(params)
    return lambda: np.asarray(compiled(params, *arguments))


def flow(folder: pathlib.Path, inputs: Arrays) -> Run:
    """One velocity of small_16k; the conditions are prepared beforehand."""
    model, params = _load('mmaudio_small_16k', folder)
    apply = lambda method: lambda params, *args: model.apply({'params': params}, *args, method=method)
    features = (inputs['clip'], inputs['sync'], inputs['text'])
    prepare = _compile(lambda params, *args: apply('preprocess_conditions')(params, *args, inputs['latents'].shape[1]), params,
                       *features)
    return _run(apply('velocity'), params, inputs['latents'], inputs['t'], prepare(params, *features))


def train(folder: pathlib.Path, inputs: Arrays) -> Run:
    """One training step with given draws, its state donated; returns loss and gradient norm."""
    from configs import s_16k
    from mmaudio_jax import ema
    from mmaudio_jax import optimizer
    from mmaudio_jax import train_step
    config = s_16k.get_config()
    config.optimizer.eps = 1e-8
    config.model.scan_layers, config.model.remat = True, 'dots'  # on CPUs less memory, and a shorter compilation
    model, params = _load('mmaudio_small_16k', folder)
    model = model.clone(remat=config.model.remat, scan_layers=config.model.scan_layers)
    tx, schedule = optimizer.make(config.optimizer, params)

    def init(params):
        return train_step.TrainState(jnp.int32(0), params, tx.init(params), ema.init(params, config.ema.sigma_rels))

    def one_step(state, batch, draws):
        return train_step.step_with_draws(state, model, tx, schedule, config.flow.min_sigma, batch, draws)[:2]

    def arguments(index):
        x = {name: array[index] for name, array in inputs.items()}
        exists = np.ones(len(x['t']), bool)
        batch = {'latent_mean': x['latent_mean'], 'latent_std': x['latent_std'], 'clip_features': x['clip'],
                 'sync_features': x['sync'], 'text_features': x['text'], 'video_exists': exists, 'text_exists': exists}
        return batch, train_step.Draws(x['posterior_noise'], x['noise'], x['t'], x['drop_video'], x['drop_video'],
                                       x['drop_text'])

    step = _compile(one_step, jax.eval_shape(init, params), *arguments(0), donate_argnums=0)
    state = [init(jax.tree.map(jnp.array, params))]
    del params
    indices = iter(range(len(inputs['t'])))

    def run():
        new, metrics = step(state.pop(), *arguments(next(indices)))
        state.append(new)
        return np.array([metrics['loss'], metrics['grad_norm']])

    return run


def vae(rate: str) -> Callable[[pathlib.Path, Arrays], Run]:
    """Latents → mel."""

    def build(folder, inputs):
        model, params = _load(f'vae_{rate}', folder)
        del params['encoder']
        return _run(lambda params, x: model.apply({'params': params}, x, method='decode'), params, inputs['latents'])

    return build


def vocoder(name: str) -> Callable[[pathlib.Path, Arrays], Run]:
    """Mel → waveform."""

    def build(folder, inputs):
        model, params = _load(name, folder)
        return _run(lambda params, x: model.apply({'params': params}, x), params, inputs['mel'])

    return build


def synchformer(folder: pathlib.Path, inputs: Arrays) -> Run:
    """Frames of one segment → its eight tokens."""
    model, params = _load(files.SYNCHFORMER, folder)
    return _run(lambda params, x: model.apply({'params': params}, x), params, inputs['frames'])


def clip(folder: pathlib.Path, inputs: Arrays) -> Run:
    """One frame → its feature."""
    model, params = _load(files.CLIP, folder)
    del params['text']
    return _run(lambda params, x: model.apply({'params': params}, x, method='encode_image'), params, inputs['frame'])


BUILDERS = {
    'flow': flow,
    'train': train,
    'train_compiled': train,
    'vae_16k': vae('16k'),
    'vae_44k': vae('44k'),
    'vocoder_16k': vocoder('bigvgan_16k'),
    'vocoder_44k': vocoder('bigvgan_v2_44k'),
    'synchformer': synchformer,
    'clip': clip,
}
