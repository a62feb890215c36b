"""Which noise and which conditions an example of the records gets, whatever the batch and the devices."""
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import partitioning
from mmaudio_jax import record_sampler
from mmaudio_jax import sampler
from mmaudio_jax.sequence import Sequence
from tests import tiny_run


def test_an_example_has_the_noise_of_its_own_number():
    config, sequence = tiny_run.make_config(), Sequence('16k', 1.0)
    config.sampling.update(num_steps=2, guidance=2.0, seed=3)
    model, mesh = tiny_run.Network(sequence.latent_channels), partitioning.make_mesh({})
    generator = np.random.default_rng(0)
    shapes = {'clip_features': (8, 1024), 'sync_features': (16, 768), 'text_features': (77, 1024)}
    examples = [{**{name: generator.normal(size=shape).astype(np.float16) for name, shape in shapes.items()},
                 'video_exists': n != 1, 'text_exists': n != 2} for n in range(3)]
    conditions = [jnp.stack([example[name] for example in examples]).astype(jnp.float32) for name in shapes]
    noise = sampler.noise(3, [5, 6, 7], sequence.latent_length, sequence.latent_channels)
    params = {**model.init(jax.random.key(0), noise, jnp.zeros(3), *conditions)['params'],
              'latent_std': np.ones((1, 1, sequence.latent_channels), np.float32),
              **{f'empty_{name}_feat': generator.normal(size=shape).astype(np.float32)
                 for name, shape in (('clip', (1, 1024)), ('sync', (1, 768)), ('string', (77, 1024)))}}
    clip, sync, text = conditions  # what is not there is the learned empty feature, whatever the record holds
    conditions = [clip.at[1].set(params['empty_clip_feat']), sync.at[1].set(params['empty_sync_feat']),
                  text.at[2].set(params['empty_string_feat'])]
    expected = sampler.make_sampler(model, sampler.SamplerSettings.of(config.sampling))(params, noise, *conditions, None)
    sample = record_sampler.make(config, partitioning.on_mesh(model, mesh, config), mesh, sequence, 8)
    np.testing.assert_allclose(sample(params, examples, 5)[:3], expected, atol=2e-5)  # measured 0
