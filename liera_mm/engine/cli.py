"""What the command-line tools share: options, configs, and checks that end in two lines, what is wrong and what to do."""
import argparse
import difflib
import functools
import inspect
import os
import os.path as osp
import re
import sys
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from mmdet.datasets import BaseDetDataset
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import list_from_file
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ..core.errors import SetupError
from ..models.weight_files import check_prefix
from . import annotations as coco
from .config_file import find_config, load_config, read_config
from .config_tree import dicts, is_pretrained, type_name
from .data import DataChecks
from .data_files import check_coco
from .datasets import classes_of, dataset_class, datasets_of, reads_coco, reads_voc
from .files import file_error, without_garbage_collection
from .options import add_cfg_options, other_kinds
from .plain import arguments_of
from .voc import check_voc

BUILDERS = dict(from_cfg='Runner', build_dataloader='dataloader')
"""Functions of MMEngine's Runner that build it, and its dataloaders."""

DECAYS = 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult'
CLIPPING = dict(norm=clip_grad_norm_, value=clip_grad_value_)

OPENMMLAB = 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmseg'
BUILT_BY = *OPENMMLAB, 'torch', 'transformers'
USED_BY_TOOLS = *OPENMMLAB, 'torch', 'numpy', 'logging', 'liera_mm', '__main__'
NOT_OF_OPTIONS = OSError, MemoryError, torch.cuda.OutOfMemoryError


def exit_clearly(main: Callable[[], None]) -> None:
    """Run a tool; a :class:`SetupError` ends it with the error's two lines and exit status 1.

    So does what MMEngine's and MMDetection's classes raise when they are built from a config, and what is raised up to the
    first epoch's end where ``--cfg-options`` took something out of the config or put another kind of thing in its place.
    """
    try:
        main()
    except Exception as error:
        # A process that loads data sends the text of its traceback, which ends with the error
        lines = str(error) if isinstance(error, SetupError) else ''.join(re.findall(r'SetupError: (.+\n.+)\s*$', str(error)))
        lines = lines or '\n'.join(_config_error(error) or file_error(error))
        if not lines:
            raise
        sys.exit(lines)


def _config_error(error: Exception) -> Sequence[str]:
    """What is wrong with a config and what to do, if OpenMMLab's code refuses to build something of it or cannot use it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames[-1].f_code.co_name == 'call_hook' and error.__context__:  # MMEngine adds the hook to the text of a TypeError
        error = error.__context__
        frames += [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get('__name__', '')
    message = ' '.join(str(error.args[0] if len(error.args) == 1 else error).split())
    message = message or traceback.extract_tb(error.__traceback__)[-1].line
    options = _doubtful_options(frames[1].f_locals) if len(frames) > 1 else ''
    inits = [frame.f_locals for frame in frames if frame.f_globals.get('__name__') == 'mmengine.model.base_module']
    init_cfg = inits[-1].get('init_cfg') if inits else None
    if isinstance(error, KeyError) and error.args == ('type', ) and init_cfg and not type_name(init_cfg):
        return (f'The init_cfg of a {type(inits[-1]["self"]).__name__} has no type: {init_cfg!r:.150}',
                "Write type='Pretrained' beside its checkpoint, or the name of another initializer of MMEngine")
    builds = [frame for frame in frames if frame.f_code.co_name in ('build_from_cfg', 'build_scheduler_from_cfg', *BUILDERS)]
    if builds:
        names = builds[-1].f_locals
        name = BUILDERS.get(builds[-1].f_code.co_name, names.get('obj_type') or names.get('scheduler_type'))
        if name == 'Runner':
            message = message.partition(', but got ')[0]  # whole parts of the config
        if name is None and len(builds) > 1:
            part, outer = (frame.f_locals.get('cfg') for frame in builds[:-3:-1])
            keys = [key for key, value in (outer or {}).items() if value == part]
            if keys:
                return (f'The {type_name(outer) or "Runner"} of the config has '
                        f'{", ".join(f"{key}={part!r:.100}" for key in keys)}, where a dict with a type belongs',
                        options or f'Write {" or ".join(f"{key}=dict(type=...)" for key in keys)}')
        name = getattr(name, '__name__', name) or 'part without a type'
        call = re.search(r"\) got an unexpected keyword argument '(\w+)'", message)
        if isinstance(error, TypeError) and call:
            return (f'The config has a {name}, or something made of it, with {call[1]}=..., which that does not take',
                    _meant_by(call[1], builds[-1].f_locals))
        if isinstance(error, KeyError) and 'is not in the' in message and raised_in.startswith(OPENMMLAB):
            registry = builds[-1].f_locals['registry']
            known = {key for node in (registry, registry.parent) if node is not None for key in node.module_dict}
            close = difflib.get_close_matches(str(name).rpartition('.')[2], sorted(known))
            return (f'The config has a {name}, which is not registered among the {registry.name}s of {registry.scope}',
                    f'The closest ones are {", ".join(close)}. ' * bool(close)
                    + 'A class of your own is registered by custom_imports')
        within = [frame.f_globals.get('__name__', '') for frame in frames[frames.index(builds[-1]):]]
        if raised_in.startswith((*OPENMMLAB, 'torch.utils.data', 'torch.optim')) or not isinstance(
                error, NOT_OF_OPTIONS) and all(module.startswith(BUILT_BY) for module in within):
            return (f'The {name} of the config cannot be built: {message}',
                    options or 'Correct it in the config, or what it reads')
    if options and raised_in.startswith(USED_BY_TOOLS) and not isinstance(error, NOT_OF_OPTIONS):
        return f'{type(error).__name__} in {raised_in}: {message:.300}', options
    return ()


def _meant_by(argument: str, build: Dict[str, Any]) -> str:
    """What to do about an argument that a class does not take.

    Args:
        argument: Its name.
        build: Local variables of MMEngine's ``build_from_cfg``.
    """
    cls, given = build.get('obj_cls'), build.get('args') or ()
    known = ['liera', *(arguments_of(inspect.getmro(cls)) if inspect.isclass(cls) else ())]
    close = difflib.get_close_matches(argument, known, n=1, cutoff=.75)
    if 'liera' in close:
        return ("Give it to the backbone, in a LieRABackbone: model=dict(backbone=dict(_delete_=True, type='LieRABackbone', "
                'backbone=dict(...), liera=dict(...)))')
    if argument == 'backbone' and 'detector' in given:
        return ('Its detector has one: write model=dict(detector=dict(backbone=...)), and '
                '{{_base_.model.detector.backbone}} for that of a base config')
    return ((f'Did you mean {close[0]}? Or else take it out' if close else 'Take it out')
            + '; if it is left of what a base config has in the same place, add _delete_=True to the dict')


def _doubtful_options(main: Dict[str, Any]) -> str:
    """What ``--cfg-options`` change of a config into another kind, as a remedy; empty if nothing, or if it served an epoch.

    Args:
        main: Local variables of a tool's ``main``.
    """
    args, runner = main.get('args'), main.get('runner')
    if not getattr(args, 'cfg_options', None) or not hasattr(args, 'config') or (
            runner is not None and runner.message_hub.get_info('epoch', 0)):  # runner.epoch would build data sets
        return ''
    changes = other_kinds(read_config(find_config(args.config)), args.cfg_options)
    found = [f'{option} where the config has {old}' for option, old in changes
             if runner is None or '.' in option.partition('=')[0]]  # MMEngine's Runner has looked at the others
    return f'--cfg-options set {", and ".join(found)}: leave that out, or change what needs it too' if found else ''


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that train.py and test.py share with each other and with MMDetection's."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; default: work_dirs/<config name>[/<choices>]')
    add_cfg_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def config_of(args: argparse.Namespace) -> Config:
    """The config of a tool that was called with :func:`add_options`."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    chosen = [cfg[name] for name in cfg.get('choices') or ()]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', Path(cfg.filename).stem, *chosen)
    return cfg


def build_runner(cfg: Config, split: str = 'train') -> Runner:
    """The runner of a config, to train or to ``test``.

    Raises:
        SetupError: If the config has nothing to do that with.
    """
    if cfg.get(f'{split}_dataloader') is None:
        raise SetupError(f'The config has no {split}_dataloader', f'Give it one, with {split}_cfg and all that goes with it')
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':  # for which MMEngine would ask for a GPU
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or dict(broadcast_buffers=False), device_ids=None)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(DataChecks())
    return runner


def check_data(cfg: Config, splits: List[str], keep: bool = False) -> None:
    """Check that annotations and images of the splits (of ``train``, ``val``, ``test``) are where the config says.

    Args:
        cfg: The config.
        splits: Those whose data sets and evaluators are checked.
        keep: Keep annotations in COCO's format, which are read for this, for the data sets that are built next: they
            need not read them again.

    Raises:
        SetupError: At the first path that is missing, or line of a classification's split file that is wrong; and where
            annotations in COCO's format are not for this config and these images, or not as they should be.
    """
    classes = ((cfg.get('model') or {}).get('head') or {}).get('num_classes')
    for split in splits:
        for dataset in datasets_of(cfg.get(f'{split}_dataloader') or {}):
            root = dataset.get('data_root') or ''
            _check_paths(split, dataset, cfg.get('data_root') or root or 'unset')
            cls = dataset_class(dataset)
            if cls is not None and issubclass(cls, BaseDetDataset):
                classes_of(split, dataset, cls)
            if cls is not None and reads_coco(cls) and '://' not in osp.join(root, dataset.get('ann_file') or ''):
                check_coco(split, dataset, keep)
            if cls is not None and reads_voc(cls) and '://' not in root and not dataset.get('backend_args'):
                check_voc(split, dataset)
            if type_name(dataset) == 'CustomDataset' and dataset.get('ann_file') and classes and '://' not in root:
                _check_samples(osp.join(root, dataset['ann_file']), osp.join(root, _prefixes(dataset)[0]), classes)
        _check_evaluators(cfg, split)


def _check_paths(split: str, dataset: Dict[str, Any], root: str) -> None:
    """Check that the annotations and folders of a data set are there; ``root`` is what the config has for data_root."""
    prefix, ann_file = dataset.get('data_prefix'), dataset.get('ann_file')
    cls = dataset_class(dataset)
    if isinstance(ann_file, (list, tuple)):
        raise SetupError(f'The {split} data set has several files for ann_file, and reads one',
                         "Give each a data set of its own: dataset=dict(type='ConcatDataset', datasets=[...])")
    if prefix and isinstance(prefix, str) and cls is not None and issubclass(cls, BaseDetDataset):
        raise SetupError(f'data_prefix={prefix!r} of the {split} data set, a {cls.__name__}, is a text',
                         f'Write data_prefix=dict(img={prefix!r})')
    for path in (ann_file, *_prefixes(dataset)):
        path = path and osp.join(dataset.get('data_root') or '', path)
        if path and '://' not in path and not osp.exists(path):
            raise SetupError(f'The {split} data set is missing: {path}',
                             f'Put it there, or say where it is with --cfg-options data_root=FOLDER (now {root})')


def _prefixes(dataset: Dict[str, Any]) -> Tuple[str, str]:
    """The folder of a data set's images, and that of all its files in Pascal VOC's layout; below its data_root."""
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        return prefix, ''
    return prefix.get('img') or prefix.get('img_path', ''), prefix.get('sub_data_root', '')


def _check_evaluators(cfg: Config, split: str) -> None:
    """Check that the files of a split's evaluators are there, and hold what these evaluate with."""
    for key, evaluator in dicts(cfg.get(f'{split}_evaluator'), f'{split}_evaluator'):
        for option, what in (('ann_file', 'annotation file'), ('seg_prefix', 'folder of segments')):
            path = evaluator.get(option)
            there = osp.isfile if option == 'ann_file' else osp.isdir
            if isinstance(path, str) and '://' not in path and not there(path):
                raise SetupError(f'The {what} of the {split} evaluator is missing: {path}',
                                 f'Give it that of its data set: --cfg-options {key}.{option}=PATH')
        reads_coco_files = type_name(evaluator).endswith(('CocoMetric', 'CocoPanopticMetric', 'LVISMetric'))
        if reads_coco_files and osp.isfile(evaluator.get('ann_file') or ''):
            with without_garbage_collection():
                coco.check_lists(evaluator['ann_file'], coco.read_json(evaluator['ann_file']),
                                 ['images', 'categories'] + ['annotations'] * (not evaluator.get('format_only')))


def _check_samples(split_file: str, folder: str, classes: int) -> None:
    """Check every line ``image label`` of a split file: that the image is in the folder, and the label below classes."""
    names = functools.cache(lambda path: set(os.listdir(path)) if osp.isdir(path) else set())
    lines = list_from_file(split_file)
    if not lines:
        raise SetupError(f'{split_file} is empty', 'It needs a line for each image: its path and its label')
    for number, line in enumerate(lines, 1):
        image, _, label = line.strip().rpartition(' ')
        if not (image and label.isdecimal() and int(label) < classes):
            raise SetupError(f'{split_file}, line {number}: {line!r} is not an image and a label from 0 to {classes - 1}',
                             'Correct the file, or give the classes it has with --cfg-options model.head.num_classes=N')
        path = osp.join(folder, image)
        if osp.basename(path) not in names(osp.dirname(path)):
            raise SetupError(f'{split_file}, line {number}: there is no image {path}', 'Put it there, or take out the line')


def check_hook(cfg: Config) -> None:
    """Raise a SetupError if a model with an adapted backbone is to run without LieRAHook, which keeps it from harm."""
    hooks = [*(cfg.get('custom_hooks') or ()), *(cfg.get('default_hooks') or {}).values()]
    adapted = [type_name(node) for _, node in dicts(cfg.get('model'), 'model')
               if type_name(node) in ('LieRAConvNeXt', 'LieRABackbone')]
    if adapted and 'LieRAHook' not in map(type_name, hooks):
        raise SetupError(f'{cfg.filename} has a {adapted[0]}, but no LieRAHook, which checks and merges it',
                         "Add default_hooks = dict(liera=dict(type='LieRAHook')) to the config")


def check_optimizers(cfg: Config) -> None:
    """Check what MMEngine refuses in words of its own, or not before the first step.

    Raises:
        SetupError: If a config asks for automatic mixed precision on a machine that has nothing for it, multiplies a weight
            decay that it does not have, or clips gradients by what is not for that.
    """
    types = [type_name(node) for _, node in dicts(cfg.get('optim_wrapper'), 'optim_wrapper')]
    if get_device() in ('cpu', 'mps') and any(kind.endswith('AmpOptimWrapper') for kind in types):
        raise SetupError('Automatic mixed precision (AmpOptimWrapper) needs a GPU, and there is none that torch can use',
                         'Leave out --amp; or where the config has it, use --cfg-options optim_wrapper.type=OptimWrapper')
    for key, wrapper in dicts(cfg.get('optim_wrapper'), 'optim_wrapper'):
        settings, optimizer, clip = (wrapper.get(part) or {} for part in ('paramwise_cfg', 'optimizer', 'clip_grad'))
        decays = [name for name in DECAYS if name in settings]
        decays += [f'custom_keys.{name}' for name, given in (settings.get('custom_keys') or {}).items()
                   if 'decay_mult' in given]
        if decays and isinstance(optimizer, dict) and optimizer and optimizer.get('weight_decay') is None:
            raise SetupError(
                f'{key}.paramwise_cfg has {decays[0]}, which multiplies a weight_decay, and the optimizer has none',
                f'Give it one: {key}.optimizer.weight_decay=0. for none; or take paramwise_cfg out')
        clips = CLIPPING.get(clip.get('type', 'norm')) if isinstance(clip, dict) else None
        strange = [name for name in clip if name not in ('type', *inspect.signature(clips).parameters)] if clips else []
        if strange:
            raise SetupError(f'{key}.clip_grad has {strange[0]}, which {clips.__name__} does not take',
                             'Take it out; if it is left of a base config, write clip_grad=dict(_delete_=True, ...)')


def check_weights(cfg: Config) -> None:
    """Check that the weights a training starts from, of ``init_cfg`` and ``load_from``, can be had.

    Raises:
        SetupError: At the first file that is missing or lacks the prefix of its ``init_cfg``, or URL that does not answer.
    """
    if cfg.get('load_from') and cfg.get('resume'):
        check_checkpoint(cfg.load_from)
    for key, source in _checkpoints(cfg):
        _check_source(key, source)
    for key, node in dicts(cfg.model, 'model'):
        if is_pretrained(node) and node.get('prefix'):
            check_prefix(node['checkpoint'], node['prefix'], f'--cfg-options {key}.prefix')


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
    for key, node in dicts(cfg.model, 'model'):
        if is_pretrained(node):
            yield f'{key}.checkpoint', node['checkpoint']
    if cfg.get('load_from'):
        yield 'load_from', cfg.load_from
