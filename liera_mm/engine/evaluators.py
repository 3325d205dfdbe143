"""Checks of evaluators: that they are of the images of their data set."""
import os.path as osp
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from mmdet.datasets import BaseDetDataset, ConcatDataset
from mmengine.evaluator import BaseMetric, DumpResults, Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import ReduceOnPlateauParamScheduler
from pycocotools.coco import COCO
from torch import nn
from torch.utils.data import Dataset

from ..core.errors import SetupError
from . import annotations as coco
from .class_names import nearest
from .datasets import listed, parts_of, some_of, steps_of
from .heads import detector_of

COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l',
              'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')

def check_evaluator(split: str, dataset: Dataset, evaluator: Evaluator, model: nn.Module, cfg: Any = None) -> None:
    """Check that the metrics of an evaluator are of the images of a data set, and have what they will ask for.

    Raises:
        SetupError: If one has not.
    """
    from mmdet.evaluation import CocoMetric, LVISMetric, MultiDatasetsEvaluator, VOCMetric  # late, for its import warns
    parts = [*parts_of(dataset)]
    metrics = list(getattr(evaluator, 'metrics', ()))
    settings = cfg.get('metrics', cfg) if isinstance(cfg, dict) else cfg
    settings = settings if isinstance(settings, (list, tuple)) else [settings]
    several = isinstance(evaluator, MultiDatasetsEvaluator)
    if several:
        _check_counts(split, dataset, evaluator)
    for index, metric in enumerate(metrics):
        its_parts = [*parts_of(dataset.datasets[index])] if several else parts
        its_cfg = settings[index] if index < len(settings) and isinstance(settings[index], dict) else {}
        if not all(isinstance(part, BaseDetDataset) for part in its_parts):
            continue
        if isinstance(metric, VOCMetric) and not any('LoadAnnotations' in type(s).__name__ for s in steps_of(its_parts[0])):
            raise SetupError(f'VOCMetric has no boxes to evaluate with: the pipeline of the {split} data set loads none',
                             "Add dict(type='LoadAnnotations', with_bbox=True) to it, before PackDetInputs")
        if isinstance(metric, CocoMetric) and not isinstance(metric, LVISMetric) and not metric.format_only:
            _check_coco_metric(split, metric, its_cfg.get('ann_file'), its_parts, model)


def check_monitored(evaluator: Evaluator, observers: Sequence[Any]) -> None:
    """Check that the metrics by which hooks and schedulers choose, stop or slow down are such as an evaluator gives.

    Args:
        evaluator: That of the validation.
        observers: Hooks and schedulers. MMEngine's that have ``key_indicators`` or a ``monitor`` observe metrics of these
            names; what others have by that name may be anything.

    Raises:
        SetupError: If one is not; of what other metrics than MMDetection's CocoMetric give, the prefix alone is known.
    """
    from mmdet.evaluation import CocoMetric  # late, for its import warns
    names, prefixes = [], []
    metrics = list(getattr(evaluator, 'metrics', ()))
    for outer, metric in zip(getattr(evaluator, 'dataset_prefixes', [''] * len(metrics)), metrics):
        prefix = ''.join(f'{part}/' for part in (outer, metric.prefix) if part)
        if type(metric) is CocoMetric:
            names += [f'{prefix}{name}' for name in _coco_names(metric)]
        elif not isinstance(metric, DumpResults):
            prefixes.append(prefix)
    for observer in observers:
        if not isinstance(observer, (CheckpointHook, EarlyStoppingHook, ReduceOnPlateauParamScheduler)):
            continue
        for key in getattr(observer, 'key_indicators', None) or [getattr(observer, 'monitor', 'auto')]:
            if key != 'auto' and key not in names and not key.startswith(tuple(prefixes)):
                given = names + [f'{prefix}...' for prefix in prefixes]
                meant = nearest(key.rpartition('/')[2], [name.rpartition('/')[2] for name in names])
                meant = [name for name in names if name.rpartition('/')[2] == meant][:1]
                raise SetupError(
                    f'{type(observer).__name__} goes by {key!r}, and the val evaluator gives {listed(given) or "no metric"}',
                    f'Did you mean {meant[0]!r}?' if meant else 'Name one of these, or have the evaluator give it')


def _coco_names(metric: BaseMetric) -> List[str]:
    """Names of what a CocoMetric gives, without its prefix."""
    names = []
    for kind in () if metric.format_only else metric.metrics:
        if kind == 'proposal_fast':
            names += [f'AR@{count}' for count in metric.proposal_nums]
        elif kind == 'proposal':
            names += metric.metric_items or COCO_ITEMS[6:]
        else:
            items = metric.metric_items or COCO_ITEMS[:6]
            names += [f'{kind}_{item}' for item in items]
            if metric.classwise:
                names += [f'{name}_precision' for name in metric.dataset_meta['classes']]
    return names


def _check_counts(split: str, dataset: Dataset, evaluator: Evaluator) -> None:
    """Raise a SetupError unless each of several data sets has a metric and a prefix; what is left over would be lost."""
    if not isinstance(dataset, ConcatDataset):
        raise SetupError(
            f'The {split} evaluator is a MultiDatasetsEvaluator, and its data set a {type(dataset).__name__}',
            "Give it a ConcatDataset; or take out type='MultiDatasetsEvaluator', for one data set")
    counts = len(dataset.datasets), len(evaluator.metrics), len(evaluator.dataset_prefixes)
    if len(set(counts)) > 1:
        raise SetupError(f'The {split} evaluator is for {counts[0]} data sets, and has {counts[1]} metrics and {counts[2]} '
                         'dataset_prefixes', 'Give each data set one metric and one prefix')


def _check_coco_metric(split: str, metric: BaseMetric, ann_file: Optional[str], parts: Sequence[BaseDetDataset],
                       model: nn.Module) -> None:
    detector, segm = detector_of(model), 'segm' in metric.metrics
    if segm and type(detector).__module__.startswith('mmdet.') and not any(
            'mask' in name or 'panoptic' in name for name, _ in detector.named_modules()):
        raise SetupError(f"metric='segm' of the {split} evaluator asks for masks, and the model predicts none",
                         f"Take it out: {split}_evaluator.metric='bbox'")
    items = [metric.metric_items] if isinstance(metric.metric_items, str) else metric.metric_items or ()
    strange = [item for item in items if item not in COCO_ITEMS]
    if strange or isinstance(metric.metric_items, str):
        raise SetupError(
            f'metric_items={metric.metric_items!r:.100} of the {split} evaluator is no list of what CocoMetric gives',
            f'Give a list of these: {", ".join(COCO_ITEMS)}')
    metric.iou_thrs = np.atleast_1d(metric.iou_thrs)  # of a list, pycocotools cannot find one threshold
    infos = [part.get_data_info(index) for part in parts for index in range(len(part))]
    ids = Counter(info['img_id'] for info in infos)
    if len(ids) < len(infos):
        raise SetupError(
            f'Several images of the {split} data sets have the same id, such as {ids.most_common(1)[0][0]!r}: all but one '
            'of them would be lost', 'Give each data set a metric of its own: '
            f"{split}_evaluator=dict(type='MultiDatasetsEvaluator', metrics=[...], dataset_prefixes=[...])")
    if metric._coco_api is None:
        packs = [step.meta_keys for step in steps_of(parts[0]) if hasattr(step, 'meta_keys')]
        if packs and 'instances' not in packs[-1]:
            raise SetupError(
                f'The {split} evaluator has no ann_file, and the data set does not hand on its annotations',
                f'Say which annotations it evaluates with: {split}_evaluator.ann_file={parts[0].ann_file}')
        return
    path = ann_file or f'The annotation file of the {split} evaluator'
    api = metric._coco_api
    remedy = f'Give it the annotations of its data set: --cfg-options {split}_evaluator.ann_file={parts[0].ann_file}'
    lacking = [info for info in infos if info['img_id'] not in api.imgs]
    if lacking:
        raise SetupError(f'{path}, of the evaluator, is of other images: it lacks {len(lacking)} of the {len(infos)} of the '
                         f'{split} data set, such as {lacking[0]["img_path"]}', remedy)
    renamed = [(info, name) for info in infos
               if (name := api.imgs[info['img_id']].get('file_name')) and _stem(name) != _stem(info['img_path'])]
    if renamed:
        info, name = renamed[0]
        raise SetupError(f'{path}, of the evaluator, is of other images: that with id {info["img_id"]!r} is {name} there, '
                         f'and {info["img_path"]} in the {split} data set', remedy)
    same = [any(np.abs(boxes - instance['bbox']).max(1, initial=0).min(initial=np.inf) < 1 for instance in info['instances'])
            for info in some_of([info for info in infos if info['instances']])
            for boxes in [_corners(api.imgToAnns.get(info['img_id'], ()))]]
    if same and sum(same) < len(same) / 2:
        raise SetupError(
            f'{path}, of the evaluator, is of other images: {len(same) - sum(same)} of {len(same)} with the ids of the '
            f'{split} data set have none of the boxes that they have there', remedy)
    classes = parts[0].metainfo['classes']
    coco.check_lists(path, api.dataset, ['categories', 'annotations'])
    coco.check_classes(path, classes, [category['name'] for category in api.dataset['categories']])
    coco.check_ground_truth(path, api.dataset, classes, {info['img_id'] for info in infos}, segm)
    _number(api)


def _number(api: COCO) -> None:
    """Give every annotation a number that COCO's evaluation can note as found: no text, nor 0, which is none found."""
    if not all(type(key) in coco.NUMBER and key for key in api.anns):
        for number, annotation in enumerate(api.dataset['annotations'], 1):
            annotation['id'] = number
        api.createIndex()


def _corners(annotations: Sequence[Dict[str, Any]]) -> np.ndarray:
    """Boxes in COCO's format as (N, 4) of x1, y1, x2, y2."""
    boxes = [a['bbox'] for a in annotations if len(a.get('bbox') or ()) == 4]
    return np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], float).reshape(-1, 4)


def _stem(path: str) -> str:
    return osp.splitext(osp.basename(path))[0]
