"""Eight CPU devices, full float32 precision; set before JAX is imported."""
import os
import pathlib

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

QUICK = {'xla_backend_optimization_level': 0}  # of XLA: compiles small programs in less than half the time
GOLDEN = pathlib.Path(__file__).parent / 'golden'


def take_form_of_tpus(monkeypatch):
    """What is traced from here on is what TPUs compute, in this machine's float32."""
    monkeypatch.setattr('jax.lax.platform_dependent', lambda *args, default, tpu=None, cpu=None: (tpu or default)(*args))


@pytest.fixture(name='compiled', scope='module')
def fixture_compiled(tmp_path_factory):
    """One compilation for all runs of a file."""
    import jax
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update('jax_compilation_cache_dir', str(tmp_path_factory.mktemp('compiled')))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    yield
    jax.config.update('jax_compilation_cache_dir', before[0])
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])
