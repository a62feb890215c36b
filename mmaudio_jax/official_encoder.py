"""The condition encoders of the official networks: CLIP for frames and text, Synchformer for motion.

Frames go to the device as bytes and are normalised there. Work is cut into calls of one size, so that memory does not grow
with the clips and each tower is compiled once; the last call of a piece of work is filled up with copies and cut back.
"""
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import calls
from mmaudio_jax import tokenizer
from mmaudio_jax.frames import fit_frame
from mmaudio_jax.frames import FrameRequest
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
from mmaudio_jax.weights import files

CLIP_VARIANT, SYNC_VARIANT = (files.BY_NAME[name].variant for name in (files.CLIP, files.SYNCHFORMER))

Load = Callable[[str], Any]  # name of an official model → its parameters
Arrays = Sequence_[np.ndarray] | np.ndarray  # equally shaped, one after the other


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """How many frames, segments and texts one jitted call takes on a device."""
    frames: int
    segments: int
    texts: int


CPU_CALLS = CallSizes(frames=2, segments=2, texts=2)
ACCELERATOR_CALLS = CallSizes(frames=32, segments=16, texts=16)


class Towers:
    """Parameters on the device, or on each one of a mesh; a part is loaded when it is first used, and no other part with it.

    Parts are `image` and `text` (CLIP) and `sync` (Synchformer).
    """

    def __init__(self, load: Load, mesh: Mesh | None = None):
        self._load, self.mesh = load, mesh

    @calls.LoadedOnce
    def image(self) -> Any:
        """Of CLIP's image tower."""
        return calls.put({'image': self._load(files.CLIP)['image']}, self.mesh)

    @calls.LoadedOnce
    def text(self) -> Any:
        """Of CLIP's text tower."""
        return calls.put({'text': self._load(files.CLIP)['text']}, self.mesh)

    @calls.LoadedOnce
    def sync(self) -> Any:
        """Of Synchformer's visual encoder."""
        return calls.put(self._load(files.SYNCHFORMER), self.mesh)


shared_towers = functools.partial(calls.shared, Towers)  # a clip of another length loads nothing again


class OfficialEncoder:
    """An encoders.Encoder by the official networks; made by `encoders.make('official', ...)`.

    The compute dtype is that of the loaded parameters. Results are float32.
    """

    def __init__(self, sequence: Sequence, towers: Towers, sizes: CallSizes):
        """
        Args:
          sequence: lengths of the clips.
          towers: parameters.
          sizes: of the jitted calls.
        """
        self._sequence, self._towers, self._sizes = sequence, towers, sizes
        clip_size, sync_size = clip.VARIANTS[CLIP_VARIANT]['image_size'], synchformer.VARIANTS[SYNC_VARIANT]['image_size']
        self.frame_requests = (FrameRequest(CLIP_FPS, clip_size, clip_size, 'squash', rule='nearest'),
                               FrameRequest(SYNC_FPS, sync_size, sync_size, 'crop', rule='nearest'))

    def encode_video(self, clip_frames: np.ndarray, sync_frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See encoders.Encoder; raises ValueError when the frames are not those that were asked for."""
        return self.encode_clip(clip_frames), self.encode_sync(sync_frames)

    def encode_clip(self, frames: np.ndarray) -> np.ndarray:
        """See encoders.Encoder."""
        check_frames(frames, self.frame_requests[0], self._sequence.clip_length)
        features = self.encode_frames(frames.reshape(-1, *frames.shape[2:]))
        return features.reshape(len(frames), self._sequence.clip_length, CLIP_WIDTH)

    def encode_sync(self, frames: np.ndarray) -> np.ndarray:
        """See encoders.Encoder."""
        check_frames(frames, self.frame_requests[1], self._sequence.sync_frames)
        segments = [clip[start:start + SYNC_SEGMENT_FRAMES] for clip in frames
                    for start in SYNC_SEGMENT_STRIDE * np.arange(self._sequence.num_segments)]
        return self.encode_segments(segments).reshape(len(frames), self._sequence.sync_length, SYNC_WIDTH)

    def encode_frames(self, frames: Arrays) -> np.ndarray:
        """CLIP features of single frames, uint8 `[384, 384, 3]` each → float32 `[frames, 1024]`."""
        if not len(frames):
            return np.zeros((0, CLIP_WIDTH), np.float32)
        return self._in_calls(image_features, self._towers.image, frames, self._sizes.frames)

    def encode_image(self, image: np.ndarray) -> np.ndarray:
        """See encoders.Encoder."""
        return self.encode_frames([fit_frame(image, self.frame_requests[0])])[0]

    def encode_segments(self, segments: Arrays) -> np.ndarray:
        """Synchformer features of segments, uint8 `[16, 224, 224, 3]` each → float32 `[segments, 8, 768]`."""
        if not len(segments):
            return np.zeros((0, SYNC_TOKENS_PER_SEGMENT, SYNC_WIDTH), np.float32)
        return self._in_calls(sync_features, self._towers.sync, segments, self._sizes.segments)

    def encode_text(self, texts: Sequence_[str]) -> np.ndarray:
        """See encoders.Encoder; a text that stands there several times is encoded once."""
        tokens, places = np.unique(tokenizer.tokenize(texts), axis=0, return_inverse=True)
        if not len(tokens):
            return np.zeros((0, TEXT_LENGTH, CLIP_WIDTH), np.float32)
        return self._in_calls(text_features, self._towers.text, tokens, self._sizes.texts)[places.reshape(-1)]

    def _in_calls(self, function: Callable[[Any, Any], Any], params: Any, items: Arrays, size: int) -> np.ndarray:
        return calls.in_calls(functools.partial(function, params), items, size, self._towers.mesh)


@jax.jit
def image_features(params: Any, frames: jax.Array) -> Any:
    """uint8 `[frames, h, w, 3]` → float32 `[frames, 1024]`."""
    model = clip.build(CLIP_VARIANT, _dtype(params))
    return model.apply({'params': params}, clip.normalize(frames), method='encode_image')


@jax.jit
def text_features(params: Any, tokens: jax.Array) -> Any:
    """int32 `[texts, 77]` → float32 `[texts, 77, 1024]`."""
    return clip.build(CLIP_VARIANT, _dtype(params)).apply({'params': params}, tokens, method='encode_text')


@jax.jit
def sync_features(params: Any, segments: jax.Array) -> Any:
    """uint8 `[segments, 16, h, w, 3]` → float32 `[segments, 8, 768]`."""
    return synchformer.build(SYNC_VARIANT, _dtype(params)).apply({'params': params}, synchformer.normalize(segments))


def _dtype(params: Any) -> Any:
    """The dtype of the largest parameter: a loader may keep small ones in float32."""
    return max(jax.tree.leaves(params), key=lambda leaf: leaf.size).dtype


def check_frames(frames: np.ndarray, request: FrameRequest, length: int) -> None:
    """Passes when the frames are uint8 `[B, length, height, width, 3]` of their request.

    Raises:
      ValueError: names what it is and what it must be.
    """
    expected = (length, request.height, request.width, 3)
    if frames.shape[1:] != expected or frames.dtype != np.uint8:
        raise ValueError(f'frames are {frames.dtype} {list(frames.shape)}, not uint8 [B, '
                         f'{", ".join(map(str, expected))}] as frame_requests asks')
