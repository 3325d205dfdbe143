"""Reading config files: the file that a path means, its options and choices, and what is wrong with it."""
import collections
import contextlib
import difflib
import logging
import os.path as osp
import re
import sys
import traceback
import unicodedata
from importlib import import_module
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.logging import print_log

from ..core.errors import SetupError
from .auto_classes import fill_classes
from .config_tree import dicts, replace_prefix
from .names import check_names
from .options import check_kinds, merge_options

LOOK_ALIKES = str.maketrans(dict(zip('\u0430\u0435\u0456\u043e\u0440\u0441\u0445\u0443', 'aeiopcxy')))
"""Cyrillic letters that look like the Latin ones of file names."""

HOOKS_OF_RUNNERS = 'runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint'
"""Names of the default hooks that MMEngine's Runner has by itself."""


def find_config(path: str) -> str:
    """The config file that a path means, look-alike letters resolved.

    Raises:
        SetupError: If there is no such file; names the closest ones.
    """
    if osp.isfile(path):
        return path
    ascii_path = _to_latin(path)
    if ascii_path != path and osp.isfile(ascii_path):
        print(f'{path} has letters that only look like Latin ones; reading {ascii_path}')
        return ascii_path
    folder = next((p for p in Path(ascii_path).parents if p.is_dir()), Path())
    known = [str(p) for p in folder.rglob('*.py') if '_base_' not in p.parts] if str(folder) != '.' else []
    known = known or [str(p) for p in Path('configs').rglob('*.py') if '_base_' not in p.parts]
    closest = _closest(ascii_path, known)
    raise SetupError(f'Config not found: {path}',
                     f'The closest ones are {closest}' if closest else 'Give the path of a config file')


def _to_latin(path: str) -> str:
    """Replace look-alike letters in those parts of a path that are not there as they are."""
    latin = ''
    for part in Path(path).parts:
        as_it_is = osp.join(latin, part)
        known = osp.exists(as_it_is)
        latin = as_it_is if known else osp.join(latin, unicodedata.normalize('NFKC', part).translate(LOOK_ALIKES))
    return latin


def load_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """Read a config and apply ``--cfg-options``.

    Two kinds of options change more than themselves. ``data_root`` moves every path below it. Where the config has
    ``choices=dict(task=dict(name=dict(...), ...), ...)``, ``task=name`` merges the settings of that name.

    A config with ``auto_classes=True`` gets the classes of its annotations (:func:`fill_classes`), and no longer has that.
    ``default_hooks=dict(liera=None)`` takes a hook out that a base has, as MMEngine does with hooks of its own alone.

    Raises:
        SetupError: If there is no such config, or no choice of that name, or the config has no ``data_root`` to move; if
            options do not go with the config, or it has something of another kind than its place is for; or if the classes
            cannot be read.
    """
    cfg = read_config(find_config(path))
    options = dict(options or {})
    if isinstance(options.get('data_root'), str):
        if 'data_root' not in cfg:
            raise SetupError(f'{path} has no data_root to override', 'Override the paths of its dataloaders instead')
        new = osp.join(options.pop('data_root'), '')
        cfg = Config(replace_prefix(cfg.to_dict(), cfg.data_root, new), cfg.text, cfg.filename)
    offered = cfg.get('choices')
    for option, choices in (offered if isinstance(offered, dict) else {}).items():
        if option in options:
            cfg.merge_from_dict(choices[_known_choice(option, str(options[option]), choices)])
            cfg.pop('work_dir', None)  # of what was chosen before, in a config that a training wrote
    before = _imports(cfg)
    merge_options(cfg, options)
    if any(key.partition('.')[0] == 'custom_imports' for key in options):
        _import_named(cfg, before)
    if cfg.get('auto_classes'):
        fill_classes(cfg)
        merge_options(cfg, options)  # what they say about classes counts
    cfg.pop('auto_classes', None)
    check_kinds(cfg)
    check_names(cfg)
    for name, hook in [*(cfg.get('default_hooks') or {}).items()]:
        if hook is None and name not in HOOKS_OF_RUNNERS:
            del cfg.default_hooks[name]
    return cfg


def read_config(path: str) -> Config:
    """Read a config file, and import what it and its bases name as ``custom_imports``.

    MMEngine would not import those of the bases, for a list replaces that of a base.

    Raises:
        SetupError: What is wrong with it, or with what it imports or takes for its base.
    """
    try:
        with _custom_imports() as wanted:
            cfg = Config.fromfile(path)
            for key in cfg.to_dict():  # of a pure Python-style config, this imports what it uses
                collections.deque(dicts(cfg[key], key), maxlen=0)
    except Exception as error:  # of every kind, for a config is a program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if osp.abspath(frame.filename) == osp.abspath(path)]
        line = getattr(error, 'lineno', None) or (lines or [None])[-1]
        raise SetupError(f'{path}{f", line {line}," * bool(line)} cannot be read: {type(error).__name__}: {_reason(error)}',
                         _remedy(error)) from error
    imports = _imports(cfg)
    if imports:
        for name in wanted:
            if name not in imports:
                try:
                    import_module(name)
                    imports.append(name)
                except ImportError as error:
                    print_log(f'{name}, of custom_imports of a base of {path}, cannot be imported: {error}', 'current',
                              logging.WARNING)
        cfg.custom_imports.imports = imports
    return cfg


def _imports(cfg: Config) -> List[str]:
    given = cfg.get('custom_imports')
    imports = (given.get('imports') if isinstance(given, dict) else None) or ()
    return [imports] if isinstance(imports, str) else [*imports]


def _import_named(cfg: Config, before: Sequence[str]) -> None:
    """Import what ``--cfg-options custom_imports...`` names, beside what the config had before.

    Raises:
        SetupError: If one cannot be imported.
    """
    imports = [*dict.fromkeys([*before, *_imports(cfg)])]
    for name in imports[len(before):]:
        try:
            import_module(name)
        except ImportError as error:
            raise SetupError(f'{name}, of --cfg-options custom_imports, cannot be imported: {error}',
                             _remedy(error)) from error
    if isinstance(cfg.get('custom_imports'), dict):
        cfg.custom_imports.imports = imports


@contextlib.contextmanager
def _custom_imports() -> Iterator[List[str]]:
    """A context that collects the modules that config files name as ``custom_imports``, bases first."""
    names, read = [], Config._file2dict

    def read_and_note(*args: Any, **kwargs: Any) -> Any:
        result = read(*args, **kwargs)
        imports = (result[0].get('custom_imports') or {}).get('imports') or ()
        names.extend([imports] if isinstance(imports, str) else imports)
        return result

    Config._file2dict = staticmethod(read_and_note)
    try:
        yield names
    finally:
        Config._file2dict = staticmethod(read)


def _reason(error: Exception) -> str:
    """The first line of what is wrong with a config; where a custom import failed, of why it did."""
    text = str(error).strip().partition('\n')[0].partition(', the current sys.path')[0]
    cause = error
    while isinstance(cause, ImportError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    text = text or traceback.extract_tb(error.__traceback__)[-1].line
    return text if cause is error else f'{text}: {cause}'


def _remedy(error: Exception) -> str:
    text = _reason(error)
    missing = isinstance(error, FileNotFoundError) and re.search(r'(\S+\.py)', text.replace('"', ' ').replace("'", ' '))
    close = missing and _closest(missing[1], [str(p) for p in Path(missing[1]).parent.glob('*.py')])
    if close:
        return f'The closest ones are {close}'
    if isinstance(error, RecursionError):
        return ('A part of it holds itself: in the place of model.update(...), write model.backbone = '
                'dict(type=LieRABackbone, backbone=model.backbone, liera=dict(...))')
    name = re.match(r'Failed to import (\w+) from ([\w.]+) ', text)
    close = _closest(name[1], dir(sys.modules.get(name[2]))) if name else ''
    if close:
        return f'The closest ones are {close}'
    if isinstance(error, ImportError):
        return ('Correct it, or install it; a module of your own is found if PYTHONPATH has the folder that it is in: '
                'PYTHONPATH=FOLDER tools/train.py ...')
    if isinstance(error, KeyError):
        return ('Take one of the bases for the base of another, whose settings it changes' if 'Duplicate' in text else
                'The base has no such part: see it with print(Config.fromfile(...)) of mmengine')
    return 'Correct it'


def _closest(name: str, known: Sequence[str]) -> str:
    """The names that are closest to another, as a text; empty if none is."""
    return ', '.join(difflib.get_close_matches(name, known, n=3, cutoff=.3))


def _known_choice(option: str, name: str, choices: Sequence[str]) -> str:
    if name not in choices:
        closest = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
        raise SetupError(f'There is no {option} {name!r}',
                         f'The closest ones are {", ".join(closest)}' if closest else f'Choose of {", ".join(choices)}')
    return name
