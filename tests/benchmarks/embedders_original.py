"""The PyTorch originals as rows of the comparison, with random weights. The originals must be on sys.path."""
from collections.abc import Callable
import importlib.util
import sys
import types
from typing import Any

import numpy as np
import torch

from tests.benchmarks import official_side

_UNUSED = {
    'vggish': ('resampy', 'soundfile'),
    'synchformer': ('omegaconf',),
    'imagebind': ('iopath', 'iopath.common', 'iopath.common.file_io'),
    'clap': ('torchvision', 'torchvision.ops', 'torchvision.ops.misc', 'h5py'),
}
Run = Callable[[], Any]


def prepare(row: str, threads: int) -> None:
    """Threads, no gradients, and stubs for what the row's original imports, is missing and not used."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    for name in _UNUSED.get(row, ()):
        whole = name.partition('.')[0]
        if isinstance(sys.modules.get(whole), official_side._Stub) or importlib.util.find_spec(whole) is None:
            sys.modules[name] = official_side._Stub(name)
    if 'torchvision.ops.misc' in sys.modules:
        sys.modules['torchvision.ops.misc'].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    if importlib.util.find_spec('timm') is None:
        layers = types.ModuleType('timm.layers')
        layers.to_2tuple, layers.trunc_normal_ = torch.nn.modules.utils._pair, torch.nn.init.trunc_normal_
        layers.DropPath = lambda *_, **__: torch.nn.Identity()
        sys.modules |= {'timm': types.ModuleType('timm'), 'timm.layers': layers}
        sys.modules |= {name: official_side._Stub(name) for name in ('timm.models', 'timm.models._hub')}


def _bare(package: str) -> None:
    """Makes the package importable without what its __init__ imports."""
    module = types.ModuleType(package)
    module.__path__ = list(importlib.util.find_spec(package).submodule_search_locations)
    sys.modules[package] = module


def vggish(inputs: np.ndarray) -> Run:
    from av_bench.vggish.vggish import VGG
    layers: list[torch.nn.Module] = []
    channels = 1
    for stage in ((64,), (128,), (256, 256), (512, 512)):
        for width in stage:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(True)]
            channels = width
        layers.append(torch.nn.MaxPool2d(2, 2))
    model, x = VGG(torch.nn.Sequential(*layers)).eval(), torch.from_numpy(inputs).reshape(-1, 1, *inputs.shape[2:])
    return lambda: model(x)


def panns(inputs: np.ndarray) -> Run:
    """Its constructor downloads the weights and reads them, which it is kept from."""
    from av_bench.panns import models
    there = lambda path: True
    models.os = types.SimpleNamespace(path=types.SimpleNamespace(expanduser=str, exist=there, exists=there))
    models.torch = types.SimpleNamespace(**{**vars(torch), 'load': lambda *_, **__: {'model': None}})
    models.Cnn14_16k.load_state_dict = lambda self, state: None
    model, x = models.Cnn14_16k(16_000, 512, 160, 64, 50, 8_000, 527).eval(), torch.from_numpy(inputs)
    return lambda: model(x)


def passt(inputs: np.ndarray) -> Run:
    from hear21passt.models.passt import get_model
    model = get_model(arch='passt_s_swa_p16_128_ap476', pretrained=False).eval()
    x = torch.from_numpy(inputs).transpose(1, 2)[:, None].contiguous()
    return lambda: model(x)


def synchformer(inputs: np.ndarray) -> Run:
    """The sound branch. Newer transformers lack what it uses to prune and mask heads, which nobody does."""
    from transformers import pytorch_utils
    for name in ('find_pruneable_heads_and_indices', 'prune_linear_layer'):
        if not hasattr(pytorch_utils, name):
            setattr(pytorch_utils, name, None)
    from av_bench.synchformer.ast import AST
    from av_bench.synchformer.hf_src import modeling_ast
    modeling_ast.ASTModel.get_head_mask = lambda self, mask, layers: [None] * layers
    model = AST(extract_features=True, max_spec_t=66, factorize_freq_time=True, agg_freq_module='TransformerEncoderLayer',
                agg_time_module='torch.nn.Identity', add_global_repr=False).eval()
    x = torch.from_numpy(inputs)
    return lambda: model(x)


def imagebind(inputs: np.ndarray) -> Run:
    """The sound network; the others are as small as they may be."""
    _bare('imagebind')
    from imagebind.models.imagebind_model import ImageBindModel
    others = {f'{name}_{field}': value for name in ('vision', 'text', 'depth', 'thermal', 'imu')
              for field, value in (('embed_dim', 64), ('num_blocks', 1), ('num_heads', 2))}
    model = ImageBindModel(out_embed_dim=1024, **others).eval()
    x = torch.from_numpy(inputs).transpose(2, 3)[:, :, None].contiguous()
    return lambda: model({'audio': x})


def clap(inputs: np.ndarray) -> Run:
    _bare('clap_module')
    from clap_module.htsat import HTSAT_Swin_Transformer
    settings = types.SimpleNamespace(mel_bins=64, window_size=1024, hop_size=480, sample_rate=48_000, fmin=50, fmax=14_000,
                                     enable_tscam=True, clip_samples=480_000, class_num=527)
    model = HTSAT_Swin_Transformer(spec_size=256, patch_size=4, patch_stride=(4, 4), num_classes=527, embed_dim=128,
                                   depths=[2, 2, 12, 2], num_heads=[4, 8, 16, 32], window_size=8, config=settings).eval()
    x = {'waveform': torch.from_numpy(inputs), 'longer': torch.zeros(len(inputs), 1).bool()}
    return lambda: model(x)


BUILDERS = {'vggish': vggish, 'panns': panns, 'passt': passt, 'synchformer': synchformer, 'imagebind': imagebind, 'clap': clap}
