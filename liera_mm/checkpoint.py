"""Adapter files: what was trained on top of a frozen model, in one safetensors file that says which model that was."""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Set, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapt import intended_parameters

FORMAT = 'liera_mm-adapter-1'


def adapter_state_dict(model: nn.Module) -> Dict[str, Tensor]:
    """The part of ``model.state_dict()`` that is not frozen: factors, other trained tensors, buffers."""
    frozen = _frozen_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def fingerprint(model: nn.Module) -> Dict[str, str]:
    """A short hash of every frozen tensor, by name. Linear and 1x1 forms of the same weight have the same hash."""
    state, frozen = model.state_dict(), _frozen_names(model)
    return {name: _digest(state[name]) for name in state if name in frozen}


def save_adapter(model: nn.Module, path: Union[str, os.PathLike]) -> None:
    """Write :func:`adapter_state_dict` with the configuration and the base's fingerprint in its header.

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    state = adapter_state_dict(model)
    metadata = dict(format=FORMAT, config=json.dumps(model.liera), fingerprint=json.dumps(fingerprint(model)))
    # Copies, since a layer can be in the model under two names, and safetensors refuses tensors that share memory
    tensors = {name: tensor.detach().to('cpu', copy=True).contiguous() for name, tensor in state.items()}
    partial = path.with_name(path.name + f'.{os.getpid()}.partial')
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_adapter(model: nn.Module, source: Union[str, os.PathLike, Mapping[str, Tensor]]) -> nn.Module:
    """Load an adapter into a model that was adapted in the same way, strictly; on an error nothing has changed.

    Args:
        model: The adapted model, with its base weights in place.
        source: A file of :func:`save_adapter`, whose configuration and fingerprint must be the model's, or the tensors
            alone (:func:`adapter_state_dict`).

    Returns:
        The same model.

    Raises:
        ValueError: If the source is damaged, has other tensors or shapes, holds values that are not finite, or was
            trained with another configuration or on other frozen weights.
    """
    expected = adapter_state_dict(model)
    tensors = dict(source) if isinstance(source, Mapping) else _read(model, source)
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(f'the adapter does not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}')
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f'the adapter does not fit the model: {name} is {tuple(tensor.shape)}, '
                             f'the model has {tuple(expected[name].shape)}')
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f'the adapter does not fit the model: {name} is {tensor.dtype}, '
                             f'the model has {expected[name].dtype}')
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'the adapter is damaged: {name} has values that are not finite')
    model.load_state_dict(tensors, strict=False)
    return model


def _read(model: nn.Module, path: Union[str, os.PathLike]) -> Dict[str, Tensor]:
    try:
        with safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not iterable
    except SafetensorError as error:
        raise ValueError(f'{path} is no adapter file, or a damaged one: {error}') from error
    if metadata.get('format') != FORMAT:
        raise ValueError(f'{path} is no adapter file of a known format: {metadata.get("format")!r}, not {FORMAT!r}')
    config, base = (_parse(path, metadata, key) for key in ('config', 'fingerprint'))
    ours, here = json.loads(json.dumps(model.liera)), fingerprint(model)
    different = [f'{key} {config.get(key)!r}, here {ours.get(key)!r}'
                 for key in sorted(config.keys() | ours.keys()) if config.get(key) != ours.get(key)]
    if different:
        raise ValueError(f'{path} was trained with another configuration: {"; ".join(different)}')
    different = {name for name in base.keys() | here.keys() if base.get(name) != here.get(name)}
    if different:
        raise ValueError(f'{path} was trained on other frozen weights: {_some(different)} of {len(base)} tensors differ')
    return tensors


def _parse(path: Union[str, os.PathLike], metadata: Dict[str, str], key: str) -> Dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{path} is a damaged adapter file: its {key} cannot be read')
    return value


def _frozen_names(model: nn.Module) -> Set[str]:
    trained = intended_parameters(model)
    frozen = {id(parameter) for name, parameter in model.named_parameters() if name not in trained}
    # A layer can be in the model under several names
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in frozen}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _some(names) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '') if names else 'nothing'
