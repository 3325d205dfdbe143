"""Any backbone with adapted layers, for MMEngine's registry."""
import functools
import inspect
from typing import Any, Dict, Optional, Type

from mmengine.registry import MODELS
from torch import nn

from ..adapt import adapt, check_choice
from ..errors import SetupError
from .pretrained import PretrainedBackbone


@MODELS.register_module()
def LieRABackbone(backbone: Dict[str, Any], liera: Optional[Dict[str, Any]] = None) -> nn.Module:
    """Any registered backbone, frozen and adapted.

    Args:
        backbone: Config of the backbone, of any OpenMMLab package (``type='mmpretrain.ConvNeXt'``).
        liera: Arguments of :func:`liera_mm.adapt`; None for a backbone that is frozen and nothing else.

    Returns:
        The backbone itself, an instance of a subclass of its class.
    """
    model = MODELS.build(backbone)
    if not isinstance(model, PretrainedBackbone):
        model.__class__ = _pretrained_class(type(model))
    adapt_or_freeze(model, liera)
    return model


LieRABackbone.wraps = 'backbone'  # the argument that is left of its config without this package


def adapt_or_freeze(model: nn.Module, liera: Optional[Dict[str, Any]]) -> None:
    """Adapt with those arguments of :func:`liera_mm.adapt`; with None, freeze and nothing else.

    Raises:
        SetupError: If adapt() refuses them, or has no argument of that name.
    """
    if liera is None:
        model.requires_grad_(False)
        return
    try:
        for name in liera:
            check_choice('setting', name, [*inspect.signature(adapt).parameters][1:])
        adapt(model, **liera)
    except (ValueError, TypeError) as error:
        raise SetupError(f'The backbone cannot be adapted as its liera=dict(...) says: {error}',
                         'Correct it in the config, or with --cfg-options model.backbone.liera.NAME=VALUE') from None


@functools.cache
def _pretrained_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    members = dict(__module__=__name__, __reduce__=_reduce, original_class=cls)
    return type(f'LieRA{cls.__name__}', (PretrainedBackbone, cls), members)


def _reduce(model: nn.Module):
    return _restore, (model.original_class, ), model.__dict__


def _restore(original_class: Type[nn.Module]) -> nn.Module:
    cls = _pretrained_class(original_class)
    return cls.__new__(cls)
