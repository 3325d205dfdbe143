"""What MMEngine's ``paramwise_cfg`` means for adapters: the settings of the layer that each adapts.

MMEngine finds the settings of a parameter by its name and by the class of the module that has it. An adapter is a module of
its own: without this, ``dwconv_decay_mult`` and a key of ``custom_keys`` that names a weight would miss it. And so would a
key with dots that comes from a command line.
"""
import functools
import logging
from typing import Any, Callable, Collection, Dict, List

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from ..core.errors import SetupError
from ..core.layers import AdaptedLayer
from ..core.text import is_slip, some

AddParams = Callable[..., None]


def of_adapters(paramwise_cfg: Dict[str, Any], layer: AdaptedLayer, prefix: str) -> Dict[str, Any]:
    """The settings with a key for every trained tensor of a layer's adapter.

    Such a tensor has those of the longest key that is in its own name or in that of the layer's weight; but keys with
    ``adapter`` in them come first, however long others are. Without a key, ``dwconv_decay_mult`` holds for depthwise layers.

    Args:
        paramwise_cfg: The config's.
        layer: The layer.
        prefix: Its name.
    """
    custom = dict(paramwise_cfg.get('custom_keys') or {})
    depthwise = isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups  # as MMEngine defines it
    found = {}
    for name, _ in layer.adapter.named_parameters():
        tensor = f'{prefix}.adapter.{name}'.lstrip('.')
        keys = sorted(key for key in custom if key in tensor or key in f'{prefix}.weight')
        keys = [key for key in keys if 'adapter' in key and key in tensor] or keys
        if keys:
            found[tensor] = custom[max(keys, key=len)]
        elif depthwise and paramwise_cfg.get('dwconv_decay_mult') is not None:
            found[tensor] = dict(decay_mult=paramwise_cfg['dwconv_decay_mult'])
    return {**paramwise_cfg, 'custom_keys': {**custom, **found}}


def with_dots(custom_keys: Dict[str, Any], prefix: str = '') -> Dict[str, Dict[str, Any]]:
    """The settings of each key, where ``--cfg-options`` took a key with dots for dicts in dicts.

    ``custom_keys.adapter.A.lr_mult=0.5`` arrives as ``{'adapter': {'A': {'lr_mult': 0.5}}}``, in which MMEngine finds no
    setting, and means ``{'adapter.A': {'lr_mult': 0.5}}``.
    """
    inner = {key: {name: value for name, value in values.items() if isinstance(value, dict)}
             for key, values in custom_keys.items()}
    found = {prefix + key: {name: value for name, value in values.items() if name not in inner[key]}
             for key, values in custom_keys.items() if not values or inner[key] != values}
    for key, nested in inner.items():
        for name, values in with_dots(nested, f'{prefix}{key}.').items():
            found[name] = {**found.get(name, {}), **values}
    return found


def check_keys(custom_keys: Collection[str], model: nn.Module) -> None:
    """Look for keys that are in the name of no parameter, which set nothing; the log names those that are not misspelt.

    Raises:
        SetupError: If one is nearly the name of a module or parameter, or a part of it.
    """
    parameters = [f'.{name}' for name, _ in model.named_parameters(remove_duplicate=False)]
    unused = [key for key in custom_keys if not any(key in name for name in parameters)]
    parts = sorted({part for name in parameters for part in name.split('.')}) if unused else ()
    for key in unused:
        known = [key.replace(word, part) for word in key.split('.') for part in parts if word and is_slip(word, part)]
        meant = [other for other in known if other not in custom_keys and any(other in name for name in parameters)]
        if meant:
            raise SetupError(f'custom_keys of paramwise_cfg has {key!r}, which is in the name of no parameter of the model',
                             f'Did you mean {meant[0]!r}? Or else take it out')
    if unused:
        print_log(f'LieRA  custom_keys that are in the name of no parameter: {some(unused)}', 'current', logging.WARNING)


def _with_keys(call: Callable[..., OptimWrapper]) -> Callable[..., OptimWrapper]:

    @functools.wraps(call)
    def call_with_keys(self: DefaultOptimWrapperConstructor, model: nn.Module) -> OptimWrapper:
        given = self.paramwise_cfg
        if given.get('custom_keys'):
            self.paramwise_cfg = dict(given, custom_keys=with_dots(given['custom_keys']))
            check_keys(self.paramwise_cfg['custom_keys'], model)
        try:
            return call(self, model)
        finally:
            self.paramwise_cfg = given

    return call_with_keys


def _with_adapters(add_params: AddParams) -> AddParams:

    @functools.wraps(add_params)
    def add_params_and_adapters(self: DefaultOptimWrapperConstructor, params: List[dict], module: nn.Module,
                                prefix: str = '', *args: Any, **kwargs: Any) -> None:
        given = self.paramwise_cfg
        if isinstance(module, AdaptedLayer):
            self.paramwise_cfg = of_adapters(given, module, prefix)
        try:
            add_params(self, params, module, prefix, *args, **kwargs)
        finally:
            self.paramwise_cfg = given

    return add_params_and_adapters


DefaultOptimWrapperConstructor.add_params = _with_adapters(DefaultOptimWrapperConstructor.add_params)
DefaultOptimWrapperConstructor.__call__ = _with_keys(DefaultOptimWrapperConstructor.__call__)
