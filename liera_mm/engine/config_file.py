"""Reading config files: the file that a path means, its options and choices, and what is wrong with it."""
import difflib
import os.path as osp
import re
import traceback
import unicodedata
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from mmengine.config import Config

from ..core.errors import SetupError
from .auto_classes import fill_classes
from .config_tree import replace_prefix
from .options import check_kinds, merge_options

LOOK_ALIKES = str.maketrans(dict(zip('\u0430\u0435\u0456\u043e\u0440\u0441\u0445\u0443', 'aeiopcxy')))
"""Cyrillic letters that look like the Latin ones of file names."""


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
        cfg = Config(replace_prefix(cfg.to_dict(), cfg.data_root, new), filename=cfg.filename)
    offered = cfg.get('choices')
    for option, choices in (offered if isinstance(offered, dict) else {}).items():
        if option in options:
            cfg.merge_from_dict(choices[_known_choice(option, str(options[option]), choices)])
            cfg.pop('work_dir', None)  # of what was chosen before, in a config that a training wrote
    merge_options(cfg, options)
    if cfg.get('auto_classes'):
        fill_classes(cfg)
        merge_options(cfg, options)  # what they say about classes counts
    cfg.pop('auto_classes', None)
    check_kinds(cfg)
    return cfg


def read_config(path: str) -> Config:
    """Read a config file; a SetupError says what is wrong with it, or with what it imports or takes for its base."""
    try:
        return Config.fromfile(path)
    except Exception as error:  # of every kind, for a config is a program
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if osp.abspath(frame.filename) == osp.abspath(path)]
        line = getattr(error, 'lineno', None) or (lines or [None])[-1]
        text = str(error).strip().partition('\n')[0] or traceback.extract_tb(error.__traceback__)[-1].line
        missing = isinstance(error, FileNotFoundError) and re.search(r'(\S+\.py)', text.replace('"', ' ').replace("'", ' '))
        close = missing and _closest(missing[1], [str(p) for p in Path(missing[1]).parent.glob('*.py')])
        remedy = (f'The closest ones are {close}' if close else
                  'The base has no such part: see it with print(Config.fromfile(...)) of mmengine'
                  if isinstance(error, KeyError) else 'Correct it')
        raise SetupError(f'{path}{f", line {line}," * bool(line)} cannot be read: {type(error).__name__}: {text}',
                         remedy) from error


def _closest(name: str, known: Sequence[str]) -> str:
    """The names that are closest to another, as a text; empty if none is."""
    return ', '.join(difflib.get_close_matches(name, known, n=3, cutoff=.3))


def _known_choice(option: str, name: str, choices: Sequence[str]) -> str:
    if name not in choices:
        closest = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
        raise SetupError(f'There is no {option} {name!r}',
                         f'The closest ones are {", ".join(closest)}' if closest else f'Choose of {", ".join(choices)}')
    return name
