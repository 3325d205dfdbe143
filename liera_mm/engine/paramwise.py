"""What MMEngine's ``paramwise_cfg`` means for adapters: the settings of the layer that each adapts.

MMEngine finds the settings of a parameter by its name and by the class of the module that has it. An adapter is a module of
its own: without this, ``dwconv_decay_mult`` and a key of ``custom_keys`` that names a weight would miss it.
"""
import functools
from typing import Any, Callable, Dict, List

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..core.layers import AdaptedLayer

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
