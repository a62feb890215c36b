"""The VAE's official tensors (v1-16.pth, v1-44.pth) ↔ our parameter tree, strict both ways.

Kernels are normalised here, once, as the official modules do before inference: w / (1e-4 + rms(w)) / sqrt(fan in), the rms
over each output channel. The attention's channels, which the official files interleave as (channel, q|k|v), are
(q|k|v, channel) here.
"""
from collections.abc import Iterator
from collections.abc import Mapping
import math
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import vae
from mmaudio_jax.weights import names

_EPS = 1e-4
_STATISTICS = ('data_mean', 'data_std')


def leaves(tensors: Mapping[str, np.ndarray], model: vae.VAE) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Official tensors by name → parameters of `model` one by one with their paths, float32 NumPy arrays.

    Raises:
      ValueError: before the first: names every missing, unexpected and misshapen tensor.
    """
    shapes = _abstract(model)
    names.check({_official_name(path): _official_shape(path, shape) for path, shape in shapes.items()},
                {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()},
                'the weights do not fit this VAE; check that the file is of the same rate (v1-16.pth or v1-44.pth)')
    for path in shapes:
        yield path, _import(path, np.asarray(tensors[_official_name(path)], np.float32))


def from_params(params: Mapping[str, Any], model: vae.VAE) -> dict[str, np.ndarray]:
    """Parameters of `model` → official tensors by name, float32.

    Importing them again gives the same parameters within 1e-6. The magnitude that an official kernel had before its
    normalisation acts on the result only through the 1e-4 and comes back to a tenth of a percent.

    Raises:
      ValueError: names every missing, unexpected and misshapen leaf, or a kernel that no normalisation gives.
    """
    leaves = traverse_util.flatten_dict(dict(params))
    names.check({'/'.join(path): shape for path, shape in _abstract(model).items()},
                {'/'.join(path): tuple(np.shape(leaf)) for path, leaf in leaves.items()}, 'the parameters are not this VAE\'s')
    return {_official_name(path): _export(path, np.asarray(leaf, np.float32)) for path, leaf in leaves.items()}


def _abstract(model: vae.VAE) -> dict[tuple[str, ...], names.Shape]:
    """Path → shape of every parameter of `model`."""
    return names.parameter_shapes(model, jax.ShapeDtypeStruct((1, 4, model.mel_bins), jnp.float32))


def _official_name(path: tuple[str, ...]) -> str:
    name = '.'.join(path).replace('.final.', '.').replace('.kernel', '.weight')
    name = re.sub(r'(down|up)_(\d)', r'\1.\2', name)
    name = re.sub(r'(\d)_downsample', r'\1.downsample', name)
    name = re.sub(r'(\d)_upsample', r'\1.upsample.conv', name)
    return re.sub(r'(?<!mid)\.block_(\d)', r'.block.\1', name)


def _official_shape(path: tuple[str, ...], shape: names.Shape) -> names.Shape:
    if path[-1] in _STATISTICS:
        return 1, *shape, 1
    return shape[::-1]


def _import(path: tuple[str, ...], tensor: np.ndarray) -> np.ndarray:
    if path[-1] in _STATISTICS:
        return tensor.reshape(-1)
    if path[-1] != 'kernel':
        return tensor
    if path[-2] == 'qkv':
        tensor = tensor.reshape(-1, 3, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)
    kernel = tensor / ((_EPS + _rms(tensor)) * np.float32(math.sqrt(math.prod(tensor.shape[1:]))))
    return np.ascontiguousarray(kernel.transpose(2, 1, 0))


def _export(path: tuple[str, ...], leaf: np.ndarray) -> np.ndarray:
    if path[-1] in _STATISTICS:
        return leaf.reshape(1, -1, 1)
    if path[-1] != 'kernel':
        return leaf
    kernel = leaf.transpose(2, 1, 0) * np.float32(math.sqrt(math.prod(leaf.shape[:-1])))
    # A channel of rms r is stored with rms r / (1e-4 + r), always below one; this solves for r.
    remainder = 1 - _rms(kernel).astype(np.float64)
    if remainder.min() <= 0:
        raise ValueError(f'{"/".join(path)}: an output channel has an rms of 1 / sqrt(fan in) or more, which no official '
                         'weight has after its normalisation; only imported VAEs can be exported')
    kernel = (kernel * (_EPS / remainder)).astype(np.float32)
    if path[-2] == 'qkv':
        kernel = kernel.reshape(3, -1, *kernel.shape[1:]).swapaxes(0, 1).reshape(kernel.shape)
    return np.ascontiguousarray(kernel)


def _rms(kernel: np.ndarray) -> np.ndarray:
    """Root mean square of each output channel of `[out, in, taps]` → `[out, 1, 1]`."""
    return np.sqrt(np.mean(np.square(kernel, dtype=np.float64), axis=(1, 2), keepdims=True)).astype(np.float32)
