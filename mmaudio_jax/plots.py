"""Pictures: mel spectrograms of sounds, one above the other, with onset marks; figures with their intervals."""
from collections.abc import Mapping
from collections.abc import Sequence
import os
import pathlib
import textwrap

import librosa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from mmaudio_jax import media

_MEL_BINS = 96
_FLOOR_DB = -70.0  # below the loudest bin of the picture
_WIDTH_IN, _ROW_IN, _DPI = 9.0, 2.2, 100
_PANELS_A_ROW = 4
_TITLE_LETTERS = 64  # of a caption; beyond them the legend begins
_MARKS = (('#ffffff', '-'), ('#35e0ff', '--'), ('#ffd23f', ':'))  # colour and line of the first, second, third set of onsets


def mel_db(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Mel power spectrogram of `waveform` [samples] in dB (floor 1e-10): `[96, frames]` float32, hop 10 ms."""
    hop = sample_rate_hz // 100
    fft_length = 2048 if sample_rate_hz > 32_000 else 1024
    filled = np.pad(np.asarray(waveform, np.float32), (0, max(0, fft_length - len(waveform))))  # librosa warns of shorter ones
    power = librosa.feature.melspectrogram(y=filled, sr=sample_rate_hz, n_fft=fft_length, hop_length=hop, n_mels=_MEL_BINS)
    return librosa.power_to_db(power[:, :1 + len(waveform) // hop], ref=1.0, amin=1e-10, top_db=None)


def spectrogram(path: str | os.PathLike,
                waveforms: Mapping[str, np.ndarray],
                sample_rate_hz: int,
                onsets_s: Mapping[str, Sequence[float]] | None = None) -> None:
    """Writes a PNG with one mel spectrogram for each entry of `waveforms`, on one time axis and one colour scale.

    Args:
      path: the PNG; written beside and renamed when whole, its folder is made.
      waveforms: title to sound [samples], float.
      sample_rate_hz: of every waveform.
      onsets_s: legend label to times in seconds; each set is drawn on every row, at most three sets.

    Raises:
      ValueError: no waveform, or more sets of onsets than there are line styles.
      media.MediaError: disk full, no permission.
    """
    onsets = dict(onsets_s or {})
    if not waveforms:
        raise ValueError('plots.spectrogram needs at least one waveform')
    if len(onsets) > len(_MARKS):
        raise ValueError(f'plots.spectrogram draws at most {len(_MARKS)} sets of onsets, not {len(onsets)}')
    figure = Figure(figsize=(_WIDTH_IN, _ROW_IN * len(waveforms) + 0.5), dpi=_DPI, layout='constrained')
    canvas = FigureCanvasAgg(figure)  # no pyplot: it keeps figures, and is not safe in threads
    axes = figure.subplots(len(waveforms), 1, sharex=True, squeeze=False)[:, 0]
    pictures = {title: mel_db(waveform, sample_rate_hz) for title, waveform in waveforms.items()}
    loudest = max(float(picture.max()) for picture in pictures.values())
    for axis, (title, picture) in zip(axes, pictures.items()):
        seconds = len(waveforms[title]) / sample_rate_hz
        axis.imshow(picture, origin='lower', aspect='auto', extent=(0.0, seconds, 0, _MEL_BINS), cmap='magma',
                    vmin=loudest + _FLOOR_DB, vmax=loudest, interpolation='nearest')
        for (label, times), (colour, line) in zip(onsets.items(), _MARKS):
            axis.vlines(list(times), 0, _MEL_BINS, colors=colour, linestyles=line, linewidth=1.0, label=label)
        axis.set_ylabel('mel bin')
        axis.set_title(_label(title), fontsize=10, loc='left', parse_math=False)
    axes[-1].set_xlabel('seconds')
    if onsets:
        axes[0].legend(loc='lower right', bbox_to_anchor=(1.0, 1.0), ncols=len(onsets), fontsize=8, borderaxespad=0.2,
                       facecolor='#777777', labelcolor='white')  # above the picture, where the title leaves room
    _write(canvas, pathlib.Path(path))


def intervals(path: str | os.PathLike, panels: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Writes a PNG with a panel for each metric: a row for each system, its figure as a dot, its interval as a bar.

    Args:
      path: as in `spectrogram`.
      panels: title → system → (value, low, high); low and high are the value where no interval is known, and the dot is grey.

    Raises:
      ValueError: no panel.
      media.MediaError: as in `spectrogram`.
    """
    if not panels:
        raise ValueError('plots.intervals needs at least one panel')
    names = list(dict.fromkeys(name for systems in panels.values() for name in systems))
    columns = min(len(panels), _PANELS_A_ROW)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 2.6 * columns, rows * (0.9 + 0.22 * len(names))), dpi=_DPI, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, (title, systems) in zip(axes, panels.items()):
        for name, (value, low, high) in systems.items():
            colour, row = ('#888888' if low == high else '#1f5fa8'), names.index(name)
            axis.hlines(row, low, high, colors=colour, linewidth=2.0)
            axis.plot([value], [row], 'o', color=colour, markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(names)), [_label(name) for name in names], parse_math=False)  # '$' is a letter
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels):]:
        axis.set_axis_off()
    _write(canvas, pathlib.Path(path))


def _label(text: str) -> str:
    """The beginning of a text; of a file name what is not UTF-8 (PEP 383) as \\udcff, because it cannot be drawn."""
    return textwrap.shorten(text.encode('utf-8', 'backslashreplace').decode(), _TITLE_LETTERS, placeholder=' …')


def _write(canvas: FigureCanvasAgg, path: pathlib.Path) -> None:
    """The PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with media.atomic_file(path) as beside:
        canvas.print_figure(beside, format='png')
