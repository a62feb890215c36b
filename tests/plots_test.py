"""The picture shows the sound, and the marks stand where they were asked for."""
import errno
import os

import numpy as np
from PIL import Image
import pytest

from mmaudio_jax import media
from mmaudio_jax import plots

RATE = 16_000


def _click(at_s, seconds=2.0):
    waveform = np.zeros(int(seconds * RATE), np.float32)
    start = int(at_s * RATE)
    waveform[start:start + 400] = np.random.default_rng(0).normal(size=400)
    return waveform


def _rows(path):
    return np.asarray(Image.open(path).convert('RGB')).astype(int)


def test_picture_is_whole_and_brightest_where_the_sound_is(tmp_path):
    path = tmp_path / 'new' / 'click.png'
    plots.spectrogram(path, {'early': _click(0.5), 'late': _click(1.5)}, RATE)
    picture = _rows(path)
    assert sorted(item.name for item in path.parent.iterdir()) == ['click.png']
    height = picture.shape[0]
    bright = (picture.sum(-1) < 700) & (picture[..., 0] > 200) & (picture[..., 2] < 160)  # the warm end of the colours
    early, late = (np.nonzero(half)[1].mean() for half in (bright[:height // 2], bright[height // 2:]))
    assert late - early > 0.35 * picture.shape[1]  # one second of two, less the margins


@pytest.mark.filterwarnings('error')
def test_any_caption_and_any_length(tmp_path):
    for title in ('costs $5, or $6', r'a $\frac$ b', 'x\ny', '', 'not UTF-8: \udcff'):
        plots.spectrogram(tmp_path / 'a.png', {title: _click(0.5)}, RATE)
    for samples in (1, 640, 1024):  # shorter than a window of the transform
        assert plots.mel_db(np.ones(samples, np.float32), RATE).shape == (96, 1 + samples // 160)
        plots.spectrogram(tmp_path / 'a.png', {'short': np.ones(samples, np.float32)}, RATE)


def test_all_rows_are_on_one_scale(tmp_path):
    bright = []
    for factor in (1.0, 0.03):
        plots.spectrogram(tmp_path / 'a.png', {'loud': _click(0.5), 'other': factor * _click(0.5)}, RATE)
        picture = _rows(tmp_path / 'a.png')
        warm = (picture.sum(-1) < 700) & (picture[..., 0] > 240) & (picture[..., 2] < 160)
        bright.append([int(half.sum()) for half in np.array_split(warm, 2)])
    assert bright[1][0] == bright[0][0] > 0  # the loud one stays as it was
    assert bright[1][1] < 0.1 * bright[0][1]  # 30 dB less is darker


def test_marks_change_the_picture(tmp_path):
    plots.spectrogram(tmp_path / 'a.png', {'x': _click(0.5)}, RATE, {'true': [], 'generated': []})
    plots.spectrogram(tmp_path / 'b.png', {'x': _click(0.5)}, RATE, {'true': [1.5], 'generated': []})
    before, after = _rows(tmp_path / 'a.png'), _rows(tmp_path / 'b.png')
    changed = np.nonzero((before != after).any(-1)[100:])[1]
    assert changed.size and np.ptp(changed) < 8


def test_silence_and_wrong_use(tmp_path):
    plots.spectrogram(tmp_path / 'silence.png', {'x': np.zeros(RATE, np.float32)}, RATE)
    with pytest.raises(ValueError, match='at least one'):
        plots.spectrogram(tmp_path / 'none.png', {}, RATE)
    with pytest.raises(ValueError, match='at most 3'):
        plots.spectrogram(tmp_path / 'many.png', {'x': _click(0.1)}, RATE, {str(i): [] for i in range(4)})


def test_dots_stand_at_their_figures(tmp_path):
    def blue(value):
        plots.intervals(tmp_path / 'a.png', {'FD': {'ours': (value, value - 1, value + 1), 'theirs': (0.0, 0.0, 0.0),
                                                    'others': (10.0, 10.0, 10.0)}})
        picture = _rows(tmp_path / 'a.png')
        return np.nonzero((picture[..., 2] > 130) & (picture[..., 0] < 60))[1]
    low, high = blue(2.0), blue(8.0)
    assert high.mean() - low.mean() > 3 * np.ptp(low) / 2 > 0  # 6 to the right, with bars of ± 1
    plots.intervals(tmp_path / 'b.png', {str(i): {'x': (1.0, 0.5, 1.5)} for i in range(5)})
    # '$' is a letter, not mathematics; folders need not have names in UTF-8.
    plots.intervals(tmp_path / 'd.png', {'FD': {r'ours $a\x and $6': (1.0, 0.5, 1.5), 'b\udcff': (1.0, 0.5, 1.5)}})
    assert _rows(tmp_path / 'b.png').shape[0] > _rows(tmp_path / 'a.png').shape[0]  # a second row of panels
    with pytest.raises(ValueError, match='at least one panel'):
        plots.intervals(tmp_path / 'c.png', {})


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):

    def full(self, file, **_):
        file.write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots.FigureCanvasAgg, 'print_figure', full)
    with pytest.raises(media.MediaError, match='/a.png: No space left on device'):
        plots.spectrogram(tmp_path / 'a.png', {'a': np.zeros(16_000)}, 16_000)
    assert not list(tmp_path.iterdir())
