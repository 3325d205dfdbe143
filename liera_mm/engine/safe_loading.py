"""Checkpoints that are read without running code from them.

Importing this module makes MMEngine's ``CheckpointLoader`` read every checkpoint through :func:`read_checkpoint`.
"""
import codecs
import contextlib
import io
import os
import os.path as osp
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Dict, Optional, Union
from urllib.error import URLError
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, get_rank
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from ..core.errors import SetupError
from ..models.weight_files import load_from_safetensors, published, without_compile

TRUST = 'LIERA_MM_TRUST_CHECKPOINTS'


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
        if (start := _start(file))[:1] not in (b'P', b'\x80'):  # of an archive, of a pickle
            reason = f'it begins with {start!r}, as none of torch does' if start else 'it is empty'
        raise SetupError(
            f'{name} is no checkpoint, or a damaged one: {reason:.200}',
            'Give one that is intact. To resume, tools/train.py --resume without a file finds the latest that is') from None


def _start(file: Union[str, os.PathLike, IO[bytes]]) -> bytes:
    with contextlib.nullcontext(file) if hasattr(file, 'seek') else open(file, 'rb') as opened:
        opened.seek(0)
        return opened.read(20)


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
