"""Transformer blocks of the flow network: joint blocks over latents, CLIP frames and text, fused blocks over latents.

Source: MMAudio (arXiv 2412.15322), section 3.3. Conditions reach a block after their SiLU, which all blocks share.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import layers

ATTENTION_TAPS = 3  # the convolution after the attention of latents and CLIP frames


class Stream(nn.Module):
    """One stream of a block: modulation, q, k, v before the attention, projection and MLP after it.

    Attributes:
      hidden_size: D. num_heads: H.
      projection_taps: 3 for a convolution after the attention, 1 for a matrix.
      mlp_taps: 3 for ConvMLP, 1 for the plain gated MLP.
      ends_here: the stream supplies q, k, v only, and its tokens end in this block.
      convolution: 'xla', 'xla_taps', 'matmul' or 'winograd', see layers.conv1d.
    """
    hidden_size: int
    num_heads: int
    projection_taps: int
    mlp_taps: int
    ends_here: bool
    dtype: Any
    convolution: str

    def setup(self):
        head_size = self.hidden_size // self.num_heads
        self.modulation = layers.Linears(2 if self.ends_here else 6, (self.hidden_size,), self.dtype, zero_init=True)
        self.qkv = layers.Linears(3, (self.num_heads, head_size), self.dtype)
        self.q_norm = self.param('q_norm', nn.initializers.ones, (head_size,))
        self.k_norm = self.param('k_norm', nn.initializers.ones, (head_size,))
        if self.ends_here:
            return
        self.projection: nn.Module = (layers.Conv(self.hidden_size, self.projection_taps, self.dtype, self.convolution)
                                      if self.projection_taps > 1 else layers.linear(self.hidden_size, self.dtype))
        self.mlp = layers.GatedMLP(self.mlp_taps, self.dtype, self.convolution)

    def before(self, tokens: jax.Array, condition: jax.Array, angles: layers.Rotation | None):
        """q, k, v `[B, N, H, K]` of `tokens` `[B, N, D]`, and what `after` needs of the condition `[B, N or 1, D]`."""
        shift, scale, *rest = self.modulation(condition)
        q, k, v = self.qkv(layers.modulate(tokens, shift, scale))
        if angles is None:
            q, k = layers.rms_norm(q, self.q_norm), layers.rms_norm(k, self.k_norm)
        else:
            q, k = layers.norm_and_rotate(q, self.q_norm, angles), layers.norm_and_rotate(k, self.k_norm, angles)
        return (q.astype(self.dtype), k.astype(self.dtype), v), rest

    def after(self, tokens: jax.Array, mixed: jax.Array, rest: list[jax.Array]) -> jax.Array:
        """The tokens `[B, N, D]` after the attention's result `mixed` `[B, N, D]` and the MLP."""
        attention_gate, shift, scale, mlp_gate = rest
        tokens = tokens + attention_gate * self.projection(mixed)
        return tokens + mlp_gate * self.mlp(layers.modulate(tokens, shift, scale))


class JointBlock(nn.Module):
    """One attention over latents, CLIP frames and text, each with its own weights; `last` ends CLIP frames and text.

    The carry is (latents `[B, N, D]`, clip `[B, V, D]`, text `[B, T, D]`), as nn.scan wants it.
    """
    hidden_size: int
    num_heads: int
    mlp_taps: int
    last: bool
    dtype: Any
    convolution: str

    @nn.compact
    def __call__(self, carry, latent_condition, condition, latent_angles, clip_angles):

        def stream(name, taps, mlp_taps, ends_here):
            return Stream(self.hidden_size, self.num_heads, taps, mlp_taps, ends_here, self.dtype, self.convolution,
                          name=name)

        streams = (stream('latents', ATTENTION_TAPS, self.mlp_taps, False),
                   stream('clip', ATTENTION_TAPS, self.mlp_taps, self.last), stream('text', 1, 1, self.last))
        conditions = (latent_condition, condition, condition)
        angles = (latent_angles, clip_angles, None)
        before = [s.before(*inputs) for s, *inputs in zip(streams, carry, conditions, angles)]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*(qkv for qkv, _ in before)))
        latents, clip, text = carry
        if self.last:  # nobody reads what the other two streams would attend to
            q = q[:, :latents.shape[1]]
        mixed = layers.attention(q, k, v)
        ends = (latents.shape[1], latents.shape[1] + clip.shape[1])
        parts = (mixed[:, :ends[0]], mixed[:, ends[0]:ends[1]], mixed[:, ends[1]:])
        rest = [r for _, r in before]
        if self.last:
            return (streams[0].after(latents, parts[0], rest[0]), clip, text), None
        return tuple(s.after(*inputs) for s, *inputs in zip(streams, carry, parts, rest)), None


class FusedBlock(nn.Module):
    """Attention over the latents alone; the carry is latents `[B, N, D]`."""
    hidden_size: int
    num_heads: int
    mlp_taps: int
    dtype: Any
    convolution: str

    @nn.compact
    def __call__(self, latents, latent_condition, latent_angles):
        stream = Stream(self.hidden_size, self.num_heads, ATTENTION_TAPS, self.mlp_taps, False, self.dtype,
                        self.convolution, name='latents')
        qkv, rest = stream.before(latents, latent_condition, latent_angles)
        return stream.after(latents, layers.attention(*qkv), rest), None


def repeat(block: type[nn.Module], length: int, remat: str, scan_layers: bool, inputs: int) -> type[nn.Module]:
    """`length` of `block`, weights along a first axis; `inputs` counts the arguments after the carry, the same for all.

    remat 'none' stores every activation for the backward pass, 'blocks' only the carry of each block, 'dots' the
    carry and the results of the matrix products. With `scan_layers` a loop runs one compiled block. Without, every block is
    compiled: that takes several times as long, but copies no activations into a loop's arrays and out again.
    """
    if remat != 'none':
        policy = jax.checkpoint_policies.save_only_these_names(layers.PRODUCT) if remat == 'dots' else None
        block = nn.remat(block, policy=policy, prevent_cse=False)
    return nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=(nn.broadcast,) * inputs,
                   length=length, unroll=1 if scan_layers else length)
