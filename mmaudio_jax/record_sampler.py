"""The sampler for examples of records: whole batches over a mesh, from stored features to latents or waveforms."""
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import partitioning
from mmaudio_jax import sampler
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

FIELDS = ('clip_features', 'sync_features', 'text_features', 'video_exists', 'text_exists')  # of an example, that are read
Example = Mapping[str, Any]


def with_empty_features(model: mmaudio.MMAudio | partitioning.OnMesh, params: Any,
                        batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Conditions of records: what an example does not have is replaced by the learned empty features.

    Args:
      model: the network.
      params: its parameters.
      batch: clip_features `[B, V, 1024]`, sync_features `[B, S, 768]`, text_features `[B, 77, 1024]`, any float dtype;
        video_exists, text_exists `[B]` bool.

    Returns:
      (clip, sync, text), float32, of the same shapes.
    """
    names = ('clip_features', 'sync_features', 'text_features')
    shape = batch['clip_features'].shape
    empty: Any = model.apply({'params': params}, shape[0], shape[1], batch['sync_features'].shape[1], method='empty_features')
    exists = (batch['video_exists'], batch['video_exists'], batch['text_exists'])
    clip, sync, text = [jnp.where(jnp.asarray(there)[:, None, None], jnp.asarray(batch[name], jnp.float32), missing)
                        for name, missing, there in zip(names, empty, exists, strict=True)]
    return clip, sync, text


def make(config, placed: partitioning.OnMesh, mesh: jax.sharding.Mesh, sequence: Sequence, size: int,
         decode: sampler.Decode | None = None) -> Callable[..., Any]:
    """fn(params, examples, first, negative_text, codec) → latents `[size, N, C]`, or with `decode` those and the waveforms.

    Float32, split over all devices; one program makes them from the features. `examples` are at most `size`, rows after theirs
    fill the batch up. Example i of them has the noise of (config.sampling.seed, first + i), whatever `size` and the number of
    devices. negative_text is `[77, 1024]`, or None for the empty string; `codec` are the parameters of `decode`.

    Args:
      config: its fields sampling.
      placed: the network on the mesh.
      mesh: of the parameters and the batch.
      sequence: lengths of the clips.
      size: of a batch; its parts on the mesh are equal (partitioning.rounded_up).
      decode: see sampler.make_sampler.
    """
    run_sampler = sampler.make_sampler(placed, sampler.SamplerSettings.of(config.sampling), mesh, decode)
    sharding = partitioning.batch_sharding(mesh)

    @jax.jit
    def run(params, noise, fields, negative, codec):
        conditions = with_empty_features(placed, params, fields)
        return run_sampler(params, noise, *conditions, negative, codec)

    def sample(params: Any, examples: Sequence_[Example], first: int = 0, negative_text: np.ndarray | None = None,
               codec: Any = None) -> Any:
        rows = np.minimum(np.arange(size), len(examples) - 1)  # the last example fills the batch up
        fields = {name: np.stack([np.asarray(examples[row][name]) for row in rows]) for name in FIELDS}
        with jax.ensure_compile_time_eval():  # so that jax.eval_shape may ask what `sample` refuses
            noise = sampler.noise(config.sampling.seed, (first + rows).tolist(), sequence.latent_length,
                                  sequence.latent_channels)
        negative = None if negative_text is None else np.broadcast_to(negative_text, (size, *negative_text.shape))
        inputs = partitioning.spread((noise, fields, negative), sharding)
        # Ended before another is begun: on CPUs, programs that exchange between processes can block each other.
        return jax.block_until_ready(run(params, *inputs, codec))
    return sample
