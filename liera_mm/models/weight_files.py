"""Files of pretrained weights: loaders for MMEngine, and the names of others for the same tensors."""
import difflib
import os
import re
from importlib import resources
from typing import Any, Dict, Mapping
from urllib.parse import urlparse

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import load_file
from torch import Tensor

from ..core.errors import SetupError


@CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$')
def load_from_safetensors(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Load a local safetensors file wherever MMEngine takes a checkpoint."""
    return without_compile(load_file(filename, device=str(map_location or 'cpu')))


def without_compile(checkpoint: Any) -> Any:
    """A checkpoint of a model that torch.compile had wrapped, with the names that it has otherwise; in place."""
    state = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    names = [*state] if isinstance(state, dict) else []
    for name in [name for name in names if re.match(r'(module\.)?_orig_mod\.', str(name))]:
        state[name.replace('_orig_mod.', '', 1)] = state.pop(name)
    return checkpoint


@CheckpointLoader.register_scheme(prefixes='liera://')
def load_from_package(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Load weights that ship with this package: ``liera://NAME``.

    Raises:
        FileNotFoundError: If there are no weights of that name; the message lists those that ship.
    """
    folder = resources.files('liera_mm') / 'weights'
    file = folder / f'{filename[len("liera://"):]}.safetensors'
    if not file.is_file():
        names = sorted(f.name[:-len('.safetensors')] for f in folder.iterdir() if f.name.endswith('.safetensors'))
        raise FileNotFoundError(f'{filename} does not ship with liera_mm; there are {", ".join(names)}')
    with resources.as_file(file) as path:
        return load_from_safetensors(str(path), map_location)


def published(models: Mapping[str, str], name: str) -> str:
    """The URL of weights that are published under a name: ``torchvision://resnet50``.

    Raises:
        SetupError: If there are none of that name; names the closest ones.
    """
    scheme, _, key = name.partition('://')
    if key in models:
        return models[key]
    close = difflib.get_close_matches(key, models, n=3)
    raise SetupError(f'There are no weights {name}',
                     f'The closest ones are {", ".join(f"{scheme}://{other}" for other in close)}' if close else
                     'Give a file, or a URL')


def check_prefix(checkpoint: str, prefix: str, option: str) -> None:
    """Check that names of weights begin with a prefix; of weights on this machine, for others are yet to be downloaded.

    Args:
        checkpoint: As in ``init_cfg``.
        prefix: As in ``init_cfg``; a dot at its end is added.
        option: What sets it, for the message.

    Raises:
        SetupError: If none does; names the prefixes that there are.
    """
    path = os.path.expanduser(checkpoint)
    if '://' in checkpoint and not checkpoint.startswith('liera://'):
        path = os.path.join(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(checkpoint).path))
    if not (checkpoint.startswith('liera://') or os.path.isfile(path)):
        return
    weights = CheckpointLoader.load_checkpoint(path, 'cpu')
    names = list(weights.get('state_dict', weights))
    start = prefix if prefix.endswith('.') else f'{prefix}.'
    if any(str(name).startswith(start) for name in names):
        return
    known = list(dict.fromkeys(str(name).partition('.')[0] for name in names if '.' in str(name)))
    wrapped = [f'module.{start}'] if any(str(name).startswith(f'module.{start}') for name in names) else []  # DDP
    close = wrapped or difflib.get_close_matches(prefix.rstrip('.'), known, n=1)
    raise SetupError(
        f'{start} is not in the pretrained model {checkpoint}, whose names begin with '
        + ', '.join(f'{name}.' for name in known[:10]) + (f' and {len(known) - 10} more' if len(known) > 10 else ''),
        f'Set {option}={(close or ["PREFIX"])[0]}, or take the prefix out if the names begin like those of the part')


# From the names of ConvNeXt's authors, and of timm, to mmpretrain's; in this order
CONVNEXT_NAMES = [(re.compile(pattern), name) for pattern, name in (
    (r'^encoder\.', ''),
    (r'^stem[._]', 'downsample_layers.0.'),
    (r'^stages[._](\d)\.downsample\.', r'downsample_layers.\1.'),
    (r'^stages[._](\d)\.blocks\.', r'stages.\1.'),
    (r'\.(dwconv|conv_dw)\.', '.depthwise_conv.'),
    (r'\.(pwconv|mlp\.fc)([12])\.', r'.pointwise_conv\2.'),
    (r'\.mlp\.grn\.weight$', '.grn.gamma'),
    (r'\.mlp\.grn\.bias$', '.grn.beta'),
    (r'\.(ln|linear)\.(weight|bias)$', r'.\2'),
    (r'\.kernel$', '.weight'),
    (r'^(head\.)?norm\.(weight|bias)$', r'norm3.\2'),
)]


def convnext_names(state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Give the tensors of ConvNeXt (v1 or v2) of its authors and of timm mmpretrain's names and shapes, in place.

    That goes for the self-supervised checkpoints of v2 too, which hold sparse convolutions: kernels as (positions, in, out),
    or (positions, channels) where depthwise, positions column by column.
    """
    if not any(re.search(r'\.(dwconv|conv_dw)\.', name) for name in state_dict if name.startswith(prefix)):
        return
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensor, renamed = state_dict.pop(name), name[len(prefix):]
        for pattern, replacement in CONVNEXT_NAMES:
            renamed = pattern.sub(replacement, renamed)
        if name.endswith('.kernel') and tensor.dim() == 3:
            size = round(len(tensor)**.5)
            tensor = tensor.permute(2, 1, 0).reshape(tensor.shape[2], tensor.shape[1], size, size).mT
        elif name.endswith('.kernel') and tensor.dim() == 2 and 'depthwise' in renamed:
            size = round(len(tensor)**.5)
            tensor = tensor.T.reshape(-1, 1, size, size).mT
        elif tensor.dim() > 1 and tensor.numel() == tensor.shape[-1]:  # GRN's parameters, and sparse biases
            tensor = tensor.flatten()
        state_dict[prefix + renamed] = tensor
