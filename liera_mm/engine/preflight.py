"""What the command-line tools check before they build anything: errors of two lines, what is wrong and what to do."""
import difflib
import os
import os.path as osp
import unicodedata
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from mmengine.config import Config

LOOK_ALIKES = str.maketrans(dict(zip('\u0430\u0435\u0456\u043e\u0440\u0441\u0445\u0443', 'aeiopcxy')))
"""Cyrillic letters that look like the Latin ones of file names."""


class SetupError(Exception):
    """Something that the user has to mend before a tool can start.

    Args:
        problem: What is missing or wrong, and where.
        remedy: What to do about it.
    """

    def __init__(self, problem: str, remedy: str):
        super().__init__(f'{problem}\n{remedy}')


def find_config(path: str) -> str:
    """The config file that a path means, look-alike letters resolved.

    Raises:
        SetupError: If there is no such file; names the closest ones.
    """
    if osp.isfile(path):
        return path
    ascii_path = unicodedata.normalize('NFKC', path).translate(LOOK_ALIKES)
    if ascii_path != path and osp.isfile(ascii_path):
        print(f'{path} has letters that only look like Latin ones; reading {ascii_path}')
        return ascii_path
    folder = next(p for p in Path(ascii_path).parents if p.is_dir())
    known = [str(p) for p in folder.rglob('*.py') if '_base_' not in p.parts] if str(folder) != '.' else []
    known = known or [str(p) for p in Path('configs').rglob('*.py') if '_base_' not in p.parts]
    closest = difflib.get_close_matches(ascii_path, known, n=3, cutoff=0.3)
    raise SetupError(f'Config not found: {path}',
                     f'The closest ones are {", ".join(closest)}' if closest else 'Give the path of a config file')


def load_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """Read a config and apply ``--cfg-options``; ``data_root`` among them moves every path below it.

    Raises:
        SetupError: If there is no such config, or it has no ``data_root`` to move.
    """
    cfg = Config.fromfile(find_config(path))
    options = dict(options or {})
    if 'data_root' in options:
        if 'data_root' not in cfg:
            raise SetupError(f'{path} has no data_root to override', 'Override the paths of its dataloaders instead')
        new = osp.join(options.pop('data_root'), '')
        cfg = Config(_replace_prefix(cfg.to_dict(), cfg.data_root, new), filename=cfg.filename)
    cfg.merge_from_dict(options)
    return cfg


def check_files(cfg: Config, splits: List[str], weights: bool) -> None:
    """Check that the data sets, and the pretrained weights if asked for, can be had.

    Args:
        cfg: The whole config.
        splits: Which data to look for: of ``train``, ``val`` and ``test``.
        weights: Whether the weights of ``init_cfg`` and ``load_from`` will be needed too.

    Raises:
        SetupError: At the first thing that is missing.
    """
    for split in splits:
        for dataset in _datasets(cfg.get(f'{split}_dataloader') or {}):
            root = dataset.get('data_root') or ''
            for path in (dataset.get('ann_file'), (dataset.get('data_prefix') or {}).get('img')):
                path = path and osp.join(root, path)
                if path and '://' not in path and not osp.exists(path):
                    raise SetupError(
                        f'The {split} data set is missing: {path}',
                        f'Put it there, or say where it is with --cfg-options data_root=FOLDER (now {root or "unset"})')
    if weights:
        for key, source in _checkpoints(cfg):
            _check_weights(key, source)


def _check_weights(key: str, source: str) -> None:
    if source.startswith(('http://', 'https://')):
        cached = osp.join(torch.hub.get_dir(), 'checkpoints', osp.basename(urlparse(source).path))
        if osp.isfile(cached):
            return
        try:
            urlopen(Request(source, method='HEAD'), timeout=20).close()
        except (URLError, OSError) as error:
            reason = f'HTTP {error.code}' if isinstance(error, HTTPError) else getattr(error, 'reason', error)
            raise SetupError(
                f'Pretrained weights cannot be downloaded ({reason}): {source}',
                f'Check the network, or fetch the file elsewhere and use --cfg-options {key}=FILE') from None
    elif '://' not in source and not osp.isfile(osp.expanduser(source)):
        raise SetupError(f'Weights not found: {source}', f'Say where they are with --cfg-options {key}=FILE')


def _checkpoints(cfg: Config) -> Iterator[Tuple[str, str]]:
    """Key and source of every checkpoint that building and initialising the model reads."""

    def walk(node: Any, key: str) -> Iterator[Tuple[str, str]]:
        if isinstance(node, dict):
            if node.get('type') == 'Pretrained':
                yield f'{key}.checkpoint', node['checkpoint']
            for name, value in node.items():
                yield from walk(value, f'{key}.{name}')
        elif isinstance(node, (list, tuple)):
            for index, value in enumerate(node):
                yield from walk(value, f'{key}.{index}')

    yield from walk(cfg.model, 'model')
    if cfg.get('load_from'):
        yield 'load_from', cfg.load_from


def _datasets(dataloader: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The data sets of a dataloader that read files, below any wrappers."""
    pending = [dataloader.get('dataset')]
    while pending:
        dataset = pending.pop()
        if not isinstance(dataset, dict):
            continue
        if 'dataset' in dataset or 'datasets' in dataset:
            pending += [dataset.get('dataset'), *dataset.get('datasets', [])]
        else:
            yield dataset


def _replace_prefix(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        return {key: _replace_prefix(value, old, new) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_replace_prefix(value, old, new) for value in node)
    return new + node[len(old):] if isinstance(node, str) and node.startswith(old) else node
