"""Eight CPU devices, full float32 precision; set before JAX is imported."""
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

GOLDEN = pathlib.Path(__file__).parent / 'golden'
