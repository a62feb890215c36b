"""Our sound networks as rows of the comparison: from what an original's module takes to the embeddings, compiled."""
from collections.abc import Callable
import ctypes
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import filterbanks
from mmaudio_jax.models import cnn14
from mmaudio_jax.models import htsat
from mmaudio_jax.models import imagebind
from mmaudio_jax.models import passt
from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.models import vggish

Builder = Callable[[np.ndarray], Callable[[], None]]


def _row(model: nn.Module, front: Callable[[jax.Array], jax.Array],
         apply: Callable[[Any, jax.Array], Any] | None = None) -> Builder:
    apply = apply or (lambda params, x: model.apply({'params': params}, x))

    def build(inputs: np.ndarray) -> Callable[[], None]:
        with jax.default_matmul_precision('highest'):
            shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), front(x)), inputs)['params']
            compiled = jax.jit(lambda params, x: apply(params, front(x))).lower(shapes, inputs).compile()
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler freed goes back to the system
        params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01), shapes)  # made in place: never held twice
        x = jnp.asarray(inputs)
        return lambda: jax.block_until_ready(compiled(params, x))
    return build


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


BUILDERS = {
    'vggish': _row(vggish.VGGish(), _flat),
    'panns': _row(cnn14.Cnn14(), filterbanks.panns_power, cnn14.embed),
    'passt': _row(passt.Passt(), lambda mel: mel),
    'synchformer': _row(synchformer_offset.SoundBranch(), _flat),
    'imagebind': _row(imagebind.Audio(), _flat),
    'clap': _row(htsat.HTSAT(), filterbanks.clap_power),
}
