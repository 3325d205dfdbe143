"""What the command-line tools share: options, configs, and checks that end in two lines, what is wrong and what to do."""
import argparse
import difflib
import os
import os.path as osp
import sys
import unicodedata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..errors import SetupError

LOOK_ALIKES = str.maketrans(dict(zip('\u0430\u0435\u0456\u043e\u0440\u0441\u0445\u0443', 'aeiopcxy')))
"""Cyrillic letters that look like the Latin ones of file names."""


def exit_clearly(main: Callable[[], None]) -> None:
    """Run a tool; a :class:`SetupError` ends it with the error's two lines and exit status 1."""
    try:
        main()
    except SetupError as error:
        sys.exit(str(error))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that train.py and test.py share with each other and with MMDetection's."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; default: work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value ...; data_root=FOLDER moves all paths below it')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def config_of(args: argparse.Namespace) -> Config:
    """The config of a tool that was called with :func:`add_options`."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', Path(cfg.filename).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


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
    closest = difflib.get_close_matches(ascii_path, known, n=3, cutoff=0.3)
    raise SetupError(f'Config not found: {path}',
                     f'The closest ones are {", ".join(closest)}' if closest else 'Give the path of a config file')


def _to_latin(path: str) -> str:
    """Replace look-alike letters in those parts of a path that are not there as they are."""
    latin = ''
    for part in Path(path).parts:
        as_it_is = osp.join(latin, part)
        known = osp.exists(as_it_is)
        latin = as_it_is if known else osp.join(latin, unicodedata.normalize('NFKC', part).translate(LOOK_ALIKES))
    return latin


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


def check_data(cfg: Config, splits: List[str]) -> None:
    """Check that annotations and images of the splits (of ``train``, ``val``, ``test``) are where the config says.

    Raises:
        SetupError: At the first path that is missing.
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


def check_weights(cfg: Config) -> None:
    """Check that the weights a training starts from, of ``init_cfg`` and ``load_from``, can be had.

    Raises:
        SetupError: At the first file that is missing, or URL that does not answer.
    """
    for key, source in _checkpoints(cfg):
        _check_source(key, source)


def check_checkpoint(path: str) -> None:
    """Check that a checkpoint to test or convert is there.

    Raises:
        SetupError: If it is not; names the checkpoints beside it.
    """
    if '://' not in path and not osp.isfile(path):
        beside = sorted(str(p) for p in Path(path).parent.glob('*.pth'))
        raise SetupError(f'Checkpoint not found: {path}',
                         f'There are {", ".join(beside)}' if beside else 'Give a checkpoint that tools/train.py wrote')


def _check_source(key: str, source: str) -> None:
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
