"""Small files as PyTorch writes them. `python -m tests.golden.torch_files` (with PyTorch 2.13) made those beside this file."""
import collections
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
WEIGHT_NORM = ('parametrizations.weight.original0', 'parametrizations.weight.original1')


def values() -> dict[str, np.ndarray]:
    """What stands below 'generator' in torch_zip.pth and torch_legacy.pth, apart from bfloat16, which NumPy has not."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    return {
        'whole': base,
        'transposed': base.T,
        'part': base[1:3, ::2],
        'half': np.full(3, 0.5, np.float16),
        'bfloat16': np.array([1.5, -2.0], np.float32),
        'number': np.array(7),
        'bools': np.array([True, False]),
        'empty': np.zeros((0, 3), np.float32),
        'parameter': np.ones((2, 2), np.float32),
    }


def main():
    import torch
    from torch import nn
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict({name: torch.from_numpy(np.array(array)) for name, array in values().items()})
    state |= {'whole': base, 'transposed': base.t(), 'part': base[1:3, ::2]}  # one storage
    state |= {'bfloat16': state['bfloat16'].to(torch.bfloat16), 'parameter': nn.Parameter(state['parameter'])}
    state._metadata = {'': {'version': 1}}  # type: ignore[attr-defined]  # as module.state_dict() has it
    norm = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    content = {'generator': state, 'norm': norm.state_dict(), 'steps': 3, 'size': base.shape, 'score': np.float64(0.25),
               'array': np.arange(6.0).reshape(2, 3), 'notes': ['text', None, (True, 1.5)]}
    torch.save(content, FOLDER / 'torch_zip.pth')
    torch.save(content, FOLDER / 'torch_legacy.pth', _use_new_zipfile_serialization=False)


if __name__ == '__main__':
    main()
