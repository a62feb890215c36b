"""Our sound networks as rows of the comparison: from what an original's module takes to the embeddings, compiled."""
from collections.abc import Callable
import ctypes
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import embedders
from mmaudio_jax import filterbanks
from mmaudio_jax.models import cnn14
from mmaudio_jax.models import htsat
from mmaudio_jax.models import imagebind
from mmaudio_jax.models import passt
from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.models import vggish

Builder = Callable[[np.ndarray], Callable[[], None]]


def _row(model: nn.Module, front: Callable[[jax.Array], jax.Array]) -> Builder:
    def build(inputs: np.ndarray) -> Callable[[], None]:
        shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), front(x)), inputs)['params']
        apply: Any = embedders.precise(lambda params, x: model.apply({'params': params}, front(x)))
        compiled = apply.lower(shapes, inputs).compile()
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler freed goes back to the system
        generator = np.random.default_rng(1)

        def fill(shape: Any) -> jax.Array:  # one after the other: weights are never held twice
            return jnp.asarray(0.03 * generator.standard_normal(shape.shape, np.float32))
        params, x = jax.tree.map(fill, shapes), jnp.asarray(inputs)
        return lambda: jax.block_until_ready(compiled(params, x))
    return build


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


BUILDERS = {
    'vggish': _row(vggish.VGGish(), _flat),
    'panns': _row(cnn14.Cnn14(), filterbanks.panns_power),
    'passt': _row(passt.Passt(), lambda mel: mel),
    'synchformer': _row(synchformer_offset.SoundBranch(), _flat),
    'imagebind': _row(imagebind.Audio(), _flat),
    'clap': _row(htsat.HTSAT(), filterbanks.clap_power),
}
