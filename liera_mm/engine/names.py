"""Names in a config, and of its options, that nothing reads: what else they mean."""
import difflib
import itertools
import re
from inspect import signature
from typing import Any, Dict, Iterable, Iterator, Tuple

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import FlexibleRunner, Runner

from ..core.errors import SetupError
from ..core.text import is_slip
from .config_tree import dicts, type_name
from .datasets import listed

READ = {
    *signature(Runner).parameters, *signature(FlexibleRunner).parameters, 'runner_type', 'custom_imports',
    'auto_scale_lr', 'tta_model', 'tta_pipeline', 'model_wrapper_cfg', 'find_unused_parameters', 'sync_bn', 'compile',
    'activation_checkpointing', 'efficient_conv_bn_eval', 'init_weights_for_test_or_val', 'data_root', 'auto_classes',
    'choices'}
"""The first names of what is read of a config: by MMEngine, by MMDetection's tools, and here."""
OF_MMDETECTION_2 = dict(
    data='train_dataloader', lr_config='param_scheduler', optimizer_config='optim_wrapper.clip_grad', runner='train_cfg',
    total_epochs='train_cfg.max_epochs', evaluation='train_cfg.val_interval', checkpoint_config='default_hooks.checkpoint',
    log_config='default_hooks.logger', resume_from='resume=True load_from', seed='randomness.seed',
    fp16='optim_wrapper.type=AmpOptimWrapper')
CUSTOM_KEYS = 'optim_wrapper.paramwise_cfg.custom_keys'
READ_BY_NAME = dict(
    auto_scale_lr=('enable', 'base_batch_size'), env_cfg=('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    mp_cfg=('mp_start_method', 'opencv_num_threads'), filter_cfg=('filter_empty_gt', 'min_size', 'bbox_min_size'))
"""What is read of dicts without a type, by the last part of their key."""
OF_CHECKPOINTS = 'type', 'priority', 'meta'  # what else a CheckpointHook may have: meta goes to Runner.save_checkpoint
PARAMWISE = dict(
    DefaultOptimWrapperConstructor=('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult',
                                    'flat_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate', 'custom_keys'),
    LearningRateDecayOptimizerConstructor=('num_layers', 'decay_rate', 'decay_type'),
    LearningRateDecayOptimWrapperConstructor=('layer_decay_rate', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult',
                                              'custom_keys'))
"""What the constructors of optimizers read of paramwise_cfg: MMEngine's, MMDetection's and mmpretrain's."""
RATES = {'custom_keys', 'bias_lr_mult', 'dcn_offset_lr_mult', 'decay_rate', 'layer_decay_rate'}
"""Those of them without which a training is another; configs of MMDetection have others for constructors that read none."""


def check_read(cfg: Config, key: str, options: Dict[str, Any]) -> None:
    """Check that an option is one that is read, or may be one that the user's own code reads.

    Args:
        cfg: The config, before it has the option.
        key: The option's.
        options: All of them.

    Raises:
        SetupError: If it sets a variable of the config files, whose value was taken when they were read, and none of what
            has its name; or if the config has no such part, and another is meant.
    """
    first, dot, rest = key.partition('.')
    offered = cfg.get('choices')
    if first in READ or isinstance(offered, dict) and first in offered:
        return
    named = [place for place, _ in _places(cfg) if place.rpartition('.')[2] == first]
    if first in cfg:
        own = _without_scope(cfg[first])
        equal = [place for place, value in _places(cfg) if _without_scope(value) == own and type(value) is type(cfg[first])]
        used = _is_used(cfg, first) or equal and (own and isinstance(own, (dict, list)) or set(named) & set(equal))
        if used and not any(other.endswith(f'.{first}') and value == options[key] for other, value in options.items()):
            found = sorted(equal, key=lambda place: place not in named)
            raise SetupError(
                f'--cfg-options {key} changes nothing: {first} is a variable of the config, used up when that was read',
                f'Set what has its value: {listed([place + dot + rest for place in found])}' if found else
                'Change it in the config file')
        return
    meant = difflib.get_close_matches(first, READ, n=1, cutoff=.85) or named or [OF_MMDETECTION_2.get(first)]
    if meant[0]:
        raise SetupError(f'--cfg-options {key} changes nothing: the config has no {first}',
                         f'Did you mean {" or ".join(meant[:3])}?')


def _places(cfg: Config) -> Iterator[Tuple[str, Any]]:
    """Key and value of everything in those parts of a config that are read."""
    for part in cfg:
        for key, node in dicts(cfg[part], part) if part in READ else ():
            yield from ((f'{key}.{name}', value) for name, value in node.items())


def _without_scope(node: Any) -> Any:
    """A part of a config without the name that MMEngine gives to what comes from another package's config."""
    if isinstance(node, dict):
        return {key: _without_scope(value) for key, value in node.items() if key != '_scope_'}
    return [*map(_without_scope, node)] if isinstance(node, (list, tuple)) else node


def _is_used(cfg: Config, name: str) -> bool:
    """Whether the config files take the value of a variable, and do more than set it."""
    text = re.sub(r'#.*', '', cfg.text)
    return re.search(rf'''(?:(?<=_base_\.)|(?<![\w.'"])){name}\b(?!\s*=[^=])''', text) is not None


def check_names(cfg: Config) -> None:
    """Check the names in what is read without a word about other names that it has, or with one after the first epoch.

    Raises:
        SetupError: If one is misspelt, or for another class than the one that reads it.
    """
    _check_paramwise(cfg.get('optim_wrapper') or {})
    for part in [part for part in cfg if part in READ and part != 'choices']:
        for key, node in dicts(cfg[part], part):
            last = key.rpartition('.')[2]
            if type_name(node) == 'CheckpointHook':
                _check_known(key, node, [*signature(CheckpointHook).parameters, *OF_CHECKPOINTS], 0.)
            if last in READ_BY_NAME:
                _check_known(key, node, READ_BY_NAME[last])
            if not node.get('type') and last != 'liera' and CUSTOM_KEYS not in key:  # adapt() looks at its settings
                _check_pairs(key, node)


def _check_paramwise(wrapper: Dict[str, Any]) -> None:
    constructor = type_name(dict(type=wrapper.get('constructor') or 'DefaultOptimWrapperConstructor'))
    given, known = wrapper.get('paramwise_cfg') or {}, PARAMWISE.get(constructor, ())
    if known:
        of_others = {*sum(PARAMWISE.values(), ())}.intersection(given) - {*known}
        for name in sorted(of_others & RATES):
            raise SetupError(f'The config has optim_wrapper.paramwise_cfg.{name}, which {constructor} does not read',
                             f'Take it out: it reads {", ".join(known)}')
        _check_known('optim_wrapper.paramwise_cfg', given, known)
    mults = ('decay_mult', ) if constructor == 'LearningRateDecayOptimWrapperConstructor' else ('lr_mult', 'decay_mult')
    for name, settings in (given.get('custom_keys') or {}).items():
        rates = [key for key, value in (settings or {}).items() if not isinstance(value, dict)]  # those are for with_dots()
        _check_known(f'{CUSTOM_KEYS}.{name}', rates, mults, .75)
        if 'lr_mult' in rates and 'lr_mult' not in mults:
            raise SetupError(f'The config has {CUSTOM_KEYS}.{name}.lr_mult, which {constructor} does not read',
                             'Take it out: its rates are those of layer_decay_rate')


def _check_known(key: str, names: Iterable[str], known: Iterable[str], cutoff: float = .7) -> None:
    for name in names:
        meant = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if meant and name not in known and name[0] != '_':
            raise SetupError(f'The config has {key}.{name}, which nothing reads',
                             f'Did you mean {meant[0]}? Or else take it out')


def _check_pairs(key: str, names: Iterable[str]) -> None:
    for one, other in itertools.combinations(sorted(map(str, names), key=len), 2):
        if is_slip(one, other):  # no config of OpenMMLab has such a pair
            raise SetupError(f'The config has {key}.{one} and {key}.{other}, one of which is misspelt', 'Take that out')
