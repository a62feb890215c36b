"""The evaluation networks behind one interface: a clip's file → arrays → embeddings. Published weights, float32.

| name | checkpoint | licence of the weights |
|---|---|---|
| vggish | vggish-10086976.pth (torchvggish, release v0.1) | Apache-2.0 |
| panns | Cnn14_16k_mAP=0.438.pth (PANNs) | CC BY 4.0 |
| passt | passt-s-f128-p16-s10-ap.476-swa.pt (PaSST, release v0.0.1-audioset) | Apache-2.0 |
| synchformer_sound, synchformer_picture | synchformer_state_dict.pth (MMAudio, release v0.1) | MIT |
| imagebind_sound, imagebind_picture | imagebind_huge.pth (ImageBind) | **CC BY-NC-SA 4.0: not for commercial use** |
| clap_sound, clap_text | music_speech_audioset_epoch_15_esc_89.98.pt (LAION-CLAP) | CC0 |
| clap_text, too | vocab.json and merges.txt of roberta-base | MIT |

The user puts the files into one folder; nothing is downloaded.
"""
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import evaluation_media
from mmaudio_jax import filterbanks
from mmaudio_jax import sequence
from mmaudio_jax import tokenizer_roberta
from mmaudio_jax.models import clap
from mmaudio_jax.models import clip
from mmaudio_jax.models import cnn14
from mmaudio_jax.models import imagebind
from mmaudio_jax.models import passt
from mmaudio_jax.models import synchformer
from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.models import vggish
from mmaudio_jax.weights import clap as clap_weights
from mmaudio_jax.weights import cnn14 as cnn14_weights
from mmaudio_jax.weights import imagebind as imagebind_weights
from mmaudio_jax.weights import passt as passt_weights
from mmaudio_jax.weights import synchformer as synchformer_weights
from mmaudio_jax.weights import synchformer_offset as offset_weights
from mmaudio_jax.weights import tensor_file
from mmaudio_jax.weights import vggish as vggish_weights

Tensors = Mapping[str, np.ndarray]
Apply = Callable[[Any, jax.Array], dict[str, jax.Array]]
SYNCHFORMER_FILE = 'synchformer_state_dict.pth'


@dataclasses.dataclass(frozen=True)
class Embedder:
    """One network.

    Attributes:
      name: as in the table above. kind: of what it embeds.
      file: the checkpoint's published name. keys: where in it the dictionary of tensors is.
      prepare: (file of the clip, seconds) → the array that the network reads; clap_text has a caption in the file's place.
      build: tensors → parameters and apply(parameters, batch of those arrays) → embeddings by name, each `[B, ...]`.
      clips: at most so many at a time (pictures are large); 0: as many as the caller likes.
    """
    name: str
    kind: Literal['sound', 'picture', 'text']
    file: str
    prepare: Callable[[Any, float], np.ndarray]
    build: Callable[[Tensors], tuple[Any, Apply]]
    keys: tuple[str, ...] = ()
    clips: int = 0

    def load(self, folder: pathlib.Path) -> tuple[Any, Callable]:
        """Parameters on the devices' side of the host, and the jitted `apply` in full float32.

        Raises:
          FileNotFoundError: the checkpoint is not in `folder`.
          ValueError: it is damaged, dangerous, or of another network.
        """
        return _load(self.path(folder), self.keys, self.build)

    def path(self, folder: pathlib.Path) -> pathlib.Path:
        """The checkpoint in `folder`. Raises FileNotFoundError when it is not there, or the tokenizer of a text's network."""
        for file in tokenizer_roberta.FILES if self.kind == 'text' else ():
            _checkpoint(folder / file, self.name)
        return _checkpoint(folder / self.file, self.name)


def _checkpoint(path: pathlib.Path, name: str) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(f'{path}: the published weights of {name} are missing; nothing is downloaded, put the file '
                                'there (config.score.weights is the folder) or leave its metrics out (config.score.metrics)')
    return path


def _load(path: pathlib.Path, keys: tuple[str, ...], build: Callable[[Tensors], tuple[Any, Callable]]) -> tuple[Any, Callable]:
    try:
        params, apply = build(tensor_file.read(path).tensors(*keys))
    except tensor_file.TensorFileError:
        raise
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return params, precise(apply)


def precise(apply: Callable) -> Callable:
    """`apply` jitted with products in full float32: classes and cosines are touchier than training."""
    def run(*arguments):
        with jax.default_matmul_precision('highest'):
            return apply(*arguments)
    return jax.jit(run)


def _run(model: nn.Module, params: Any, *inputs: jax.Array) -> Any:
    return model.apply({'params': params}, *inputs)


def _vggish(tensors: Tensors) -> tuple[Any, Apply]:
    def apply(params, waveforms):
        patches = filterbanks.vggish_patches(waveforms)
        flat = _run(vggish.VGGish(), params, patches.reshape(-1, *patches.shape[2:]))
        return {'patches': flat.reshape(*patches.shape[:2], -1)}
    return vggish_weights.to_params(tensors), apply


def _panns(tensors: Tensors) -> tuple[Any, Apply]:
    def apply(params, waveforms):
        features, logits = cnn14.embed(params, filterbanks.panns_power(waveforms))
        return {'features': features, 'logits': logits}
    return cnn14_weights.to_params(tensors), apply


def _passt(tensors: Tensors) -> tuple[Any, Apply]:
    def apply(params, waveforms):
        features, logits = _run(passt.Passt(), params, filterbanks.passt_mel(waveforms))
        return {'features': features, 'logits': logits}
    return passt_weights.to_params(tensors), apply


def _synchformer_sound(tensors: Tensors) -> tuple[Any, Apply]:
    def apply(params, segments):
        mel = filterbanks.synchformer_mel(segments.reshape(-1, segments.shape[-1]))
        features = _run(synchformer_offset.SoundBranch(), params, mel)
        return {'segments': features.reshape(*segments.shape[:2], *features.shape[1:])}
    return offset_weights.sound_params(tensors), apply


def _synchformer_picture(tensors: Tensors) -> tuple[Any, Apply]:
    model = synchformer.build('visual', jnp.float32)

    def apply(params, frames):
        length = sequence.SYNC_SEGMENT_FRAMES
        starts = np.arange(0, frames.shape[1] - length + 1, sequence.SYNC_SEGMENT_STRIDE)
        segments = synchformer.normalize(frames[:, starts[:, None] + np.arange(length)])
        # One segment after another: its activations are as large as all frames.
        features = jax.lax.map(lambda part: _run(model, params, part), segments.swapaxes(0, 1))
        return {'segments': features.swapaxes(0, 1)}
    return synchformer_weights.to_params(tensors, model), apply


def _imagebind_sound(tensors: Tensors) -> tuple[Any, Apply]:
    model = imagebind.Audio()

    def apply(params, clips):
        vectors = _run(model, params, filterbanks.imagebind_mel(clips.reshape(-1, clips.shape[-1])))
        return {'vector': vectors.reshape(*clips.shape[:2], -1).mean(axis=1)}
    return imagebind_weights.audio_params(tensors, model), apply


def _imagebind_picture(tensors: Tensors) -> tuple[Any, Apply]:
    model = imagebind.Vision()

    def apply(params, views):
        vectors = _run(model, params, clip.normalize(views.reshape(-1, *views.shape[2:])))
        return {'vector': vectors.reshape(*views.shape[:2], -1).mean(axis=1)}
    return imagebind_weights.vision_params(tensors, model), apply


def _clap_sound(tensors: Tensors) -> tuple[Any, Apply]:
    def apply(params, waveforms):
        return {'vector': _run(clap.ClapAudio(), params, filterbanks.clap_power(waveforms))}
    return clap_weights.audio_params(tensors), apply


def _clap_text(tensors: Tensors) -> tuple[Any, Apply]:
    model = clap.ClapText()
    return clap_weights.text_params(tensors, model), lambda params, ids: {'vector': _run(model, params, ids)}


def embedders(folder: pathlib.Path) -> dict[str, Embedder]:
    """All of them; `folder` holds the text network's vocabulary, which is read when a caption is."""
    @functools.cache
    def tokenizer() -> tokenizer_roberta.RobertaTokenizer:
        return tokenizer_roberta.RobertaTokenizer(folder)

    def tokens(caption: str, duration_s: float) -> np.ndarray:
        del duration_s
        return tokenizer()([caption])[0]

    imagebind_file, clap_file = 'imagebind_huge.pth', 'music_speech_audioset_epoch_15_esc_89.98.pt'
    found = (
        Embedder('vggish', 'sound', 'vggish-10086976.pth', evaluation_media.vggish, _vggish),
        Embedder('panns', 'sound', 'Cnn14_16k_mAP=0.438.pth', evaluation_media.panns, _panns, ('model',)),
        Embedder('passt', 'sound', 'passt-s-f128-p16-s10-ap.476-swa.pt', evaluation_media.passt, _passt),
        Embedder('synchformer_sound', 'sound', SYNCHFORMER_FILE, evaluation_media.synchformer_sound, _synchformer_sound),
        Embedder('synchformer_picture', 'picture', SYNCHFORMER_FILE, evaluation_media.synchformer_picture,
                 _synchformer_picture, clips=1),
        Embedder('imagebind_sound', 'sound', imagebind_file, evaluation_media.imagebind_sound, _imagebind_sound),
        Embedder('imagebind_picture', 'picture', imagebind_file, evaluation_media.imagebind_picture,
                 _imagebind_picture, clips=1),
        Embedder('clap_sound', 'sound', clap_file, evaluation_media.clap, _clap_sound, ('state_dict',)),
        Embedder('clap_text', 'text', clap_file, tokens, _clap_text, ('state_dict',)),
    )
    return {embedder.name: embedder for embedder in found}


def offset_head(folder: pathlib.Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Synchformer's comparison: picture `[B, S, 8, 768]` and sound `[B, S, 6, 768]` → offsets in seconds, float64 `[B, 2]`.

    One offset from the first 14 segments and one from the last 14, as published; a ValueError when there are fewer.

    Raises:
      FileNotFoundError, ValueError: as Embedder.load.
    """
    path = _checkpoint(folder / SYNCHFORMER_FILE, 'synchformer')
    params, apply = _load(path, (), lambda tensors: (offset_weights.head_params(tensors), _offsets))

    def offsets(picture: np.ndarray, sound: np.ndarray) -> np.ndarray:
        return synchformer_offset.OFFSETS_S[np.asarray(apply(params, picture, sound))]
    return offsets


def _offsets(params: Any, picture: jax.Array, sound: jax.Array) -> jax.Array:
    head, count = synchformer_offset.OffsetHead(), synchformer_offset.SEGMENTS
    if sound.shape[1] < count:
        raise ValueError(f'DeSync compares {count} segments (4.8 s), the clips have {sound.shape[1]}; config.score.duration_s '
                         'must be 4.8 or more')
    crops = [_run(head, params, picture[:, cut], sound[:, cut]) for cut in (slice(count), slice(-count, None))]
    return jnp.argmax(jnp.stack(crops, axis=1), axis=-1)
