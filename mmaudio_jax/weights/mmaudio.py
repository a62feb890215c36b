"""The flow network's official tensors ↔ our parameter tree, strict both ways.

Names are those of mmaudio_*.pth. Layouts differ in four ways: matrices and kernels are transposed, blocks are stacked
for nn.scan, the parts of a modulation and of q, k, v are the first dimension, and the channels of q, k, v, which the official
files interleave as (head, channel, q|k|v), are in the order (head, channel) with the two halves of every rotated pair apart.
"""
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import mmaudio
from mmaudio_jax.weights import names

CONSTANTS = ('latent_rot', 'clip_rot', 't_embed.freqs')  # computed by us; the official files may hold them
_STACKS = ('joint', 'fused')

# Our path (joined by '.') → the official name, in order.
_NAMES = (
    (r'^joint\.(\d+)\.', r'joint_blocks.\1.'),
    (r'^fused\.(\d+)\.latents\.', r'fused_blocks.\1.'),
    (r'\.latents\.', '.latent_block.'),
    (r'\.clip\.', '.clip_block.'),
    (r'\.text\.', '.text_block.'),
    (r'\.modulation\.', '.adaLN_modulation.1.'),
    (r'\.(qkv\.|q_norm$|k_norm$)', r'.attn.\1'),
    (r'\.projection\.', '.linear1.'),
    (r'_block(s\.\d+)?\.mlp\.', r'_block\1.ffn.'),
    (r'^t_embed\.first', 't_embed.mlp.0'),
    (r'^t_embed\.second', 't_embed.mlp.2'),
    (r'_input_proj\.first', '_input_proj.0'),
    (r'\.kernel$', '.weight'),
    (r'\.(w1|w2|w3|q_norm|k_norm)$', r'.\1.weight'),
)


def leaves(tensors: Mapping[str, np.ndarray], model: mmaudio.MMAudio) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Official tensors by name → parameters of `model` one by one with their paths, float32 NumPy arrays.

    Raises:
      ValueError: before the first: names every missing, unexpected and misshapen tensor.
    """
    found = {name: tuple(array.shape) for name, array in tensors.items() if name not in CONSTANTS}
    names.check(shapes(model), found, 'the weights do not fit this network; check the model variant and its fields')
    for path, shape in _abstract(model).items():
        if path[0] in _STACKS:
            stack = np.empty(shape, np.float32)
            for layer in range(shape[0]):
                stack[layer] = _import(tensors, (path[0], str(layer), *path[1:]), model).reshape(shape[1:])
            yield path, stack
        else:
            yield path, np.array(_import(tensors, path, model), np.float32).reshape(shape)


def shapes(model: mmaudio.MMAudio) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official tensors of `model`."""
    blank = {path: np.broadcast_to(np.float32(0), shape) for path, shape in _abstract(model).items()}
    return {name: array.shape for name, array in _export(traverse_util.unflatten_dict(blank), model)}


def from_params(params: Mapping[str, Any], model: mmaudio.MMAudio) -> dict[str, np.ndarray]:
    """Parameters of `model` (or a tree like them, such as gradients) → official tensors by name, float32.

    Raises:
      ValueError: names every missing, unexpected and misshapen leaf.
    """
    found = {'/'.join(path): tuple(np.shape(leaf)) for path, leaf in traverse_util.flatten_dict(dict(params)).items()}
    expected = {'/'.join(path): shape for path, shape in _abstract(model).items()}
    names.check(expected, found, 'the parameters are not this network\'s; check the model variant and its fields')
    return {name: np.ascontiguousarray(array, np.float32) for name, array in _export(params, model)}


def _abstract(model: mmaudio.MMAudio) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path → shape of every parameter of `model`."""
    features = ((1, 8, model.clip_width), (1, 8, model.sync_width), (1, model.text_length, model.text_width))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, model.latent_channels), (1,), *features)]
    return names.parameter_shapes(model, *inputs)


def _official_name(path: tuple[str, ...], model: mmaudio.MMAudio) -> str:
    name = '.'.join(path)
    name = re.sub(r'^joint_last\.', f'joint.{model.joint_blocks - 1}.', name)
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    # Version 1 has no activation between the matrix and the MLP, so that the MLP's place is 1.
    name = re.sub(r'^(clip|text)_input_proj\.mlp', rf'\1_input_proj.{model.version}', name)
    return re.sub(r'^(audio|sync)_input_proj\.mlp', r'\1_input_proj.2', name)


def _export(params: Mapping[str, Any], model: mmaudio.MMAudio) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        leaf = np.asarray(leaf)
        layers = [((path[0], str(i), *path[1:]), leaf[i]) for i in range(len(leaf))] if path[0] in _STACKS else [(path, leaf)]
        for layer_path, array in layers:
            yield _official_name(layer_path, model), _layout(path, model, out=True)(array)


def _import(tensors: Mapping[str, np.ndarray], path: tuple[str, ...], model: mmaudio.MMAudio) -> np.ndarray:
    return _layout(path, model, out=False)(np.asarray(tensors[_official_name(path, model)], np.float32))


def _layout(path: tuple[str, ...], model: mmaudio.MMAudio, out: bool) -> Callable[[np.ndarray], np.ndarray]:
    """The change of layout of the leaf at `path`, from ours to the official one (`out`) or back."""
    kind, kernel = path[-2] if len(path) > 1 else '', path[-1] == 'kernel'
    if kind == 'qkv':
        return lambda array: (_qkv_out if out else _qkv_in)(array, model.num_heads, kernel)
    if kind == 'modulation':
        return lambda array: _parts_out(array, kernel) if out else _parts_in(array, model.hidden_size, kernel)
    if path[-1] in ('q_norm', 'k_norm'):
        return _head_out if out else _head_in
    if path[-1] in ('kernel', 'w1', 'w2', 'w3'):
        return _transpose if out else _transpose_back
    return lambda array: array


def _transpose(kernel: np.ndarray) -> np.ndarray:
    """Our matrix (in, out) or kernel (taps, in, out) → (out, in) or (out, in, taps); one tap is a matrix."""
    kernel = np.asarray(kernel)
    if kernel.ndim == 3 and kernel.shape[0] == 1:
        kernel = kernel[0]
    return kernel.transpose() if kernel.ndim == 2 else kernel.transpose(2, 1, 0)


def _transpose_back(kernel: np.ndarray) -> np.ndarray:
    return np.asarray(kernel, np.float32).transpose()


def _head_out(scale: np.ndarray) -> np.ndarray:
    """Channels of a head: halves (first of every pair, second of every pair) → neighbouring pairs."""
    return scale.reshape(2, -1).transpose().reshape(-1)


def _head_in(scale: np.ndarray) -> np.ndarray:
    return np.asarray(scale, np.float32).reshape(-1, 2).transpose().reshape(-1)


def _parts_out(array: np.ndarray, kernel: bool) -> np.ndarray:
    """Our kernel (part, in, out) or bias (part, out) → rows (part, out)."""
    rows = array.swapaxes(1, 2) if kernel else array
    return rows.reshape(-1, *rows.shape[2:])


def _parts_in(array: np.ndarray, width: int, kernel: bool) -> np.ndarray:
    parts = array.reshape(-1, width, *array.shape[1:])
    return parts.swapaxes(1, 2) if kernel else parts


def _qkv_out(array: np.ndarray, heads: int, kernel: bool) -> np.ndarray:
    """Our kernel (q|k|v, in, head · channel) or bias (q|k|v, head, channel) → rows (head, channel, q|k|v)."""
    rows = array.swapaxes(1, 2) if kernel else array.reshape(3, -1)
    rest = rows.shape[2:]
    q, k, v = rows.reshape(3, heads, 2, -1, *rest)
    parts = [part.reshape(heads, -1, *rest) for part in (q.swapaxes(1, 2), k.swapaxes(1, 2), v)]
    return np.stack(parts, axis=2).reshape(-1, *rest)


def _qkv_in(array: np.ndarray, heads: int, kernel: bool) -> np.ndarray:
    rest = array.shape[1:]
    q, k, v = np.moveaxis(array.reshape(heads, -1, 3, *rest), 2, 0)
    halves = [part.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(heads, -1, *rest) for part in (q, k)]
    parts = np.stack([*halves, v])
    return parts.reshape(3, -1, *rest).swapaxes(1, 2) if kernel else parts
