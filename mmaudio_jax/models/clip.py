"""CLIP's image and text towers: frames → one feature each, texts → the whole sequence of token features.

Source: CLIP (arXiv 2103.00020), the weights DFN5B ViT-H/14 at 384 pixels (arXiv 2309.17425), read as MMAudio (arXiv
2412.15322) does: the text's feature is all 77 tokens after the last LayerNorm, without the projection.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import transformer

VARIANTS: dict[str, dict[str, Any]] = {
    'vit_h_14_378':
        dict(image_size=384, patch_size=14, image_width=1280, image_heads=16, image_depth=32, vocabulary=49408, text_length=77,
             text_width=1024, text_heads=16, text_depth=24, features=1024),
}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
LAYER_NORM_EPS = 1e-5
MLP_RATIO = 4


def build(variant: str, dtype: Any) -> 'CLIP':
    """The model of that name; `dtype` is the compute dtype.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f'CLIP variant {variant!r} is not one of {", ".join(VARIANTS)}')
    return CLIP(**VARIANTS[variant], dtype=dtype)


def normalize(frames: jax.Array) -> jax.Array:
    """uint8 `[..., 3]` → float32, as the image tower takes them."""
    return (frames.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


class CLIP(nn.Module):
    """Both towers: `clip.apply({'params': params}, frames, method='encode_image')`, or `method='encode_text'` for tokens.

    Either needs its own part of the parameters only, `image` or `text`.

    Attributes:
      image_size, patch_size: pixels a side; what is left over at the right and the bottom is not seen.
      image_width, image_heads, image_depth, text_width, text_heads, text_depth: sizes of the two transformers.
      vocabulary: number of tokens. text_length: T. features: width of the images' features.
      dtype: compute dtype; LayerNorm, softmax and the results are float32.
    """
    image_size: int
    patch_size: int
    image_width: int
    image_heads: int
    image_depth: int
    vocabulary: int
    text_length: int
    text_width: int
    text_heads: int
    text_depth: int
    features: int
    dtype: Any

    def setup(self):
        grid = self.image_size // self.patch_size
        self.image = ImageTower(self.patch_size, grid, self.image_width, self.image_heads, self.image_depth, self.features,
                                self.dtype)
        self.text = TextTower(self.vocabulary, self.text_length, self.text_width, self.text_heads, self.text_depth, self.dtype)

    def encode_image(self, frames: jax.Array) -> jax.Array:
        """Normalised frames `[B, image_size, image_size, 3]` → features of length 1, float32 `[B, features]`."""
        return self.image(frames)

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Token ids, integer `[B, T]` → features of length 1 for every token, float32 `[B, T, text_width]`."""
        return self.text(tokens)

    def __call__(self, frames: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both; `init` goes through here."""
        return self.image(frames), self.text(tokens)


class ImageTower(nn.Module):
    """Frames `[B, h, w, 3]` → float32 `[B, features]`; `grid` patches a side are seen.

    The last block stands apart from the others, because only its class token is wanted.
    """
    patch_size: int
    grid: int
    width: int
    num_heads: int
    depth: int
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        seen = self.grid * self.patch_size
        pixels = transformer.patches(frames[:, None, :seen, :seen], 1, self.patch_size).astype(self.dtype)
        x = nn.Dense(self.width, dtype=self.dtype, use_bias=False, name='patches')(pixels)
        class_token = self.param('class_token', transformer.INIT, (self.width,)).astype(self.dtype)
        positions = self.param('positions', transformer.INIT, (1 + self.grid**2, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, self.width)), x], axis=1) + positions
        x = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm_before')(x)
        fields = (self.num_heads, MLP_RATIO * self.width, LAYER_NORM_EPS, transformer.quick_gelu, self.dtype)
        x, _ = transformer.repeat(transformer.Block, self.depth - 1)(*fields, name='blocks')(x)
        x, _ = transformer.Block(*fields, first_only=True, name='last_block')(x)
        x = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm_after')(x[:, 0])
        projection = self.param('projection', transformer.INIT, (self.width, self.features)).astype(self.dtype)
        return transformer.of_length_one(x @ projection)


class TextTower(nn.Module):
    """Token ids `[B, T]` → float32 `[B, T, width]`."""
    vocabulary: int
    length: int
    width: int
    num_heads: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embeddings = self.param('tokens', transformer.INIT, (self.vocabulary, self.width))
        positions = self.param('positions', transformer.INIT, (self.length, self.width))
        x = embeddings[tokens].astype(self.dtype) + positions.astype(self.dtype)
        fields = (self.num_heads, MLP_RATIO * self.width, LAYER_NORM_EPS, transformer.quick_gelu, self.dtype)
        x, _ = transformer.repeat(transformer.Block, self.depth)(*fields, causal=True, name='blocks')(x)
        return transformer.of_length_one(transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm')(x))
