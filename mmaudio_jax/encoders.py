"""Condition encoders behind one interface: frames and text → features of the shapes in sequence.py.

official: CLIP and Synchformer (official_encoder.py). pixels: fixed functions, without weights.

pixels, CLIP stream: each frame's 16 x 16 colours and edge strengths.
pixels, sync stream: what moves where and which way, at three instants of each token. Token i stands for the time
[i, i + 1) · duration / S: in true order, unlike Synchformer's overlapping segments (a small network learns from this one).
pixels, text: a fixed random vector for each CLIP token and each position.
"""
import functools
from typing import Protocol
from typing import Sequence as Sequence_

import jax
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import media
from mmaudio_jax import official_encoder
from mmaudio_jax import tokenizer
from mmaudio_jax.frames import fit_frame
from mmaudio_jax.sequence import CLIP_FPS
from mmaudio_jax.sequence import CLIP_WIDTH
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.sequence import SYNC_FPS
from mmaudio_jax.sequence import SYNC_WIDTH
from mmaudio_jax.sequence import TEXT_LENGTH

ENCODERS = ('official', 'pixels')

CLIP_SIZE = 32  # pixels a side, as decoded
CLIP_GRID = 16  # cells a side: 16 · 16 · (3 colours + edges) = 1024
SYNC_SIZE = 32
SYNC_GRID = 8  # 8 · 8 cells · 4 measures · 3 instants = 768
SYNC_INSTANTS = (1 / 6, 1 / 2, 5 / 6)  # of a token: above the frame rate, so that nothing between two frames is skipped
LUMA = (0.299, 0.587, 0.114)
FLOW_EPS = 0.05**2  # squared gradient below which there is nothing to follow, (luma a pixel)²
SYNC_SCALE = np.array([40.0, 40.0, 8.0, 8.0], np.float32)  # change, its size, motion across, down: where asinh bends
SYNC_GAIN = 6.0  # after asinh: deviations of 0.7, 1.1, 1.0 and 1.0 on the built-in dataset
EDGE_SCALE = 15.0
TEXT_SEED = 2412_15322


class Encoder(Protocol):
    """What every encoder offers. V and S are those of its sequence; h and w those of its frame requests."""
    frame_requests: tuple[media.FrameRequest, media.FrameRequest]  # CLIP stream, sync stream

    def encode_video(self, clip_frames: np.ndarray, sync_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 `[B, V, h, w, 3]` and `[B, F, h, w, 3]` → float32 `[B, V, 1024]` and `[B, S, 768]`."""

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """The CLIP stream alone."""

    def encode_sync(self, frames: np.ndarray) -> np.ndarray:
        """The sync stream alone."""

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """The CLIP feature of a still image of any size, uint8 `[H, W, 3]` → float32 `[1024]`."""

    def encode_text(self, texts: Sequence_[str]) -> np.ndarray:
        """float32 `[B, 77, 1024]`; that of '' is the empty string feature."""


class PixelEncoder:
    """Fixed functions of the pixels and the tokens; made by `make('pixels', ...)`."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence
        self.frame_requests = (media.FrameRequest(CLIP_FPS, CLIP_SIZE, CLIP_SIZE, 'squash', coarse=True),
                               media.FrameRequest(SYNC_FPS, SYNC_SIZE, SYNC_SIZE, 'crop', coarse=True))

    def encode_video(self, clip_frames: np.ndarray, sync_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Encoder; raises ValueError when the frames are not those that were asked for."""
        return self.encode_clip(clip_frames), self.encode_sync(sync_frames)

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """See Encoder."""
        official_encoder.check_frames(frames, self.frame_requests[0], self._sequence.clip_length)
        return np.stack([_appearance(clip) for clip in frames])

    def encode_sync(self, frames: np.ndarray) -> np.ndarray:
        """See Encoder."""
        official_encoder.check_frames(frames, self.frame_requests[1], self._sequence.sync_frames)
        return np.stack([self._motion(clip) for clip in frames])

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """See Encoder."""
        return _appearance(fit_frame(image, self.frame_requests[0])[None])[0]

    def _motion(self, frames: np.ndarray) -> np.ndarray:
        """uint8 `[F, h, w, 3]` → float32 `[S, 768]`."""
        measures = _frame_motion(frames)
        tokens = self._sequence.sync_length
        times_s = (np.arange(tokens)[:, None] + np.array(SYNC_INSTANTS)) * self._sequence.duration_s / tokens
        # What changed between frames j and j + 1 is seen at the middle of the two.
        place = np.clip(times_s.ravel() * SYNC_FPS - 0.5, 0, len(measures) - 1)
        before = np.minimum(place.astype(int), len(measures) - 2)
        weight = (place - before).astype(np.float32)[:, None]
        between = (1 - weight) * measures[before] + weight * measures[before + 1]
        return between.reshape(tokens, SYNC_WIDTH)

    def encode_text(self, texts: Sequence_[str]) -> np.ndarray:
        """See Encoder; rows of padding are zero."""
        features = np.zeros((len(texts), TEXT_LENGTH, CLIP_WIDTH), np.float32)
        for row, tokens in zip(features, tokenizer.tokenize(texts)):
            for position in range(int(np.count_nonzero(tokens))):
                row[position] = (_fixed_vector('token', int(tokens[position])) + _fixed_vector('place', position)) / np.sqrt(2)
        return features


def _cells(values: np.ndarray, grid: int) -> np.ndarray:
    """Means over the cells of a grid: `[F, h, w, ...]` → `[F, grid, grid, ...]`."""
    frames, height, width = values.shape[:3]
    cells = values.reshape(frames, grid, height // grid, grid, width // grid, *values.shape[3:])
    return cells.mean(axis=(2, 4))


def _gradients(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences down and across of `[F, h, w]`, zero at the border."""
    down, across = np.zeros_like(luma), np.zeros_like(luma)
    down[:, 1:-1] = (luma[:, 2:] - luma[:, :-2]) / 2
    across[:, :, 1:-1] = (luma[:, :, 2:] - luma[:, :, :-2]) / 2
    return down, across


def _appearance(frames: np.ndarray) -> np.ndarray:
    """uint8 `[V, h, w, 3]` → colours and edge strengths of every cell, float32 `[V, 1024]`."""
    pixels = frames.astype(np.float32) / 255
    down, across = _gradients(pixels @ np.array(LUMA, np.float32))
    colours = (_cells(pixels, CLIP_GRID) - 0.5) * 4
    edges = _cells(np.hypot(down, across), CLIP_GRID) * EDGE_SCALE
    return np.concatenate([colours.reshape(len(frames), -1), edges.reshape(len(frames), -1)], axis=1)


def _frame_motion(frames: np.ndarray) -> np.ndarray:
    """Motion between neighbouring frames, uint8 `[F, h, w, 3]` → float32 `[F - 1, 8 · 8 · 4]`.

    Each cell has the mean change of brightness, its mean size, and the motion across and down that explains the change best
    if the cell moves as one (least squares on the brightness constancy equation; Lucas and Kanade 1981, one equation a cell
    and direction), in pixels a frame.
    """
    luma = frames.astype(np.float32) @ (np.array(LUMA, np.float32) / 255)
    change = luma[1:] - luma[:-1]
    down, across = _gradients((luma[1:] + luma[:-1]) / 2)
    strength = _cells(down * down + across * across, SYNC_GRID) + FLOW_EPS
    measures = [
        _cells(change, SYNC_GRID),
        _cells(np.abs(change), SYNC_GRID), -_cells(change * across, SYNC_GRID) / strength,
        -_cells(change * down, SYNC_GRID) / strength
    ]
    # asinh: a quiet motion is still seen beside a loud one.
    return SYNC_GAIN * np.arcsinh(np.stack(measures, axis=-1) * SYNC_SCALE).reshape(len(change), -1)


@functools.lru_cache(maxsize=8192)
def _fixed_vector(kind: str, number: int) -> np.ndarray:
    """A vector of unit variance that depends on nothing but its name, float32 [1024]."""
    seed = (TEXT_SEED, ('token', 'place').index(kind), number)
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(CLIP_WIDTH, dtype=np.float32)


def make(name: str, sequence: Sequence, load: official_encoder.Load, mesh: Mesh | None = None) -> Encoder:
    """The encoder of that name.

    Args:
      name: config.extract.encoder, 'pixels' or 'official'.
      sequence: rate and lengths of the clips.
      load: 'official' only: gives the parameters of an official model, 'clip_vit_h_14_378' and 'synchformer_visual', when
        they are first needed. Encoders made with the same `load` and `mesh` share them.
      mesh: 'official' only: splits frames, segments and texts over its devices; None: the default device.

    Raises:
      ValueError: an unknown name.
    """
    if name == 'official':
        sizes = official_encoder.CPU_CALLS if jax.default_backend() == 'cpu' else official_encoder.ACCELERATOR_CALLS
        return official_encoder.OfficialEncoder(sequence, official_encoder.shared_towers(load, mesh), sizes)
    if name != 'pixels':
        raise ValueError(f'config.extract.encoder is {name!r}; it must be one of {", ".join(ENCODERS)}')
    return PixelEncoder(sequence)
