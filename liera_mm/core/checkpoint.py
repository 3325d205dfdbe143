"""Adapter files: what was trained on top of a frozen model, in one safetensors file that says which model that was."""
import functools
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..version import __version__
from .adapt import BEFORE
from .adapters import Adapter, adapter_state_dict, frozen_names, loaded_adapters, start_adapter
from .card import FRONT, Card, markdown
from .group import MULTIPLICATIVE
from .text import some
from .wrappers import plain_names, through_wrappers

logger = logging.getLogger('liera_mm')
FORMAT = 'liera_mm-adapter-2'
FORMAT_1 = 'liera_mm-adapter-1'  # without checksum and version
NO_CHECKSUM = b'0' * 64
OR_TENSORS = 'besides files, load_adapter takes the tensors of adapter_state_dict'
NARROWER = (torch.float32, torch.float16, torch.bfloat16)  # precisions that a base may be converted to


@functools.partial(through_wrappers, does='reads')
def fingerprint(model: nn.Module) -> Dict[str, str]:
    """A short hash of every frozen tensor, by name. Linear and 1x1 forms of the same weight have the same hash."""
    state, frozen = model.state_dict(), frozen_names(model)
    return {name: digest(state[name]) for name in state if name in frozen}


@functools.partial(through_wrappers, does='reads')
def save_adapter(model: nn.Module, path: Union[str, os.PathLike], dtype: Optional[torch.dtype] = None,
                 card: Optional[Mapping[str, Any]] = None) -> None:
    """Write :func:`adapter_state_dict` with the configuration and the base's fingerprint in its header.

    The file appears under its name only when it is complete, and holds a checksum of every byte in it. Its card is in the
    header too, and beside it, as a page for people and model hubs: ``task.md`` for ``task.safetensors``. A page that is
    there already stays, unless it is a card. What trains, but is no part of the adapter, is named in a warning.

    Args:
        model: The adapted model, with its base weights in place.
        path: The safetensors file to write.
        dtype: Of floating-point tensors in the file, such as ``torch.float16`` for one of half the size; by default
            that of the model.
        card: What a receiver has to know: entries of :class:`liera_mm.core.card.Card`, beside those that a model's
            ``base_card()`` gives.

    Raises:
        ValueError: If a tensor has values that are not finite, or not in ``dtype``, a metric of the card has none, or
            ``dtype`` is no precision that a model trains in.
        TypeError: If the card has another entry.
    """
    precisions = torch.float16, torch.bfloat16, torch.float32, torch.float64
    if dtype not in (None, *precisions):
        raise ValueError(f'dtype must be {", ".join(map(str, precisions))} or None, not {dtype!r}')
    given = {**(model.base_card() if hasattr(model, 'base_card') else {}), **(card or {})}
    given['versions'] = {'liera_mm': __version__, 'torch': torch.__version__, **given.get('versions', {})}
    known = Card(**given)
    tensors = {}
    for name, tensor in adapter_state_dict(model).items():
        floating = tensor.is_floating_point()
        # Copies, since a layer can be in the model under two names, and safetensors refuses tensors that share memory
        narrower = dtype if floating and tensor.dim() else None  # the unit of a Δ is one number, and not rounded
        tensors[name] = tensor.detach().to('cpu', narrower, copy=True).contiguous()
        if floating and not torch.isfinite(tensors[name]).all():
            raise ValueError(f'the adapter was not saved: {name} has values that are not finite in {tensors[name].dtype}')
    metadata = dict(
        format=FORMAT,
        version=__version__,
        config=json.dumps(model.liera),
        fingerprint=json.dumps(fingerprint(model)),
        rounded=json.dumps(_rounded(model)),
        card=known.to_json())
    path = Path(path)
    page = path.with_name(path.name.removesuffix('.safetensors') + '.md')  # lr0.1 and lr0.2 have one each
    write_atomically(path, seal(tensors, metadata))
    if not page.exists() or page.read_bytes().startswith(FRONT.encode()):
        write_atomically(page, markdown(known, path.name, model.liera, _numbers(tensors)).encode())
    frozen = frozen_names(model)
    left_out = [name for name, parameter in model.named_parameters() if parameter.requires_grad and name in frozen]
    if left_out:
        logger.warning(f'LieRA  {some(left_out)} train, but are no part of the adapter and not in {path}: what trains '
                       'beside Δ is for adapt(train=[...])')


def adapter_card(path: Union[str, os.PathLike]) -> str:
    """The card of an adapter file as Markdown, from its header; one without a card says what else is known.

    Raises:
        ValueError: If it is no adapter file, or a damaged one.
    """
    metadata, tensors = _open(path)
    card = _parse(path, metadata, 'card') if 'card' in metadata else {}
    try:
        known = Card(**card)
    except (TypeError, ValueError) as error:
        raise ValueError(f'{path} has a card that cannot be read: {error}') from None
    return markdown(known, Path(path).name, _parse(path, metadata, 'config'), _numbers(tensors))


@through_wrappers
def load_adapter(model: nn.Module,
                 source: Union[str, os.PathLike, Mapping[str, Tensor]],
                 name: str = 'default') -> nn.Module:
    """Load an adapter into a model that was adapted in the same way, strictly; on an error nothing has changed.

    Args:
        model: The adapted model, with its base weights in place.
        source: A file of :func:`save_adapter`, whose fingerprint must be the model's, and whose configuration that of an
            adapter that is loaded; or the tensors alone (:func:`adapter_state_dict`) of one like that which is active.
        name: What the adapter is called. It becomes the active one; others stay loaded, and
            :func:`liera_mm.set_adapter` returns to them.

    Returns:
        The same model.

    Raises:
        ValueError: If the source is damaged, has other tensors or shapes, holds values that are not finite, or was
            trained with another configuration or on other frozen weights.
    """
    loaded = loaded_adapters(model)
    if isinstance(source, Mapping):
        tensors, like = plain_names(source, loaded[0].tensors), loaded[0]
    else:
        tensors, like = _read(model, source, loaded)
        tensors = plain_names(tensors, like.tensors)
    expected = like.tensors
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(f'the adapter does not fit the model: missing {some(missing)}; unexpected {some(unexpected)}')
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(f'the adapter does not fit the model: {key} is {tuple(tensor.shape)}, '
                             f'the model has {tuple(expected[key].shape)}')
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise ValueError(f'the adapter does not fit the model: {key} is {tensor.dtype}, '
                             f'the model has {expected[key].dtype}')
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f'the adapter is damaged: {key} has values that are not finite')
    start_adapter(model, name, like)
    model.load_state_dict(tensors, strict=False)
    return model


def seal(tensors: Dict[str, Tensor], metadata: Dict[str, str]) -> bytes:
    """A safetensors file whose metadata has a checksum of all of it, computed with zeros in the checksum's place."""
    data = save(tensors, dict(metadata, checksum=NO_CHECKSUM.decode()))
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    header['__metadata__'] = dict(sorted(header['__metadata__'].items()))  # safetensors has them in random order
    text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
    data = data[:8] + text.ljust(end - 8) + data[end:]
    return data.replace(NO_CHECKSUM, _checksum(data), 1)


def write_atomically(path: Union[str, os.PathLike], data: bytes) -> None:
    """Write a file such that it has its old contents or all of the new ones, whenever the process is killed."""
    path = Path(path)
    partial = path.with_name(path.name + f'.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def digest(tensor: Tensor) -> str:
    """A short hash of a tensor's values in its dtype; not of its shape."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _open(path: Union[str, os.PathLike]) -> Tuple[Dict[str, str], Dict[str, Tensor]]:
    """Metadata and tensors of an adapter file that is intact."""
    data = Path(path).read_bytes()
    if data.startswith(b'PK'):
        raise ValueError(f'{path} is no adapter file, but a checkpoint of torch; {OR_TENSORS}')
    try:
        metadata = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')]).get('__metadata__') or {}
        _check_format(path, data, metadata)
        return metadata, load(data)
    except (SafetensorError, json.JSONDecodeError, UnicodeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is no adapter file, or a damaged one: {error}') from error


def _read(model: nn.Module, path: Union[str, os.PathLike],
          loaded: Sequence[Adapter]) -> Tuple[Dict[str, Tensor], Adapter]:
    """The tensors of a file, and which of the adapters that are loaded has its configuration."""
    metadata, tensors = _open(path)
    config, base = (_parse(path, metadata, key) for key in ('config', 'fingerprint'))
    different = [differences({**BEFORE, **config}, json.loads(json.dumps(adapter.settings))) for adapter in loaded]
    if all(different):
        raise ValueError(f'{path} was trained with another configuration: {different[0]}')
    like, here = loaded[different.index('')], fingerprint(model)
    different = {name for name in base.keys() | here.keys() if base.get(name) != here.get(name)}
    rounded = _parse(path, metadata, 'rounded') if 'rounded' in metadata else {}
    state = model.state_dict()
    different = {name for name in different if name not in state or name not in base
                 or not _differs_in_precision(state[name], base[name], rounded.get(name, {}))}
    if different:
        converted = sorted({str(state[name].dtype)[6:] for name in different if name in state} - {'float32'})
        hint = (f'. Here they are of {", ".join(converted)}: if it was trained on them before they were converted, load it '
                'before converting the model') if converted else ''
        raise ValueError(
            f'{path} was trained on other frozen weights: {some(different)} of {len(base)} tensors differ{hint}')
    return tensors, like


def _numbers(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _rounded(model: nn.Module) -> Dict[str, Dict[str, str]]:
    """The hashes that frozen tensors have once they are converted to a narrower precision, by name and dtype."""
    state = model.state_dict()
    return {name: {str(dtype)[6:]: digest(state[name].to(dtype)) for dtype in _narrower(state[name])}
            for name in frozen_names(model) if name in state}


def _differs_in_precision(tensor: Tensor, theirs: str, rounded: Dict[str, str]) -> bool:
    """Whether a tensor is another one after conversion: that one's hash is known, or this one can be converted."""
    return (digest(tensor) == rounded.get(str(tensor.dtype)[6:])
            or any(digest(tensor.to(dtype)) == theirs for dtype in _narrower(tensor)))


def _narrower(tensor: Tensor) -> List[torch.dtype]:
    return [dtype for dtype in NARROWER
            if tensor.is_floating_point() and torch.finfo(dtype).bits < torch.finfo(tensor.dtype).bits]


def differences(theirs: Dict[str, Any], ours: Dict[str, Any]) -> str:
    """What is not the same in two configurations: ``rank 2, here 3; ...``; nothing if they are equal."""
    both = [each for settings in (theirs, ours) for each in (settings, *settings.get('overrides', []))]
    if not any(each.get('update') in MULTIPLICATIVE for each in both):
        theirs, ours = _without_scales(theirs), _without_scales(ours)
    return '; '.join(f'{key} {theirs.get(key)!r}, here {ours.get(key)!r}' for key in sorted(theirs.keys() | ours.keys())
                     if theirs.get(key) != ours.get(key))


def _without_scales(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Settings without their scales, which are the same where every layer is ``additive``."""
    overrides = [{key: value for key, value in override.items() if key != 'scale'}
                 for override in settings.get('overrides', [])]
    return {key: overrides if key == 'overrides' else value for key, value in settings.items() if key != 'scale'}


def _check_format(path: Union[str, os.PathLike], data: bytes, metadata: Dict[str, str]) -> None:
    if metadata.get('format') == FORMAT_1 and metadata.keys() == {'format', 'config', 'fingerprint'}:
        return
    if 'format' not in metadata:
        raise ValueError(f'{path} is no adapter file of a known format: save_adapter did not write it; {OR_TENSORS}')
    if metadata['format'] != FORMAT:
        raise ValueError(f'{path} is no adapter file of a known format: {metadata["format"]!r}, not {FORMAT!r}')
    checksum = str(metadata.get('checksum')).encode()
    if _checksum(data.replace(checksum, NO_CHECKSUM, 1)) != checksum:
        raise ValueError(f'{path} is no adapter file, or a damaged one: its checksum is not that of its contents')


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).hexdigest().encode()


def _parse(path: Union[str, os.PathLike], metadata: Dict[str, str], key: str) -> Dict[str, Any]:
    try:
        value = json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f'{path} is a damaged adapter file: its {key} cannot be read')
    return value
