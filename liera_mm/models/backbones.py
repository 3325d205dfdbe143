"""Any backbone with adapted layers, for MMEngine's registry."""
import difflib
import functools
import inspect
import logging
from typing import Any, Dict, Iterable, List, Optional, Sequence, Type

import torch
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import nn
from torch.nn.parameter import is_lazy

from ..core.adapt import adapt, logger
from ..core.errors import SetupError
from ..core.text import check_choice
from .pretrained import PretrainedBackbone, loads, note_loaded


@MODELS.register_module()
def LieRABackbone(backbone: Optional[Dict[str, Any]] = None, liera: Optional[Dict[str, Any]] = None,
                  **kwargs: Any) -> nn.Module:
    """Any registered backbone, frozen and adapted.

    Args:
        backbone: Config of the backbone, of any OpenMMLab package (``type='mmpretrain.ConvNeXt'``).
        liera: Arguments of :func:`liera_mm.adapt`; None for a backbone that is frozen and nothing else.
        **kwargs: ``init_cfg`` or ``pretrained`` in the place of the backbone's: scripts set the one there
            (``model.backbone.init_cfg=None``), mmsegmentation's segmentors the other.

    Returns:
        The backbone itself, an instance of a subclass of its class.

    Raises:
        SetupError: If there are other arguments, or adapt() refuses those in ``liera``.
    """
    others = [name for name in kwargs if name not in ('init_cfg', 'pretrained')]
    refuse_leftovers('LieRABackbone', others, ('backbone', 'liera', 'init_cfg'), ' if they are for the backbone in it, '
                     f'backbone=dict(backbone=dict({"".join(others[:1])}=...));')
    if not isinstance(backbone, dict):
        raise SetupError('LieRABackbone has no backbone to adapt' if backbone is None else
                         f'LieRABackbone has backbone={backbone!r:.100}, which is no dict',
                         'Give it as backbone=dict(type=..., ...)')
    with loads() as tensors:
        model = build_initialised({**backbone, **kwargs} if kwargs else backbone)
    if hasattr(model, 'liera'):
        raise SetupError('The backbone in LieRABackbone is adapted already, as that of a base config that has it',
                         'Change what is there: model=dict(backbone=dict(liera=dict(rank=...))), without _delete_=True and '
                         'another LieRABackbone')
    if not isinstance(model, PretrainedBackbone):
        model.__class__ = _pretrained_class(type(model))
    model.note_elsewhere(tensors)
    adapt_or_freeze(model, liera)
    return model


def build_initialised(cfg: Dict[str, Any]) -> nn.Module:
    """Build a registered module, and initialise what it leaves to pretrained weights, as TridentNet's convolutions do.

    Until then it is whatever was in memory, of which it depends whether a layer can be adapted: NaN, nothing but zeros.
    """
    mode, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory with NaN
    try:
        model = MODELS.build(cfg)
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    for parameter in model.parameters():
        if not (parameter.is_meta or is_lazy(parameter)) and parameter.dim() > 1 and parameter.isnan().all():
            nn.init.kaiming_uniform_(parameter, a=5**.5)  # as torch's layers are
    return model


LieRABackbone.wraps = 'backbone'  # the argument that is left of its config without this package


def refuse_leftovers(name: str, others: Sequence[str], known: Iterable[str], inner: str = '') -> None:
    """Raise a SetupError if a config gives a backbone arguments that it has not.

    Args:
        name: Of the backbone.
        others: Those arguments.
        known: The arguments that it has, one of which may be meant.
        inner: What to do where they are for the backbone in it.
    """
    if not others:
        return
    settings = [other for other in others if other in _settings()]
    close = next(iter(difflib.get_close_matches(others[0], known, n=1, cutoff=.7)), None)
    raise SetupError(
        f'{name} has no {", ".join(others)}; the config gives it what it does not take',
        f'Write {settings[0]} in its liera=dict({settings[0]}=...)' if settings else
        f'Did you mean {close}?' if close else
        f'If they are left of the backbone of a base config, with which yours is merged, write '
        f'backbone=dict(_delete_=True, type={name!r}, ...);{inner} or else take them out')


def _settings() -> List[str]:
    """The settings that ``liera=dict(...)`` has: the arguments of :func:`liera_mm.adapt`."""
    return [*inspect.signature(adapt).parameters][1:]


def adapt_or_freeze(model: nn.Module, liera: Optional[Dict[str, Any]]) -> None:
    """Adapt with those arguments of :func:`liera_mm.adapt`; with None, freeze and nothing else.

    Raises:
        SetupError: If adapt() refuses them, or has no argument of that name.
    """
    model.register_load_state_dict_post_hook(note_loaded)
    super(PretrainedBackbone, model).train(model.training)  # where some freeze their stages for the first time
    frozen_by_itself = any(not parameter.requires_grad for parameter in model.parameters())
    if liera is None:
        model.requires_grad_(False)
        return
    try:
        if not isinstance(liera, dict):
            raise TypeError(f'{liera!r} is no dict')
        for name in liera:
            check_choice('setting', name, _settings())
        adapt(model, **liera)
    except (ValueError, TypeError) as error:
        raise SetupError(f'The backbone cannot be adapted as its liera=dict(...) says: {error}',
                         'Correct it in the config, or with --cfg-options model.backbone.liera.NAME=VALUE') from None
    stages = getattr(model, 'frozen_stages', -1)
    if frozen_by_itself and isinstance(stages, int) and stages >= 0:
        logger.info(f'LieRA  frozen_stages={stages} of {type(model).__name__} is superseded: adapters train in every stage. '
                    'It still says in which stages batch norms keep their statistics')


class _ToMMEngine(logging.Handler):
    """Passes what the core says on to MMEngine's log."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(self.format(record), 'current', record.levelno)


logger.setLevel(logging.INFO)
logger.addHandler(_ToMMEngine())


@functools.cache
def _pretrained_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    members = dict(__module__=__name__, __reduce__=_reduce, original_class=cls)
    return type(f'LieRA{cls.__name__}', (PretrainedBackbone, cls), members)


def _reduce(model: nn.Module):
    return _restore, (model.original_class, ), model.__dict__


def _restore(original_class: Type[nn.Module]) -> nn.Module:
    cls = _pretrained_class(original_class)
    return cls.__new__(cls)
