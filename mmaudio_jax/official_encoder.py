"""The condition encoders of the official networks: CLIP for frames and text, Synchformer for motion (SPEC section 7).

Frames go to the device as bytes and are normalised there. Work is cut into calls of one size, so that memory does not grow
with the clips and each tower is compiled once; the last call of a piece of work is filled up with copies and cut back.
"""
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
import dataclasses
import functools
from typing import Any
import weakref

import jax
import numpy as np

from mmaudio_jax import media
from mmaudio_jax import tokenizer
from mmaudio_jax.models import clip
from mmaudio_jax.models import synchformer
from mmaudio_jax.sequence import CLIP_FPS
from mmaudio_jax.sequence import CLIP_WIDTH
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.sequence import SYNC_FPS
from mmaudio_jax.sequence import SYNC_SEGMENT_FRAMES
from mmaudio_jax.sequence import SYNC_SEGMENT_STRIDE
from mmaudio_jax.sequence import SYNC_TOKENS_PER_SEGMENT
from mmaudio_jax.sequence import SYNC_WIDTH
from mmaudio_jax.sequence import TEXT_LENGTH

CLIP_VARIANT, CLIP_WEIGHTS = 'vit_h_14_378', 'clip_vit_h_14_378'
SYNC_VARIANT, SYNC_WEIGHTS = 'visual', 'synchformer_visual'

Load = Callable[[str], Any]  # name of an official model → its parameters
Arrays = Sequence_[np.ndarray] | np.ndarray  # equally shaped, one after the other


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """How many frames, segments and texts one jitted call takes."""
    frames: int
    segments: int
    texts: int


CPU_CALLS = CallSizes(frames=2, segments=2, texts=2)
ACCELERATOR_CALLS = CallSizes(frames=32, segments=16, texts=16)


class Towers:
    """Parameters on the device; a part is loaded when it is first used, and no other part with it.

    Parts are `image` and `text` (CLIP) and `sync` (Synchformer).
    """

    def __init__(self, load: Load):
        self._load = load

    @functools.cached_property
    def image(self) -> Any:
        """Of CLIP's image tower."""
        return jax.device_put({'image': self._load(CLIP_WEIGHTS)['image']})

    @functools.cached_property
    def text(self) -> Any:
        """Of CLIP's text tower."""
        return jax.device_put({'text': self._load(CLIP_WEIGHTS)['text']})

    @functools.cached_property
    def sync(self) -> Any:
        """Of Synchformer's visual encoder."""
        return jax.device_put(self._load(SYNC_WEIGHTS))


_SHARED: weakref.WeakValueDictionary[Load, Towers] = weakref.WeakValueDictionary()


def shared_towers(load: Load) -> Towers:
    """The same Towers for the same `load` as long as an encoder holds them: a clip of another length loads nothing again."""
    towers = _SHARED.get(load)
    if towers is None:
        towers = _SHARED[load] = Towers(load)
    return towers


class OfficialEncoder:
    """An encoders.Encoder by the official networks; made by `encoders.make('official', ...)`.

    The compute dtype is that of the loaded parameters. Results are float32.
    """

    def __init__(self, sequence: Sequence, towers: Towers, calls: CallSizes):
        """
        Args:
          sequence: lengths of the clips.
          towers: parameters.
          calls: sizes of the jitted calls.
        """
        self._sequence, self._towers, self._calls = sequence, towers, calls
        clip_size, sync_size = clip.VARIANTS[CLIP_VARIANT]['image_size'], synchformer.VARIANTS[SYNC_VARIANT]['image_size']
        self.frame_requests = (media.FrameRequest(CLIP_FPS, clip_size, clip_size, 'squash'),
                               media.FrameRequest(SYNC_FPS, sync_size, sync_size, 'crop'))

    def encode_video(self, clip_frames: np.ndarray, sync_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See encoders.Encoder; raises ValueError when the frames are not those that were asked for."""
        sequence = self._sequence
        check_frames((clip_frames, sync_frames), self.frame_requests, (sequence.clip_length, sequence.sync_frames))
        clip_features = self.encode_frames(clip_frames.reshape(-1, *clip_frames.shape[2:]))
        segments = [frames[start:start + SYNC_SEGMENT_FRAMES] for frames in sync_frames
                    for start in SYNC_SEGMENT_STRIDE * np.arange(sequence.num_segments)]
        sync_features = self.encode_segments(segments)
        return (clip_features.reshape(len(clip_frames), sequence.clip_length, CLIP_WIDTH),
                sync_features.reshape(len(sync_frames), sequence.sync_length, SYNC_WIDTH))

    def encode_frames(self, frames: Arrays) -> np.ndarray:
        """CLIP features of single frames, uint8 `[384, 384, 3]` each → float32 `[frames, 1024]`."""
        if not len(frames):
            return np.zeros((0, CLIP_WIDTH), np.float32)
        return _in_calls(image_features, self._towers.image, frames, self._calls.frames)

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """CLIP feature of a still image of any size, uint8 `[H, W, 3]` → float32 `[1024]`."""
        return self.encode_frames([media.fit_frame(image, self.frame_requests[0])])[0]

    def encode_segments(self, segments: Arrays) -> np.ndarray:
        """Synchformer features of segments, uint8 `[16, 224, 224, 3]` each → float32 `[segments, 8, 768]`."""
        if not len(segments):
            return np.zeros((0, SYNC_TOKENS_PER_SEGMENT, SYNC_WIDTH), np.float32)
        return _in_calls(sync_features, self._towers.sync, segments, self._calls.segments)

    def encode_text(self, texts: Sequence_[str]) -> np.ndarray:
        """See encoders.Encoder; a text that stands there several times is encoded once."""
        tokens, places = np.unique(tokenizer.tokenize(texts), axis=0, return_inverse=True)
        if not len(tokens):
            return np.zeros((0, TEXT_LENGTH, CLIP_WIDTH), np.float32)
        return _in_calls(_text_features, self._towers.text, tokens, self._calls.texts)[places.reshape(-1)]


@jax.jit
def image_features(params: Any, frames: jax.Array) -> Any:
    """uint8 `[frames, h, w, 3]` → float32 `[frames, 1024]`."""
    model = clip.build(CLIP_VARIANT, _dtype(params))
    return model.apply({'params': params}, clip.normalize(frames), method='encode_image')


@jax.jit
def _text_features(params: Any, tokens: jax.Array) -> Any:
    """int32 `[texts, 77]` → float32 `[texts, 77, 1024]`."""
    return clip.build(CLIP_VARIANT, _dtype(params)).apply({'params': params}, tokens, method='encode_text')


@jax.jit
def sync_features(params: Any, segments: jax.Array) -> Any:
    """uint8 `[segments, 16, h, w, 3]` → float32 `[segments, 8, 768]`."""
    return synchformer.build(SYNC_VARIANT, _dtype(params)).apply({'params': params}, synchformer.normalize(segments))


def _dtype(params: Any) -> Any:
    """The dtype of the largest parameter: a loader may keep small ones in float32."""
    return max(jax.tree.leaves(params), key=lambda leaf: leaf.size).dtype


def _in_calls(function: Callable[[Any, Any], Any], params: Any, items: Arrays, size: int) -> np.ndarray:
    """function(params, items) in calls of `size` items, of which one runs while the next is handed over."""
    results: list[Any] = []
    for start in range(0, len(items), size):
        part = [*items[start:start + size]]
        results.append(function(params, np.stack(part + part[-1:] * (size - len(part)))))
        if len(results) > 1:
            results[-2] = np.asarray(results[-2])
    return np.concatenate([np.asarray(result) for result in results])[:len(items)]


def check_frames(streams: Sequence_[np.ndarray], requests: Sequence_[media.FrameRequest], lengths: Sequence_[int]) -> None:
    """Passes when every stream is uint8 `[B, length, height, width, 3]` of its request.

    Raises:
      ValueError: names what it is and what it must be.
    """
    for frames, request, length in zip(streams, requests, lengths, strict=True):
        expected = (length, request.height, request.width, 3)
        if frames.shape[1:] != expected or frames.dtype != np.uint8:
            raise ValueError(f'frames are {frames.dtype} {list(frames.shape)}, not uint8 [B, '
                             f'{", ".join(map(str, expected))}] as frame_requests asks')
