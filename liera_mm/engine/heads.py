"""Checks of a detector's heads against the data."""
import re
from typing import Any, Dict, Optional, Tuple

from torch import nn
from torch.utils.data import Dataset

from ..core.errors import SetupError
from .datasets import listed, parts_of, steps_of


def check_heads(model: nn.Module, dataset: Dataset, cfg: Optional[Dict[str, Any]] = None) -> None:
    """Check that every head of a detector predicts the classes of a data set.

    Args:
        model: The detector, or what wraps it.
        dataset: What it trains on or is tested with.
        cfg: The config of the model, to say what to change in it.

    Raises:
        SetupError: If a head has another number of them; names all that have.
    """
    metainfo = next(parts_of(dataset)).metainfo
    wrong = wrong_heads(model, metainfo)
    # What a detector makes of its heads' settings is not in the config, nor are copies of one head
    wrong = {key: counts for name, counts in wrong.items() if (key := _config_key(cfg, name))} or wrong
    if wrong:
        name, (given, count) = next(iter(wrong.items()))
        names = metainfo['stuff_classes'] if 'stuff' in name else metainfo.get('thing_classes') or metainfo['classes']
        raise SetupError(
            f'{name} is {given}, but the data have {count} classes: {listed(names)}' + (
                f'. Nor do {len(wrong) - 1} other heads fit' if len(wrong) > 1 else ''),
            '--cfg-options ' + ' '.join(f'model.{name}={count}' for name, (_, count) in wrong.items())
            + ' gives the heads the classes of the data; or else correct metainfo=dict(classes=...) of the data sets')


def _config_key(cfg: Any, name: str) -> Optional[str]:
    """The key of a model's config that sets an attribute of a module of that name; None if none does."""
    *parts, attribute = name.split('.')
    key = []
    for part in parts:
        if isinstance(cfg, dict) and part in cfg:
            cfg = cfg[part]
        elif isinstance(cfg, (list, tuple)) and part.isdecimal() and int(part) < len(cfg):
            cfg = cfg[int(part)]
        elif part.isdecimal():  # of several heads that have one config
            continue
        else:
            return None
        key.append(part)
    return '.'.join([*key, attribute]) if isinstance(cfg, dict) else None


def wrong_heads(model: nn.Module, metainfo: Dict[str, Any]) -> Dict[str, Tuple[int, int]]:
    """Heads of a detector that predict another number of classes: by name, that number and the one of the classes.

    Raises:
        SetupError: If the classes of a loss have other weights than there are classes.
    """
    from mmdet.models import RPN, FusedSemanticHead  # late, for its import takes seconds
    detector = detector_of(model)
    if not metainfo.get('classes') or detector is None or isinstance(detector, RPN) or hasattr(detector, 'language_model'):
        return {}
    things = metainfo.get('thing_classes') or metainfo['classes']
    stuff = metainfo.get('stuff_classes')
    prefix = next(name for name, module in model.named_modules() if module is detector)
    prefix = re.sub(r'^(module(\.|$))*', '', prefix)
    wrong = {}
    for name, module in detector.named_modules(prefix=prefix):
        parts = name.split('.')
        if (module is detector or {'backbone', 'neck', 'rpn_head'} & {*parts} or isinstance(module, FusedSemanticHead)
                or getattr(module, 'class_agnostic', False)):
            continue
        expected = dict(num_things_classes=len(things), num_stuff_classes=len(stuff) if stuff else None)
        if not hasattr(module, 'num_things_classes'):
            expected = dict(num_classes=len(things))
        for key, count in expected.items():
            given = getattr(module, key, None)
            if isinstance(given, int) and count is not None and given != count:
                wrong[re.sub(r'^(student|teacher)\.', 'detector.', f'{name}.{key}')] = (given, count)
        weights, own = getattr(getattr(module, 'loss_cls', None), 'class_weight', None), getattr(module, 'num_classes', None)
        if isinstance(weights, (list, tuple)) and isinstance(own, int) and len(weights) not in (own, own + 1) and not wrong:
            raise SetupError(f'{name}.loss_cls has {len(weights)} values of class_weight, and the head {own} classes',
                             f'Give one for each class, and one for the background: model.{name}.loss_cls.class_weight')
    return wrong


def check_masks_of_heads(dataset: Dataset, model: nn.Module) -> None:
    """Raise a SetupError if a detector learns masks, and no pipeline of its data loads them."""
    loads = [step for part in parts_of(dataset) for step in steps_of(part) if hasattr(step, 'with_mask')]
    if loads and not any(step.with_mask for step in loads) and _learns_masks(model):
        raise SetupError('The model has a mask head, but the train data set loads no masks',
                         "Write dict(type='LoadAnnotations', with_bbox=True, with_mask=True) in its pipeline, or take a "
                         'detector without masks (of Mask R-CNN: model.roi_head.mask_head=None)')


def _learns_masks(model: nn.Module) -> bool:
    """Whether a detector's loss asks for masks."""
    from mmdet.models import BoxInst, MaskFormer, RTMDetInsHead, TwoStageDetector
    from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
    detector = getattr(detector_of(model), 'student', detector_of(model))  # of a semi-supervised one
    if isinstance(detector, TwoStageDetector):
        return detector.with_mask
    return (isinstance(detector, (SingleStageInstanceSegmentor, MaskFormer)) and not isinstance(detector, BoxInst)
            or isinstance(getattr(detector, 'bbox_head', None), RTMDetInsHead))


def detector_of(model: nn.Module) -> Optional[nn.Module]:
    """The detector in a model and its wrappers."""
    from mmdet.models import BaseDetector
    return next((module for module in model.modules() if isinstance(module, BaseDetector)), None)
