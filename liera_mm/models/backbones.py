"""Backbones with adapted layers, for MMEngine's registry."""
import functools
from typing import Any, Dict, Optional, Type

from mmengine.registry import MODELS
from mmpretrain.models.backbones import ConvNeXt
from torch import nn

from ..adapt import adapt
from .pretrained import PretrainedBackbone


@MODELS.register_module()
class LieRAConvNeXt(PretrainedBackbone, ConvNeXt):
    """ConvNeXt v1 or v2, frozen and adapted.

    Args:
        liera: Arguments of :func:`liera_mm.adapt`; None for a backbone that is frozen and nothing else.
        **kwargs: Arguments of mmpretrain's ``ConvNeXt``.
    """

    def __init__(self, liera: Optional[Dict[str, Any]] = None, **kwargs):
        super().__init__(**kwargs)
        _adapt_or_freeze(self, liera)


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
    model.__class__ = _pretrained_class(type(model))
    _adapt_or_freeze(model, liera)
    return model


def _adapt_or_freeze(model: nn.Module, liera: Optional[Dict[str, Any]]) -> None:
    if liera is None:
        model.requires_grad_(False)
    else:
        adapt(model, **liera)


@functools.cache
def _pretrained_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    return type(f'LieRA{cls.__name__}', (PretrainedBackbone, cls), dict(__reduce__=_reduce, original_class=cls))


def _reduce(model: nn.Module):
    return _restore, (model.original_class, ), model.__dict__


def _restore(original_class: Type[nn.Module]) -> nn.Module:
    cls = _pretrained_class(original_class)
    return cls.__new__(cls)
