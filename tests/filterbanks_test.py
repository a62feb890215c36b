"""Every front end of the evaluation networks, and the resampler, against what the public code computes."""
import jax
import numpy as np
import pytest

from mmaudio_jax import filterbanks
from mmaudio_jax import resampling
from mmaudio_jax.models import htsat
from tests.golden import evaluation_goldens as goldens


def _error(start, values):
    return goldens.error(goldens.entry('front', start), values)


def _decibels(power, filters):
    """As the networks of PANNs and CLAP begin."""
    return 10 * np.log10(np.maximum(power @ filters, 1e-10))


def test_panns():
    power = filterbanks.panns_power(goldens.signal(16_000)[None])
    assert _error('panns_logmel', _decibels(power, goldens.panns_filters())[None]) < 1e-3  # measured 1.6e-4


def test_vggish():
    patches = filterbanks.vggish_patches(goldens.signal(16_000)[None])
    assert _error('vggish_examples', patches[0]) < 1e-3  # measured 1.1e-4
    for samples in (0, 300, 15_759, 15_760, 128_000, 160_000):
        found = jax.eval_shape(filterbanks.vggish_patches, jax.ShapeDtypeStruct((1, samples), np.float32)).shape[1]
        assert filterbanks.vggish_patch_count(samples) == found


def test_passt():
    waveform = np.pad(goldens.signal(32_000), (0, 64_000))
    mel = np.asarray(filterbanks.passt_mel(waveform[None]))
    assert _error('passt_mel', mel.swapaxes(1, 2)) < 1e-3  # measured 3.0e-6


def test_synchformer():
    waveform = goldens.signal(16_000)
    segments = np.stack([waveform[start:start + 10_240] for start in range(0, 128_000 - 10_240 + 1, 5_120)])
    mel = np.asarray(filterbanks.synchformer_mel(segments))
    assert _error('sync_mel', mel.swapaxes(1, 2)) < 1e-3  # measured 1.3e-5


def test_imagebind():
    waveform = goldens.signal(16_000)
    clips = np.stack([waveform[start:start + 32_000] for start in (0, 48_000, 96_000)])
    mel = np.asarray(filterbanks.imagebind_mel(clips - clips.mean(axis=1, keepdims=True)))
    assert _error('imagebind_fbank', mel.swapaxes(1, 2)) < 1e-3  # measured 3.5e-5


def test_clap():
    waveform = np.pad(goldens.signal(48_000), (0, 96_000))[None]
    mel = _decibels(filterbanks.clap_power(waveform), goldens.clap_filters())
    assert _error('clap_logmel', mel[None]) < 1e-3  # measured 6.9e-6
    assert _error('clap_img', htsat.picture(mel)[None]) < 1e-3  # measured 2.4e-4


def test_filters_of_kaldi_are_triangles_in_mel():
    filters = filterbanks.kaldi_filters(16_000, 512, 20, 100.0, 7_000.0)
    assert filters.shape == (257, 20) and not filters[0].any() and not filters[-1].any()
    assert (filters >= 0).all() and filters.max() <= 1
    # Between the centres of the first and last triangle any two neighbours add up to one.
    inside = (filters[:, 0] == 0) & (filters[:, -1] == 0) & (filters.sum(axis=1) > 0)
    np.testing.assert_allclose(filters[inside].sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize('from_hz, to_hz', [(44_100, 16_000), (44_100, 32_000), (44_100, 48_000), (48_000, 16_000),
                                            (16_000, 32_000)])
def test_resampler(from_hz, to_hz):
    waveform = goldens.signal(from_hz, 1.0)
    result = resampling.resample_for_evaluation(waveform, from_hz, to_hz)
    assert result.dtype == np.float32 and _error(f'resample_{from_hz}_{to_hz}', result) < 1e-5  # measured 7.8e-7
