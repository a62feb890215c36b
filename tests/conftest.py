"""Eight CPU devices, full float32 precision; set before JAX is imported."""
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

QUICK = {'xla_backend_optimization_level': 0}  # of XLA: compiles small programs in less than half the time
GOLDEN = pathlib.Path(__file__).parent / 'golden'


def take_form_of_tpus(monkeypatch):
    """What is traced from here on is what TPUs compute, in this machine's float32."""
    monkeypatch.setattr('jax.lax.platform_dependent', lambda *args, default, tpu=None, cpu=None: (tpu or default)(*args))
