"""The official weight files: what each is, where it comes from, and how it is known to be whole. Source: MMAudio's release."""
import dataclasses

from mmaudio_jax.models import mmaudio

_RELEASE = 'https://github.com/hkchengrex/MMAudio/releases/download/v0.1/'
_NETWORKS_REPO = 'hkchengrex/MMAudio'
CLIP = 'clip_vit_h_14_378'
SYNCHFORMER = 'synchformer_visual'
VAES = {'16k': 'vae_16k', '44k': 'vae_44k'}  # by rate
VOCODERS = {'16k': 'bigvgan_16k', '44k': 'bigvgan_v2_44k'}


@dataclasses.dataclass(frozen=True)
class OfficialFile:
    """One official file and the model that it holds.

    Attributes:
      name: of the model, as `store.load` takes it.
      kind: 'network', 'vae', 'vocoder', 'clip' or 'synchformer'.
      variant: which of the models of that kind, a key of its VARIANTS.
      file: the official file name.
      md5: of the file; '' when none was published.
      repo: hub repository, '' for a file of the release.
      folder: of the file in the repository, with its slash.
      keys: where in the file the dictionary of tensors is.
      others: names under which the hub offers the same tensors.
    """
    name: str
    kind: str
    variant: str
    file: str
    md5: str = ''
    repo: str = ''
    folder: str = ''
    keys: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where a person downloads it."""
        if self.repo:
            return f'https://huggingface.co/{self.repo}/resolve/main/{self.folder}{self.file}'
        return f'{_RELEASE}{self.file}'


def _network(variant: str, md5: str) -> OfficialFile:
    return OfficialFile(f'mmaudio_{variant}', 'network', variant, f'mmaudio_{variant}.pth', md5, _NETWORKS_REPO, 'weights/')


_FILES = (
    _network('small_16k', 'af93cde404179f58e3919ac085b8033b'),
    _network('small_44k', 'babd74c884783d13701ea2820a5f5b6d'),
    _network('medium_44k', '5a56b6665e45a1e65ada534defa903d0'),
    _network('large_44k', 'fed96c325a6785b85ce75ae1aafd2673'),
    _network('large_44k_v2', '01ad4464f049b2d7efdaa4c1a59b8dfe'),
    OfficialFile(VAES['16k'], 'vae', '16k', 'v1-16.pth', '69f56803f59a549a1a507c93859fd4d7'),
    OfficialFile(VAES['44k'], 'vae', '44k', 'v1-44.pth', 'fab020275fa44c6589820ce025191600'),
    OfficialFile(VOCODERS['16k'], 'vocoder', '16k', 'best_netG.pt', 'eeaf372a38a9c31c362120aba2dde292', keys=('generator',)),
    OfficialFile(VOCODERS['44k'], 'vocoder', '44k', 'bigvgan_generator.pt', repo='nvidia/bigvgan_v2_44khz_128band_512x',
                 keys=('generator',)),
    OfficialFile(SYNCHFORMER, 'synchformer', 'visual', 'synchformer_state_dict.pth', '5b2f5594b0730f70e41e549b7c94390c'),
    OfficialFile(CLIP, 'clip', 'vit_h_14_378', 'open_clip_pytorch_model.bin', repo='apple/DFN5B-CLIP-ViT-H-14-384',
                 others=('open_clip_model.safetensors',)),
)
BY_NAME = {entry.name: entry for entry in _FILES}


def get(name: str) -> OfficialFile:
    """The entry of a model.

    Raises:
      ValueError: an unknown name.
    """
    if name not in BY_NAME:
        raise ValueError(f'{name!r} is no official model; those that are: {", ".join(BY_NAME)}')
    return BY_NAME[name]


def names_for(variant: str) -> tuple[str, ...]:
    """The models that sampling with network `variant` (e.g. 'large_44k_v2') needs: network, VAE, vocoder, CLIP, Synchformer.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in mmaudio.VARIANTS:
        raise ValueError(f'{variant!r} is no official network; those that are: {", ".join(mmaudio.VARIANTS)}')
    rate = rate_of(variant)
    return f'mmaudio_{variant}', VAES[rate], VOCODERS[rate], CLIP, SYNCHFORMER


def rate_of(variant: str) -> str:
    """'44k' of 'large_44k_v2'."""
    return variant.split('_')[1]
