"""The formulas against the matrix products that a trace of the network holds."""
import math

import jax
import jax.numpy as jnp
import pytest

from mmaudio_jax import flops
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

TINY = {'hidden_size': 64, 'num_heads': 2, 'joint_blocks': 3, 'fused_blocks': 2, 'dtype': 'float32', 'sync_fusion': 'modulate',
        'rope': 'aligned', 'mlp': 'conv', 'convolution': 'matmul', 'remat': 'none'}


def dots(jaxpr, times: int = 1) -> int:
    """Operations of all matrix products of a jaxpr; those in a scan as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = equation.params['dimension_numbers']
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * inner * equation.outvars[0].aval.size
        repeats = equation.params['length'] if equation.primitive.name == 'scan' else 1
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                total += dots(value.jaxpr, times * repeats)
            elif isinstance(value, jax.extend.core.Jaxpr):
                total += dots(value, times * repeats)
    return total


def trace(model, sequence, gradient: bool = False):
    shape = lambda *dimensions: jax.ShapeDtypeStruct(dimensions, jnp.float32)
    inputs = (shape(1, sequence.latent_length, model.latent_channels), shape(1),
              shape(1, sequence.clip_length, model.clip_width), shape(1, sequence.sync_length, model.sync_width),
              shape(1, model.text_length, model.text_width))
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    function = model.apply
    if gradient:
        function = jax.grad(lambda *args: model.apply(*args).sum())
    return jax.make_jaxpr(function)(variables, *inputs).jaxpr


@pytest.mark.parametrize('fields', [{}, {'version': 2}, {'mlp': 'linear'}, {'sync_fusion': 'sum_with_visual'},
                                    {'sync_fusion': 'none'}, {'joint_blocks': 1, 'fused_blocks': 0}], ids=str)
def test_forward_is_the_sum_of_the_matrix_products(fields):
    sequence = Sequence('16k', 1.0)
    model = mmaudio.build({'variant': 'small_16k', **TINY, **fields}, sequence)
    assert flops.forward(model, sequence) == dots(trace(model, sequence))


def test_training_is_three_forward_passes():
    """Measured: 0.6 % less than three, because nothing needs the gradient of the network's inputs."""
    sequence = Sequence('16k', 1.0)
    model = mmaudio.build({'variant': 'small_16k', **TINY}, sequence)
    assert 0.97 < dots(trace(model, sequence, gradient=True)) / flops.training(model, sequence) <= 1


def test_large_44k():
    """Twice parameters times tokens, nearly: the latents' blocks hold most of both."""
    sequence = Sequence('44k', 8.0)
    fields = {name: TINY[name] for name in ('dtype', 'sync_fusion', 'rope', 'mlp', 'convolution', 'remat')}
    model = mmaudio.build({'variant': 'large_44k', **fields}, sequence)
    assert 2e11 < flops.forward(model, sequence) < 2 * 1.03e9 * 345 * 1.2


def test_peaks_go_by_the_name_of_the_device():
    assert flops.peak('TPU v5 lite') == 197e12 and flops.peak('TPU v5p') == 459e12 and flops.peak('cpu') is None
    assert flops.peak('NVIDIA H100 80GB HBM3') == 989e12


def test_of_alternatives_the_larger_counts():
    x = jnp.ones((3, 4))
    choose = lambda x: jax.lax.cond(x.sum() > 0, lambda: x @ jnp.ones((4, 5)), lambda: x @ jnp.ones((4, 2)) @ jnp.ones((2, 5)))
    assert flops.traced(jax.make_jaxpr(choose)(x).jaxpr) == 2 * 3 * 4 * 5
