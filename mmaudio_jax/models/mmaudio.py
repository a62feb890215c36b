"""The flow network of MMAudio: conditions once a clip, the velocity of the audio latents many times.

Letters: B batch, N audio latents, V CLIP frames, S sync tokens, T text tokens, D width, C latent channels.
Source: MMAudio (arXiv 2412.15322), section 3, and the released checkpoints (version 1 and 2).
"""
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import sequence as seq
from mmaudio_jax.models import layers
from mmaudio_jax.models import mmdit

FROZEN = ('latent_mean', 'latent_std', 'empty_string_feat')  # top-level parameters that are never trained

_SMALL = {'hidden_size': 448, 'num_heads': 7, 'joint_blocks': 4, 'fused_blocks': 8, 'version': 1}
_MEDIUM = {'hidden_size': 896, 'num_heads': 14, 'joint_blocks': 4, 'fused_blocks': 8, 'version': 1}
_LARGE = {'hidden_size': 896, 'num_heads': 14, 'joint_blocks': 7, 'fused_blocks': 14, 'version': 1}
_FEATURES = {
    'clip_width': seq.CLIP_WIDTH,
    'sync_width': seq.SYNC_WIDTH,
    'text_width': seq.CLIP_WIDTH,
    'text_length': seq.TEXT_LENGTH
}
VARIANTS: dict[str, dict[str, int]] = {
    'small_16k': {**_SMALL, **_FEATURES, 'latent_channels': seq.AUDIO_RATES['16k'].latent_channels},
    'small_44k': {**_SMALL, **_FEATURES, 'latent_channels': seq.AUDIO_RATES['44k'].latent_channels},
    'medium_44k': {**_MEDIUM, **_FEATURES, 'latent_channels': seq.AUDIO_RATES['44k'].latent_channels},
    'large_44k': {**_LARGE, **_FEATURES, 'latent_channels': seq.AUDIO_RATES['44k'].latent_channels},
    'large_44k_v2': {**_LARGE, **_FEATURES, 'latent_channels': seq.AUDIO_RATES['44k'].latent_channels, 'version': 2},
}
DTYPES = ('bfloat16', 'float32')
_CHOICES = {
    'version': (1, 2),
    'sync_fusion': ('modulate', 'sum_with_visual', 'none'),
    'rope': ('aligned', 'unaligned', 'none'),
    'mlp': ('conv', 'linear'),
    'convolution': ('xla', 'xla_taps', 'matmul', 'winograd'),
    'remat': ('none', 'blocks', 'dots'),
}


@flax.struct.dataclass
class Conditions:
    """What the network knows of a clip, projected to its width.

    Attributes:
      clip: `[B, V, D]` CLIP frames; with sync_fusion 'sum_with_visual' `[B, S, D]`, frames and sync tokens summed.
      sync: `[B, N, D]` sync features at the rate of the latents; zeros `[B, 1, D]` when they do not modulate.
      text: `[B, T, D]` text tokens.
      clip_global: `[B, D]` mean frame. text_global: `[B, D]` mean text token.
    """
    clip: jax.Array
    sync: jax.Array
    text: jax.Array
    clip_global: jax.Array
    text_global: jax.Array


def upsampling_indices(source: int, target: int) -> np.ndarray:
    """Nearest-exact: for each of `target` places the source index floor((i + 0.5) · source / target); int32 `[target]`.

    All in float32, as the released networks do it: where (i + 0.5) · source / target is whole, the rounded product may fall
    below it, and exact arithmetic would then pick the neighbour (latents 57 and 172 of 192 → 345).
    """
    scale = np.float32(source) / np.float32(target)
    places = np.arange(target, dtype=np.float32) + np.float32(0.5)
    return np.minimum(np.floor(places * scale), source - 1).astype(np.int32)


class InputProjection(nn.Module):
    """Features `[B, L, W]` to `[B, L, D]`: a matrix (`taps` 1) or convolution, an activation, the gated MLP."""
    features: int
    taps: int
    mlp_taps: int
    activation: Any
    dtype: Any
    convolution: str

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if self.taps > 1:
            hidden = layers.Conv(self.features, self.taps, self.dtype, self.convolution, name='first')(inputs)
        else:
            hidden = layers.linear(self.features, self.dtype, name='first')(inputs)
        return layers.GatedMLP(self.mlp_taps, self.dtype, self.convolution, name='mlp')(self.activation(hidden))


class FinalLayer(nn.Module):
    """Latents `[B, N, D]` and condition `[B, 1, D]` (after its SiLU) to the velocity `[B, N, C]`."""
    channels: int
    dtype: Any
    convolution: str

    @nn.compact
    def __call__(self, latents: jax.Array, condition: jax.Array) -> jax.Array:
        shift, scale = layers.Linears(2, latents.shape[-1:], self.dtype, zero_init=True, name='modulation')(condition)
        conv = layers.Conv(self.channels, 7, self.dtype, self.convolution, zero_init=True, name='conv')
        return conv(layers.modulate(latents, shift, scale))


class MMAudio(nn.Module):
    """Velocity of noisy audio latents under a clip's CLIP frames, sync features and text.

    Attributes:
      latent_channels: C. hidden_size: D. num_heads: H. joint_blocks: N1, at least 1. fused_blocks: N2, may be 0.
      version: 1 or 2 (activations of the projections, time embedding).
      sync_fusion: 'modulate' (per latent, added to the global condition), 'sum_with_visual' (CLIP frames brought to the
        sync rate and summed) or 'none' (sync features unused).
      rope: 'aligned' (equal times have equal angles), 'unaligned' or 'none'.
      mlp: 'conv', or 'linear' with matrices in place of the convolutions of every ConvMLP.
      dtype: compute dtype; parameters, norms, softmax, rotations and time embedding are float32.
      convolution: 'xla', 'xla_taps', 'matmul' or 'winograd', see layers.conv1d.
      remat: 'none', 'blocks' or 'dots', see mmdit.repeat.
      clip_width, sync_width, text_width: widths of the features. text_length: T.
      scan_layers: one program for all blocks of a kind, see mmdit.repeat.

    Raises:
      ValueError: a field has none of its values, or the sizes do not fit together.
    """
    latent_channels: int
    hidden_size: int
    num_heads: int
    joint_blocks: int
    fused_blocks: int
    version: int
    sync_fusion: str
    rope: str
    mlp: str
    dtype: Any
    convolution: str
    remat: str
    clip_width: int
    sync_width: int
    text_width: int
    text_length: int
    scan_layers: bool = True  # a default, for the configs of runs that were saved before the field was there

    def setup(self):
        self._check()
        zeros, ones, width = nn.initializers.zeros, nn.initializers.ones, self.hidden_size
        self.latent_mean = self.param('latent_mean', zeros, (1, 1, self.latent_channels))
        self.latent_std = self.param('latent_std', ones, (1, 1, self.latent_channels))
        self.empty_string_feat = self.param('empty_string_feat', zeros, (self.text_length, self.text_width))
        self.empty_clip_feat = self.param('empty_clip_feat', zeros, (1, self.clip_width))
        self.empty_sync_feat = self.param('empty_sync_feat', zeros, (1, self.sync_width))

        conv = self.mlp == 'conv'
        on_convs, on_matrices = (nn.selu, lambda x: x) if self.version == 1 else (nn.silu, nn.silu)
        self.audio_input_proj = InputProjection(width, 7, 7 if conv else 1, on_convs, self.dtype, self.convolution)
        self.clip_input_proj = InputProjection(width, 1, 3 if conv else 1, on_matrices, self.dtype, self.convolution)
        self.text_input_proj = InputProjection(width, 1, 1, on_matrices, self.dtype, self.convolution)
        if self.sync_fusion != 'none':
            self.sync_pos_emb = self.param('sync_pos_emb', zeros, (1, 1, seq.SYNC_TOKENS_PER_SEGMENT, self.sync_width))
            self.sync_input_proj = InputProjection(width, 7, 3 if conv else 1, on_convs, self.dtype, self.convolution)
        self.clip_cond_proj = layers.linear(width, self.dtype)
        self.text_cond_proj = layers.linear(width, self.dtype)
        self.global_cond_mlp = layers.GatedMLP(1, self.dtype, self.convolution)
        self.t_embed = layers.TimeEmbedding(width, self.version)

        mlp_taps = 3 if conv else 1
        if self.joint_blocks > 1:
            repeated = mmdit.repeat(mmdit.JointBlock, self.joint_blocks - 1, self.remat, self.scan_layers, inputs=4)
            self.joint = repeated(width, self.num_heads, mlp_taps, False, self.dtype, self.convolution)
        self.joint_last = mmdit.JointBlock(width, self.num_heads, mlp_taps, True, self.dtype, self.convolution)
        if self.fused_blocks:
            repeated = mmdit.repeat(mmdit.FusedBlock, self.fused_blocks, self.remat, self.scan_layers, inputs=2)
            self.fused = repeated(width, self.num_heads, mlp_taps, self.dtype, self.convolution)
        self.final_layer = FinalLayer(self.latent_channels, self.dtype, self.convolution)

    def _check(self):
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                known = (('auto',) if field == 'convolution' else ()) + choices  # which `build` has replaced
                raise ValueError(f'config.model.{field} is {getattr(self, field)!r}; it must be one of {known}')
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f'config.model.hidden_size {self.hidden_size} must be a multiple of twice config.model.num_heads '
                             f'{self.num_heads}: every head has an even number of channels')
        if self.joint_blocks < 1 or self.fused_blocks < 0:
            raise ValueError(f'config.model.joint_blocks {self.joint_blocks} must be at least 1 (the block that reads the '
                             f'conditions) and config.model.fused_blocks {self.fused_blocks} at least 0')

    def preprocess_conditions(self, clip: jax.Array, sync: jax.Array, text: jax.Array, latent_length: int) -> Conditions:
        """Features `[B, V, 1024]`, `[B, S, 768]`, `[B, T, 1024]` to Conditions for `latent_length` = N latents.

        Raises:
          ValueError: S is not a whole number of segments of 8 tokens, or a feature has another width than the field says.
        """
        self._check_features(clip, sync, text)
        clip, text = self.clip_input_proj(clip), self.text_input_proj(text)
        clip_global, text_global = self.clip_cond_proj(clip.mean(1)), self.text_cond_proj(text.mean(1))
        at_latents = jnp.zeros((clip.shape[0], 1, self.hidden_size), self.dtype)
        if self.sync_fusion != 'none':
            segments = sync.shape[1] // seq.SYNC_TOKENS_PER_SEGMENT
            tokens = self.sync_input_proj(sync + jnp.tile(self.sync_pos_emb[0], (1, segments, 1)))
            if self.sync_fusion == 'modulate':
                at_latents = tokens[:, upsampling_indices(tokens.shape[1], latent_length)]
            else:
                clip = clip[:, upsampling_indices(clip.shape[1], tokens.shape[1])] + tokens
        return Conditions(clip=clip, sync=at_latents, text=text, clip_global=clip_global, text_global=text_global)

    def _check_features(self, clip, sync, text):
        features = (('clip', clip, self.clip_width), ('sync', sync, self.sync_width), ('text', text, self.text_width))
        for name, array, width in features:
            if array.ndim != 3 or array.shape[-1] != width:
                raise ValueError(f'{name} features of shape {array.shape} must be [batch, length, {width}]')
        if sync.shape[1] % seq.SYNC_TOKENS_PER_SEGMENT:
            raise ValueError(f'{sync.shape[1]} sync tokens are not a whole number of segments of {seq.SYNC_TOKENS_PER_SEGMENT}')

    def velocity(self, latents: jax.Array, t: jax.Array, conditions: Conditions) -> jax.Array:
        """d latents / d t `[B, N, C]` float32 at normalised latents `[B, N, C]` and times t `[B]` (0 noise, 1 data)."""
        length, head_size = latents.shape[1], self.hidden_size // self.num_heads
        tokens = self.audio_input_proj(latents)
        global_condition = self.global_cond_mlp((conditions.clip_global + conditions.text_global)[:, None])
        global_condition = self.t_embed(t)[:, None] + global_condition.astype(jnp.float32)  # [B, 1, D]
        latent_condition = nn.silu(global_condition + conditions.sync.astype(jnp.float32)).astype(self.dtype)
        condition = nn.silu(global_condition).astype(self.dtype)

        latent_angles = clip_angles = None
        if self.rope != 'none':
            frames = conditions.clip.shape[1]
            latent_angles = layers.rotation(length, head_size, 1.0)
            clip_angles = layers.rotation(frames, head_size, length / frames if self.rope == 'aligned' else 1.0)
        carry = (tokens, conditions.clip, conditions.text)
        if self.joint_blocks > 1:
            carry, _ = self.joint(carry, latent_condition, condition, latent_angles, clip_angles)
        (tokens, _, _), _ = self.joint_last(carry, latent_condition, condition, latent_angles, clip_angles)
        if self.fused_blocks:
            tokens, _ = self.fused(tokens, latent_condition, latent_angles)
        # The global condition, without sync: the released weights were trained so.
        return self.final_layer(tokens, condition).astype(jnp.float32)

    def __call__(self, latents: jax.Array, t: jax.Array, clip: jax.Array, sync: jax.Array, text: jax.Array) -> jax.Array:
        """The velocity `[B, N, C]` float32 from raw features: `preprocess_conditions`, then `velocity`."""
        return self.velocity(latents, t, self.preprocess_conditions(clip, sync, text, latents.shape[1]))

    def empty_features(self, batch: int, clip_length: int, sync_length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features that stand for nothing: clip `[B, V, 1024]`, sync `[B, S, 768]`, text `[B, T, 1024]`, float32."""
        return (jnp.broadcast_to(self.empty_clip_feat[None], (batch, clip_length, self.clip_width)),
                jnp.broadcast_to(self.empty_sync_feat[None], (batch, sync_length, self.sync_width)),
                jnp.broadcast_to(self.empty_string_feat[None], (batch, self.text_length, self.text_width)))

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Codec latents `[B, N, C]` to zero mean and unit deviation by channel."""
        return (latents - self.latent_mean) / self.latent_std

    def unnormalize(self, latents: jax.Array) -> jax.Array:
        """The inverse of `normalize`: what the codec decodes."""
        return latents * self.latent_std + self.latent_mean


def build(model_config: Mapping[str, Any], sequence: seq.Sequence) -> MMAudio:
    """The network of a configuration.

    Args:
      model_config: mapping with the keys of config.model; None stands for the variant's value.
      sequence: the Sequence whose latents the network works on.

    Raises:
      ValueError: an unknown variant or dtype, or a variant whose latent channels are not those of the sequence's rate.
    """
    fields = dict(model_config)
    variant = fields.pop('variant')
    if variant not in VARIANTS:
        raise ValueError(f'config.model.variant {variant!r} is not one of {", ".join(VARIANTS)}')
    channels = VARIANTS[variant]['latent_channels']
    if channels != sequence.latent_channels:
        fitting = [name for name, sizes in VARIANTS.items() if sizes['latent_channels'] == sequence.latent_channels]
        raise ValueError(f'config.model.variant {variant!r} has {channels} latent channels, but config.sequence.rate '
                         f'{sequence.rate!r} has {sequence.latent_channels}: set config.sequence.rate and use records of that '
                         f'rate, or choose one of {", ".join(fitting)}')
    if fields['dtype'] not in DTYPES:
        raise ValueError(f'config.model.dtype is {fields["dtype"]!r}; it must be one of {DTYPES}')
    chosen = VARIANTS[variant] | {name: value for name, value in fields.items() if value is not None}
    if chosen['convolution'] == 'auto':
        chosen['convolution'] = _convolution(jnp.dtype(chosen['dtype']))
    return MMAudio(**{**chosen, 'dtype': jnp.dtype(chosen['dtype'])})


def _convolution(dtype: Any) -> str:
    """The quickest on the devices that are here."""
    if jax.default_backend() != 'cpu':
        return 'xla'
    return 'winograd' if dtype == jnp.float32 else 'matmul'
