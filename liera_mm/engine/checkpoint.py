"""Training checkpoints: read without running code from them, written whole or not at all, without the frozen weights.

Importing this module makes MMEngine's ``CheckpointLoader`` read every checkpoint through :func:`read_checkpoint`.
"""
import codecs
import contextlib
import io
import os
import os.path as osp
import random
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Container, Dict, Iterable, List, Mapping, Optional, Union
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, get_rank
from mmengine.fileio import LocalBackend, get_file_backend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
    load_state_dict,
)
from torch import nn

from ..core.checkpoint import digest, load_adapter, write_atomically
from ..core.errors import SetupError
from ..core.wrappers import plain_names
from ..models.pretrained import RECORD, encode_record, pretrained_backbones
from ..models.weight_files import load_from_safetensors, published, without_compile

TRUST = 'LIERA_MM_TRUST_CHECKPOINTS'

# Reading


def read_checkpoint(file: Union[str, os.PathLike, IO[bytes]], map_location=None) -> Dict[str, Any]:
    """Load a checkpoint of torch or safetensors; nothing in it can run code, and all of it is intact.

    Every checkpoint is read here, those that MMEngine reads for ``load_from``, ``--resume`` and ``init_cfg`` as well. Of
    torch's, only those are read that hold tensors, plain values and what MMEngine writes; unless the environment variable
    LIERA_MM_TRUST_CHECKPOINTS is 1, which allows everything in every checkpoint.

    Args:
        file: A path, or a file that is open for reading.
        map_location: Where its tensors go, as in ``torch.load``.

    Raises:
        SetupError: If the file is damaged or no checkpoint, or would have to run code.
        FileNotFoundError: If there is no such file.
    """
    name = getattr(file, 'name', 'the checkpoint') if hasattr(file, 'read') else os.fspath(file)
    if name.endswith('.safetensors'):
        return load_from_safetensors(name, map_location)
    trusted, intact = os.environ.get(TRUST) == '1', False
    try:
        if zipfile.is_zipfile(file):  # the format of torch since 1.6, which torch itself reads without its checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
            intact = True
        if hasattr(file, 'seek'):
            file.seek(0)
        with contextlib.nullcontext() if trusted else _safe_globals():
            return without_compile(torch.load(file, map_location=map_location, weights_only=not trusted))
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged pickles fail in every way there is
        # Without torch's advice: torch wraps the reason in it, and some versions put more before and after
        inner = error.__context__ if isinstance(error.__context__, UnpicklingError) else error
        reason = ' '.join(str(inner).split()).rpartition('WeightsUnpickler error: ')[2].split('. ')[0]
        asked = re.search(r"(?:GLOBAL|function) (\S+)|<class '(\S+)'>", reason)
        unknown = asked or intact and 'PytorchStreamReader' not in reason  # the latter of another kind of archive
        if isinstance(error, UnpicklingError) and not trusted and unknown:
            raise SetupError(
                f'{name} was refused: loading it could run code ({asked[asked.lastindex] if asked else reason[:100]}).',
                f'If you trust the one who made it, set the environment variable {TRUST}=1') from None
        raise SetupError(
            f'{name} is no checkpoint, or a damaged one: {reason:.200}',
            'Give one that is intact; tools/train.py --resume without a file finds the latest that is') from None


def load_trained(model: nn.Module, path: Union[str, os.PathLike], config: str,
                 may_lack: Iterable[str] = ()) -> Dict[str, Any]:
    """Load a checkpoint of a training into the model of its config, strictly; frozen weights that it lacks are fetched.

    Args:
        model: The model.
        path: The checkpoint.
        config: What messages call the config.
        may_lack: Names of tensors that stay as they are where the checkpoint lacks them.

    Returns:
        The checkpoint.

    Raises:
        SetupError: If it is damaged, or was trained with another config or on other frozen weights.
    """
    checkpoint = read_checkpoint(path, 'cpu')
    check_backbones(model, checkpoint)
    state, ours = named_as_in(model, checkpoint.get('state_dict', checkpoint)), model.state_dict()
    state = {**{name: ours[name] for name in may_lack}, **state}
    try:
        load_state_dict(model, _without_doubles(state, ours.keys()), strict=True)
    except SetupError as error:
        problem, remedy = str(error).splitlines()
        raise SetupError(f'{path} was not trained with {config}: {problem:.300}', remedy) from None
    except RuntimeError as error:
        raise SetupError(f'{path} was not trained with {config}: {str(error).splitlines()[-1]:.300}',
                         'Use the config in the work dir of that checkpoint') from None
    return checkpoint


def named_as_in(model: nn.Module, state: Mapping[str, torch.Tensor], start: str = '') -> Dict[str, torch.Tensor]:
    """The state dict of a checkpoint with the names that a model knows (:func:`plain_names`), records included.

    Args:
        model: The model.
        state: Its state dict, or one of its average.
        start: What names begin with besides, as those of an average do.
    """
    known = [*model.state_dict(), *(f'{name}.{RECORD}' for name, _ in pretrained_backbones(model))]
    return plain_names(state, [f'{start}{name}' for name in known])


def check_backbones(model: nn.Module, checkpoint: Dict[str, Any]) -> None:
    """Raise a SetupError if a checkpoint is of an adapted backbone, and the model has none there.

    MMEngine would drop the adapters, and leave the frozen weights that the checkpoint lacks random.
    """
    ours = [f'.{name}.{RECORD}' for name, _ in pretrained_backbones(model)]
    records = [name for name in named_as_in(model, checkpoint.get('state_dict', checkpoint)) if name.endswith(f'.{RECORD}')]
    other = [name[:-len(RECORD) - 1] for name in records if not any(our.endswith(f'.{name}') for our in ours)]
    if other:
        raise SetupError(f'the checkpoint was trained with adapters in {other[0]}, and the model of this config has no '
                         'LieRABackbone or LieRAConvNeXt there',
                         'Use the config in the work dir of that checkpoint; or tools/merge.py with that one, which makes a '
                         'checkpoint for the detector as it was')


def adapted_backbones(model: nn.Module) -> Dict[str, nn.Module]:
    """The backbones of a model that have adapters, by name."""
    return {name: backbone for name, backbone in pretrained_backbones(model) if hasattr(backbone, 'liera')}


def load_adapter_file(model: nn.Module, path: Union[str, os.PathLike], config: str, name: str = 'default') -> None:
    """Load a file of :func:`liera_mm.save_adapter` into the adapted backbone of a detector, as the adapter of that name.

    Raises:
        SetupError: If there is no such file, or it is damaged, or of other settings or frozen weights.
    """
    if not osp.isfile(path):
        beside = sorted(map(str, Path(path).parent.glob('*.safetensors')))
        raise SetupError(f'Adapter not found: {path}',
                         f'There are {", ".join(beside)}' if beside else 'Give a file that liera_mm.save_adapter wrote')
    try:
        for backbone in adapted_backbones(model).values():
            load_adapter(backbone, path, name)
    except ValueError as error:
        raise SetupError(str(error), f'Give an adapter that was trained with {config}, or its own config') from None


def _without_doubles(state: Dict[str, torch.Tensor], known: Container[str]) -> Dict[str, torch.Tensor]:
    """A state dict without what it also has under a name that is known.

    Some detectors give one of their parts to another when they first compute, as DDQ does, from when on their state dict has
    it twice.
    """
    others = {name for name in state if name not in known and '.adapter.' not in name}
    ours = {digest(tensor) for name, tensor in state.items() if name in known} if others else set()
    return {name: tensor for name, tensor in state.items() if name not in others or digest(tensor) not in ours}


def latest_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint to resume from: the one that ``last_checkpoint`` names, or the newest that is intact.

    A process that was killed while it saved leaves no ``last_checkpoint``, an empty one, or one of an earlier checkpoint.
    """
    pointer = Path(work_dir, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    folders = {Path(work_dir), Path(named).parent if named else Path(work_dir)}
    saved = [path for folder in folders if folder.is_dir() for path in folder.iterdir()
             if re.fullmatch(r'(epoch|iter)_\d+\.pth', path.name)]
    saved.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in [named, *map(str, saved)]:
        if osp.isfile(path):
            try:
                read_checkpoint(path, 'cpu')
                return path
            except SetupError as error:
                print(f'Not resuming from this one: {str(error).splitlines()[0]}')
    return None


def _history_method(cls: Any, name: str) -> Any:
    """In the place of ``getattr``, by which MMEngine's checkpoints name the statistics of their log."""
    if cls is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise UnpicklingError(f'Unsupported global: GLOBAL {name} of {cls}')
    return getattr(cls, name)


def _named(function: Any, module: str, name: str) -> Any:
    """A function that serves under another name: torch before 2.6 takes no pairs of a global and its name."""

    def alias(*args):
        return function(*args)

    alias.__module__, alias.__name__, alias.__qualname__ = module, name, name
    return alias


@contextlib.contextmanager
def _safe_globals():
    """What torch may build besides tensors and plain values: NumPy's arrays and numbers, and MMEngine's log and dicts.

    NumPy's arrays of objects and records are not among them: the state of such a dtype can have bytes taken for pointers.

    MMEngine's own list has ``getattr``, by which a pickle gets at everything, ``eval`` included.
    """
    # NumPy 1 and 2 have these functions in different modules, and each reads what the other has written
    functions = [_named(function, f'numpy.{package}.multiarray', function.__name__) for package in ('core', '_core')
                 for function in (np.empty(0).__reduce__()[0], np.float64().__reduce__()[0])]
    dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code not in 'OV'}
    plain = [bytes, complex, frozenset, range, set, slice]  # some of which torch allows by itself, depending on its version
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([np.ndarray, np.dtype, *dtypes, *functions, HistoryBuffer, ConfigDict, *plain,
                                          codecs.encode,  # by which a pickle has bytes
                                          _named(_history_method, 'builtins', 'getattr')])
    try:
        yield
    finally:  # torch.serialization.safe_globals, which does all that, came with torch 2.5
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location=None) -> Dict[str, Any]:
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    return read_checkpoint(filename, map_location)


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(filename: str, map_location=None) -> Dict[str, Any]:
    """Download to where torch and MMEngine keep downloads, unless the file is there; in the first process first."""
    cached = Path(torch.hub.get_dir(), 'checkpoints', osp.basename(urlparse(filename).path))

    def download() -> None:
        if not cached.is_file():
            cached.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(filename, str(cached), progress=os.isatty(0))
            except URLError as error:
                raise SetupError(f'{filename} cannot be downloaded: {error}',
                                 'Check the network, or fetch the file elsewhere and give that') from None

    if get_rank() == 0:
        download()
    barrier()
    download()  # on other machines
    return read_checkpoint(cached, map_location)


@CheckpointLoader.register_scheme(prefixes=('torchvision://', 'modelzoo://'), force=True)
def load_from_torchvision(filename: str, map_location=None) -> Dict[str, Any]:
    return load_from_http(published(get_torchvision_models(), filename), map_location)


@CheckpointLoader.register_scheme(prefixes=('open-mmlab://', 'openmmlab://'), force=True)
def load_from_openmmlab(filename: str, map_location=None) -> Dict[str, Any]:
    return load_from_http(published(get_external_models(), filename), map_location)


@CheckpointLoader.register_scheme(prefixes='mmcls://', force=True)
def load_from_mmcls(filename: str, map_location=None) -> Dict[str, Any]:
    checkpoint = load_from_http(published(get_mmcls_models(), filename), map_location)
    state = checkpoint.get('state_dict', checkpoint)
    return dict(state_dict={key[len('backbone.'):]: value for key, value in state.items() if key.startswith('backbone.')})


@CheckpointLoader.register_scheme(prefixes=(r'(\S+\:)?s3://', r'(\S+\:)?petrel://', 'pavi://'), force=True)
def load_from_storage(filename: str, map_location=None) -> Dict[str, Any]:
    return read_checkpoint(io.BytesIO(get_file_backend(filename).get(filename)), map_location)


# Writing


@register_backend('checkpoints')
class CheckpointBackend(LocalBackend):
    """Local files such that a checkpoint is never lost: not by being killed while saving, nor by a full disk.

    ``put`` writes a file whole or not at all. ``remove`` waits until the next ``put`` has succeeded, for MMEngine removes
    the old checkpoint before it saves the new one.
    """
    outdated: List[str] = []  # of all instances, since MMEngine removes with one and saves with others

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        for partial in path.parent.glob(f'{path.name}.*.partial'):  # of a process that was killed
            partial.unlink()
        try:
            write_atomically(path, obj)
        except OSError as error:
            raise SetupError(f'The checkpoint {path} could not be saved: {error}',
                             'Make room for it; the one before it is intact, and --resume continues from there') from None
        while self.outdated:
            old = Path(self.outdated.pop())
            if old.absolute() != path.absolute():
                old.unlink(missing_ok=True)

    def remove(self, filepath: Union[str, Path]) -> None:
        self.outdated.append(os.fspath(filepath))


class CheckpointWithoutBase(Hook):
    """Leaves frozen weights out of checkpoints where these can be had again; LieRAHook registers it.

    In their place is a record of where they came from and a fingerprint, with which
    :class:`~liera_mm.models.PretrainedBackbone` fetches and checks them when the checkpoint is loaded.
    """
    priority = 'LOWEST'  # after EMAHook, which exchanges the entries of two state dicts

    def __init__(self):
        self.logged = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        leave_out_base(model, checkpoint)
        if not self.logged:
            for name, backbone in pretrained_backbones(model):
                _log(runner, name, backbone, checkpoint['meta']['liera'][name])
        self.logged = True


def leave_out_base(model: nn.Module, checkpoint: Dict[str, Any]) -> None:
    """Take out of a checkpoint, in place, the frozen weights that can be had again; their records go in."""
    states = [('', checkpoint['state_dict'])]
    if 'ema_state_dict' in checkpoint:
        states.append(('module.', checkpoint['ema_state_dict']))
    checkpoint['meta']['liera'] = {}
    for name, backbone in pretrained_backbones(model):
        prefixes = [(f'{wrapper}{name}.', state) for wrapper, state in states]
        record = backbone.base_record([
            {key[len(prefix):]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            for prefix, state in prefixes])
        for prefix, state in prefixes:
            for key in record['fingerprint']:
                del state[prefix + key]
            state[prefix + RECORD] = encode_record(record)
        checkpoint['meta']['liera'][name] = record


def _log(runner: Runner, name: str, backbone: nn.Module, record: Dict[str, Any]) -> None:
    frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
    kept = frozen & backbone.loaded_names - record['fingerprint'].keys()
    if kept:
        runner.logger.warning(f'LieRA  checkpoints hold {len(kept)} frozen tensors of {name}: these cannot be had again '
                              'from init_cfg or load_from')
    if record['fingerprint']:
        runner.logger.info(f'LieRA  checkpoints leave out {len(record["fingerprint"])} frozen tensors of {name}, which are '
                           f'those of {record["source"]["checkpoint"]}')


def random_state() -> Dict[str, Any]:
    """The state of all random numbers of this process, in types that a checkpoint can hold."""
    name, key, *rest = np.random.get_state()
    state = dict(python=random.getstate(), numpy=(name, key.tolist(), *rest), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available() and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'].cpu())
