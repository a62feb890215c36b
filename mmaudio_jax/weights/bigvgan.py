"""The vocoders' official tensors (best_netG.pt, bigvgan_generator.pt; the dictionary under 'generator') → our parameters.

Weight norm (g · v / ‖v‖) is multiplied out, snake's logarithmic parameters are exponentiated, and the transposed
convolutions' taps are put into the order of their phases: all once, here.
"""
from collections.abc import Iterator
from collections.abc import Mapping
import re

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import bigvgan
from mmaudio_jax.weights import names

_EPS = 1e-9  # keeps the amplitude finite
_PARAMETRIZED = {'parametrizations.weight.original0': 'weight_g', 'parametrizations.weight.original1': 'weight_v'}
_LEAVES = {'up': 'upsample.filter', 'down': 'downsample.lowpass.filter', 'frequency': 'act.alpha', 'amplitude': 'act.beta'}


def leaves(tensors: Mapping[str, np.ndarray], model: bigvgan.BigVGAN) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Official tensors by name → parameters of `model` one by one with their paths, float32 NumPy arrays.

    Weight norm may be stored as weight_g and weight_v or as parametrizations.weight.original0 and original1.

    Raises:
      ValueError: before the first: names every missing, unexpected and misshapen tensor.
    """
    tensors = {_old_name(name): tensor for name, tensor in tensors.items()}
    shapes = names.parameter_shapes(model, jax.ShapeDtypeStruct((1, 4, model.mel_bins), jnp.float32))
    expected = {name: shape for path, leaf in shapes.items() for name, shape in _official(path, leaf).items()}
    names.check(expected, {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()},
                'the weights do not fit this vocoder; best_netG.pt is the 16k one, bigvgan_generator.pt the 44k one')
    for path, leaf in shapes.items():
        yield path, _import(path, leaf, [np.asarray(tensors[name], np.float32) for name in _official(path, leaf)])


def _old_name(name: str) -> str:
    for new, old in _PARAMETRIZED.items():
        name = name.replace(new, old)
    return name


def _modules(path: tuple[str, ...]) -> list[tuple[str, str]]:
    """Names of the official convolution and activation of every layer that the module at `path` holds."""
    module = re.sub(r'_(\d+)', r'.\1', '.'.join(path[:-1])) if path[0].startswith(('ups', 'resblocks')) else path[0]
    if not module.startswith('resblocks'):
        module = f'{module}.0' if module.startswith('ups') else module
        return [(module, module)]
    return [(f'{module}.convs{layer % 2 + 1}.{layer // 2}', f'{module}.activations.{layer}') for layer in range(6)]


def _official(path: tuple[str, ...], shape: names.Shape) -> dict[str, names.Shape]:
    """Names and shapes of the official tensors that make the leaf at `path`, layer by layer."""
    modules = _modules(path)
    shape = shape if len(modules) == 1 else shape[1:]
    result: dict[str, names.Shape] = {}
    for conv, activation in modules:
        if path[-1] in ('up', 'down'):
            result[f'{activation}.{_LEAVES[path[-1]]}'] = (1, 1, *shape)
        elif path[-1] in _LEAVES:
            result[f'{activation}.{_LEAVES[path[-1]]}'] = shape
        elif path[-1] == 'bias':
            result[f'{conv}.bias'] = shape
        else:
            taps, channels, out = shape
            # A stage halves the channels; its kernel is (2, D, rate · out) here and (D, out, 2 · rate) there.
            v = (channels, channels // 2, 4 * out // channels) if conv.startswith('ups') else (out, channels, taps)
            result |= {f'{conv}.weight_g': (v[0], 1, 1), f'{conv}.weight_v': v}
    return result


def _import(path: tuple[str, ...], shape: names.Shape, tensors: list[np.ndarray]) -> np.ndarray:
    if path[-1] == 'kernel':
        kernels = [_kernel(g, v, path[0].startswith('ups')) for g, v in zip(tensors[::2], tensors[1::2])]
        return np.stack(kernels).reshape(shape)
    stacked = np.stack(tensors).reshape(shape)
    if path[-1] == 'frequency':
        return np.exp(stacked)
    return 1 / (np.exp(stacked) + np.float32(_EPS)) if path[-1] == 'amplitude' else stacked


def _kernel(g: np.ndarray, v: np.ndarray, transposed: bool) -> np.ndarray:
    """Weight norm multiplied out: `[out, D, taps]` → `[taps, D, out]`, or `[D, out, 2 · rate]` → `[2, D, rate, out]`."""
    norm = np.sqrt(np.einsum('abc,abc->a', v, v, dtype=np.float64)).astype(np.float32)
    kernel = v * (g / norm[:, None, None])
    return kernel.reshape(*v.shape[:2], 2, -1).transpose(2, 0, 3, 1) if transposed else kernel.transpose(2, 1, 0)
