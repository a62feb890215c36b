"""The official PyTorch modules as rows of the comparison; needs torch and a checkout of the official code on sys.path.

What the official code imports but does not use here is stubbed when torchvision is not installed: it and timm.
"""
from collections.abc import Callable
from collections.abc import Mapping
import importlib.util
import pathlib
import sys
import tempfile
import types
from typing import Any

import numpy as np
import torch

from mmaudio_jax.weights import tensor_file

STUBS = ('torchvision', 'torchvision.transforms', 'torchvision.transforms.functional', 'torchvision.ops',
         'torchvision.ops.misc')
# BigVGAN v2 at 44.1 kHz: what the model's own configuration file says.
VOCODER_44K = {
    'resblock': '1',
    'num_mels': 128,
    'upsample_rates': [8, 4, 2, 2, 2, 2],
    'upsample_kernel_sizes': [16, 8, 4, 4, 4, 4],
    'upsample_initial_channel': 1536,
    'resblock_kernel_sizes': [3, 7, 11],
    'resblock_dilation_sizes': [[1, 3, 5]] * 3,
    'activation': 'snakebeta',
    'snake_logscale': True,
    'use_tanh_at_final': False,
    'use_bias_at_final': False,
}

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], np.ndarray]


def stub_missing() -> None:
    """Without torchvision: empty modules in its place, and the two functions that Synchformer needs in that of timm.layers."""
    if importlib.util.find_spec('torchvision') is None:
        for name in STUBS:
            sys.modules[name] = _Stub(name)
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
        layers = types.ModuleType('timm.layers')
        layers.to_2tuple = torch.nn.modules.utils._pair
        layers.trunc_normal_ = torch.nn.init.trunc_normal_
        sys.modules |= {'timm': types.ModuleType('timm'), 'timm.layers': layers}


class _Stub(types.ModuleType):
    """A module in which every name is a class."""

    def __getattr__(self, name: str) -> Any:
        return _stub_class(name)


class _StubClass(type):
    """A class that has every name, too."""

    def __getattr__(cls, name: str) -> Any:
        return _stub_class(name)


def _stub_class(name: str) -> Any:
    if name.startswith('__'):
        raise AttributeError(name)
    return _StubClass(name, (), {})


def load(module: torch.nn.Module, path: pathlib.Path, *keys: str) -> torch.nn.Module:
    """Copies the tensors of a file into the module's own, one at a time: the weights are never held twice."""
    file = tensor_file.read(path)
    tensors = file.tensors(*keys)
    state = {_file_name(name): tensor for name, tensor in module.state_dict().items()}
    wrong = state.keys() ^ tensors.keys()
    if wrong:
        raise ValueError(f'the weights do not fit the official module: {sorted(wrong)[:5]}')
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(tensors[name].copy()))
        file.release()
    return module.eval()


def _file_name(name: str) -> str:
    """The name that weight norm's tensors have in the released files."""
    name = name.replace('parametrizations.weight.original0', 'weight_g')
    return name.replace('parametrizations.weight.original1', 'weight_v')


def _inference(function: Callable[[], torch.Tensor]) -> Run:
    def run():
        with torch.inference_mode():
            return function().numpy()
    return run


def _network(folder: pathlib.Path) -> Any:
    from mmaudio.model.networks import get_my_mmaudio
    return load(get_my_mmaudio('small_16k'), folder / 'mmaudio_small_16k.pth')


def flow(folder: pathlib.Path, inputs: Arrays) -> Run:
    """One velocity of small_16k; the conditions are prepared beforehand, as the official sampler does."""
    network = _network(folder)
    x = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.inference_mode():
        conditions = network.preprocess_conditions(x['clip'], x['sync'], x['text'])
    return _inference(lambda: network.predict_flow(x['latents'], x['t'], conditions))


def train(folder: pathlib.Path, inputs: Arrays, compiled: bool = False) -> Run:
    """One training step in the order of the official runner; returns loss and gradient norm."""
    from mmaudio.model.flow_matching import FlowMatching
    from nitrous_ema import PostHocEMA
    network = _network(folder).train()
    matching = FlowMatching(min_sigma=0.0)
    ema = PostHocEMA(network, sigma_rels=(0.05, 0.1), update_every=1, checkpoint_every_num_steps=10**9,
                     checkpoint_folder=tempfile.mkdtemp(), step_size_correction=True)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-6, betas=(0.9, 0.95), eps=1e-8, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 1001)
    steps = iter(range(len(inputs['t'])))

    def losses(x):
        data = network.normalize(x['latent_mean'] + x['latent_std'] * x['posterior_noise'])
        x_t = matching.get_conditional_flow(x['noise'], data, x['t'])
        clip, sync, text = x['clip'].clone(), x['sync'].clone(), x['text'].clone()
        clip[x['drop_video']] = network.empty_clip_feat
        sync[x['drop_video']] = network.empty_sync_feat
        text[x['drop_text']] = network.empty_string_feat
        return matching.loss(network(x_t, clip, sync, text, x['t']), x['noise'], data)

    losses = torch.compile(losses) if compiled else losses

    def run():
        step = next(steps)
        loss = losses({name: torch.from_numpy(array[step]) for name, array in inputs.items()}).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update()
        schedule.step()
        return np.array([loss.item(), norm.item()])

    return run


def train_compiled(folder: pathlib.Path, inputs: Arrays) -> Run:
    """`train` with its loss under torch.compile, as the official runner does by default."""
    return train(folder, inputs, compiled=True)


def vae(rate: str) -> Callable[[pathlib.Path, Arrays], Run]:
    """Latents → mel."""

    def build(folder, inputs):
        from mmaudio.ext.autoencoder.vae import get_my_vae
        model = load(get_my_vae(rate), folder / f'v1-{rate[:2]}.pth')
        model.remove_weight_norm()
        del model.encoder
        latents = torch.from_numpy(inputs['latents']).transpose(1, 2)
        return _inference(lambda: model.decode(latents).transpose(1, 2))

    return build


def vocoder(rate: str) -> Callable[[pathlib.Path, Arrays], Run]:
    """Mel → waveform."""

    def build(folder, inputs):
        empty, file = (_vocoder_16k(), 'best_netG.pt') if rate == '16k' else (_vocoder_44k(), 'bigvgan_generator.pt')
        model = load(empty, folder / file, 'generator')
        model.remove_weight_norm()
        mel = torch.from_numpy(inputs['mel']).transpose(1, 2)
        return _inference(lambda: model(mel)[:, 0])

    return build


def _vocoder_16k() -> Any:
    import mmaudio.ext.bigvgan.bigvgan as official
    settings = official.OmegaConf.load(official._bigvgan_vocoder_path)
    return official.BigVGANVocoder(settings)


def _vocoder_44k() -> Any:
    from mmaudio.ext.bigvgan_v2.bigvgan import BigVGAN
    from mmaudio.ext.bigvgan_v2.env import AttrDict
    return BigVGAN(AttrDict(VOCODER_44K))


def synchformer(folder: pathlib.Path, inputs: Arrays) -> Run:
    """Frames of one segment → its eight tokens."""
    from mmaudio.ext.synchformer import Synchformer
    model = load(Synchformer(), folder / 'synchformer_state_dict.pth')
    frames = torch.from_numpy(inputs['frames']).permute(0, 1, 4, 2, 3)[None]
    return _inference(lambda: model(frames)[0])


def clip(folder: pathlib.Path, inputs: Arrays) -> Run:
    """One frame → its feature; text tower and image tower are held, as in the official feature extractor."""
    from open_clip import get_model_config
    from open_clip.model import CLIP
    model = load(CLIP(**get_model_config('ViT-H-14-378-quickgelu')), folder / 'open_clip_pytorch_model.bin')
    frame = torch.from_numpy(inputs['frame']).permute(0, 3, 1, 2)
    return _inference(lambda: model.encode_image(frame, normalize=True))


BUILDERS = {
    'flow': flow,
    'train': train,
    'train_compiled': train_compiled,
    'vae_16k': vae('16k'),
    'vae_44k': vae('44k'),
    'vocoder_16k': vocoder('16k'),
    'vocoder_44k': vocoder('44k'),
    'synchformer': synchformer,
    'clip': clip,
}
