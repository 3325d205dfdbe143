"""Names in options that nothing reads, where a place of the config is meant."""
import difflib
import inspect
import re
from typing import Any, Dict, Iterator, Tuple

from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner

from ..core.errors import SetupError
from .config_tree import dicts
from .datasets import listed

READ = {
    *inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters, 'runner_type', 'custom_imports',
    'auto_scale_lr', 'tta_model', 'tta_pipeline', 'model_wrapper_cfg', 'find_unused_parameters', 'sync_bn', 'compile',
    'activation_checkpointing', 'efficient_conv_bn_eval', 'init_weights_for_test_or_val', 'data_root', 'auto_classes',
    'choices'}
"""The first names of what is read of a config: by MMEngine, by MMDetection's tools, and here."""
OF_MMDETECTION_2 = dict(
    data='train_dataloader', lr_config='param_scheduler', optimizer_config='optim_wrapper.clip_grad', runner='train_cfg',
    total_epochs='train_cfg.max_epochs', evaluation='train_cfg.val_interval', checkpoint_config='default_hooks.checkpoint',
    log_config='default_hooks.logger', resume_from='resume=True load_from', seed='randomness.seed',
    fp16='optim_wrapper.type=AmpOptimWrapper')


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
