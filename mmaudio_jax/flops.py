"""How many floating-point operations the flow network needs, by formula, and what chips can do.

Counted are the matrix products, a multiplication and an addition as two; everything else is far below a hundredth. Letters:
N audio latents, V CLIP frames, S sync tokens, T text tokens, D width, C latent channels.
"""
import math
from typing import Any

import jax

from mmaudio_jax.models import layers
from mmaudio_jax.models import mmdit
from mmaudio_jax.sequence import Sequence

# Dense bfloat16 operations a second of one device, by the beginning of jax.Device.device_kind (the makers' data sheets).
PEAKS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100 NVL': 835e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
}


def peak(device_kind: str) -> float | None:
    """Operations a second of a device of that kind; None when it is not in PEAKS."""
    return next((value for name, value in PEAKS.items() if device_kind.startswith(name)), None)


def training(model: Any, sequence: Sequence) -> float:
    """One training example: the forward pass, and twice as much for the gradients. Recomputation is not work done."""
    return 3 * forward(model, sequence)


def forward(model: Any, sequence: Sequence) -> float:
    """The velocity of one example from raw features."""
    return conditions(model, sequence) + velocity(model, sequence)


def conditions(model: Any, sequence: Sequence) -> float:
    """MMAudio.preprocess_conditions for one example."""
    width = model.hidden_size
    total = _projection(model, sequence.clip_length, model.clip_width, 1, 3) + 2 * width**2
    total += _projection(model, model.text_length, model.text_width, 1, 1) + 2 * width**2
    if model.sync_fusion != 'none':
        total += _projection(model, sequence.sync_length, model.sync_width, 7, 3)
    return total


def velocity(model: Any, sequence: Sequence) -> float:
    """MMAudio.velocity for one example: one evaluation of the flow without guidance."""
    width, length, channels = model.hidden_size, sequence.latent_length, model.latent_channels
    frames = sequence.sync_length if model.sync_fusion == 'sum_with_visual' else sequence.clip_length
    conditioned = length if model.sync_fusion == 'modulate' else 1  # rows of the latents' condition
    keys = length + frames + model.text_length
    total = _projection(model, length, channels, 7, 7) + _mlp(1, 1, width)
    total += 2 * width * ((256 if model.version == 1 else width) + width)  # time embedding
    latents = _stream(model, length, conditioned, mmdit.ATTENTION_TAPS, 3)
    others = (_stream(model, frames, 1, mmdit.ATTENTION_TAPS, 3), _stream(model, model.text_length, 1, 1, 1))
    total += (model.joint_blocks - 1) * (latents + sum(others) + 4 * keys**2 * width)
    # The last joint block takes only q, k, v of frames and text, and asks for the latents alone.
    total += latents + sum(2 * width**2 * (3 * tokens + 2) for tokens in (frames, model.text_length))
    total += 4 * length * keys * width
    total += model.fused_blocks * (latents + 4 * length**2 * width)
    return total + 4 * width**2 + 2 * length * 7 * width * channels  # final layer


def _stream(model: Any, tokens: int, conditioned: int, projection_taps: int, mlp_taps: int) -> float:
    """A stream of a block but for the attention itself: modulation, q, k, v, projection, MLP."""
    width = model.hidden_size
    matrices = 6 * conditioned + 3 * tokens + projection_taps * tokens
    return 2 * width**2 * matrices + _mlp(tokens, mlp_taps if model.mlp == 'conv' else 1, width)


def _projection(model: Any, tokens: int, inputs: int, taps: int, mlp_taps: int) -> float:
    """mmaudio.InputProjection."""
    width = model.hidden_size
    return 2 * tokens * taps * inputs * width + _mlp(tokens, mlp_taps if model.mlp == 'conv' else 1, width)


def _mlp(tokens: int, taps: int, width: int) -> float:
    """layers.GatedMLP: three matrices."""
    return 3 * 2 * tokens * taps * width * layers.mlp_hidden(width)


def traced(jaxpr: Any, times: int = 1) -> float:
    """The matrix products and convolutions that a trace (jax.make_jaxpr) holds: those in a scan as often as it runs; of
    alternatives those of the most.

    For the networks without a formula here; a trace of a gradient has what is recomputed too.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            total += times * 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif equation.primitive.name == 'conv_general_dilated':
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params['dimension_numbers'].rhs_spec[0]]
            total += times * 2 * equation.outvars[0].aval.size * kernel.size / outputs
        repeats = equation.params['length'] if equation.primitive.name == 'scan' else 1
        if equation.primitive.name == 'cond':
            total += max(traced(branch.jaxpr, times) for branch in equation.params['branches'])
        for value in equation.params.values():
            if isinstance(value, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
                total += traced(getattr(value, 'jaxpr', value), times * repeats)
    return total
