"""Checks of data sets as they are built, against each other and the model."""
from typing import Any, Dict, Optional

from mmdet.datasets import BaseDetDataset, LVISV05Dataset
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..core.errors import SetupError
from . import annotations as coco
from .checkpoint import check_backbones
from .class_names import check_class_list
from .datasets import listed, parts_of, steps_of
from .evaluators import check_evaluator, check_monitored
from .heads import check_heads, check_masks_of_heads
from .images import check_images


@HOOKS.register_module()
class DataChecks(Hook):
    """Checks data sets, heads and evaluators against each other before a training or test, and images as they are read.

    And that a checkpoint is not of adapters that the model has not.

    ``LieRAHook`` registers it, and the tools do.
    """

    def before_train(self, runner: Runner) -> None:
        check_dataset('train', runner.train_dataloader, runner.model, runner.cfg.get('model'))
        check_masks_of_heads(runner.train_dataloader.dataset, runner.model)
        check_epochs(runner.train_loop)
        if runner.val_loop is not None:
            check_val_interval(runner.train_loop)
            self._check_evaluation(runner, 'val', runner.val_dataloader, runner.val_evaluator)
            check_same_classes(train=runner.train_dataloader.dataset, val=runner.val_dataloader.dataset)
            schedulers = runner.param_schedulers or []
            schedulers = sum(schedulers.values(), []) if isinstance(schedulers, dict) else schedulers
            check_monitored(runner.val_evaluator, [*runner.hooks, *schedulers])

    def after_load_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        check_backbones(runner.model, checkpoint)
        loops = [loop for loop in (runner._train_loop, runner._val_loop, runner._test_loop) if isinstance(loop, BaseLoop)]
        trains = loops[:1] == [runner._train_loop]
        if loops and (runner._resume or not trains):
            check_trained_classes(checkpoint, loops[0].dataloader.dataset, strictly=trains)

    def before_val(self, runner: Runner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):
            self._check_evaluation(runner, 'val', runner.val_dataloader, runner.val_evaluator)

    def before_test(self, runner: Runner) -> None:
        self._check_evaluation(runner, 'test', runner.test_dataloader, runner.test_evaluator)

    @staticmethod
    def _check_evaluation(runner: Runner, split: str, dataloader: DataLoader, evaluator: Evaluator) -> None:
        check_dataset(split, dataloader, runner.model, runner.cfg.get('model'))
        check_evaluator(split, dataloader.dataset, evaluator, runner.model, runner.cfg.get(f'{split}_evaluator'))


def check_dataset(split: str, dataloader: DataLoader, model: nn.Module, cfg: Optional[Dict[str, Any]] = None) -> None:
    """Check the data sets of a dataloader, for those who train without our tools; have their images checked.

    Args:
        split: ``train``, ``val`` or ``test``.
        dataloader: Of the data sets.
        model: The detector, or what wraps it.
        cfg: The config of the model, to say what to change in it.

    Raises:
        SetupError: If annotations lack classes, or are of different ones, or heads have another number; or, but for
            testing, if nothing is left of the annotations.
    """
    dataset = dataloader.dataset
    check_categories(dataset)
    check_same_classes(**{split: dataset})
    check_heads(model, dataset, cfg)
    if split != 'test':
        check_instances(split, dataset)
    check_images(dataset)


def check_epochs(loop: BaseLoop) -> None:
    """Raise a SetupError if epochs would have no batch."""
    if isinstance(loop, EpochBasedTrainLoop) and not len(loop.dataloader):
        batches = loop.dataloader.batch_sampler
        raise SetupError(
            f'An epoch has no batch: each process has {len(batches.sampler)} images, a batch {batches.batch_size}, and '
            'drop_last leaves out what does not fill one',
            'Set train_dataloader.batch_size to at most the number of images, or leave out drop_last')


def check_val_interval(loop: BaseLoop) -> None:
    """Raise a SetupError if validation is to come every 0 epochs or iterations, by which MMEngine divides."""
    if 0 in [getattr(loop, 'val_interval', 1), *getattr(loop, 'dynamic_intervals', ())]:
        raise SetupError('Validation is to come every 0 epochs or iterations',
                         'Set train_cfg.val_interval to at least 1; for no validation, val_dataloader, val_cfg and '
                         'val_evaluator to None')


def check_categories(dataset: Dataset) -> None:
    """Raise a SetupError if the annotation file of a data set lacks classes of it."""
    for part in parts_of(dataset):
        classes = part.metainfo.get('classes') or ()
        check_class_list(classes)
        if len(getattr(part, 'cat_ids', classes)) != len(classes) and not isinstance(part, LVISV05Dataset):
            categories = coco.read_json(part.ann_file)['categories']
            coco.check_classes(part.ann_file, classes, [category['name'] for category in categories])


def check_instances(split: str, dataset: Dataset) -> None:
    """Raise a SetupError if no image of the data sets has a box to learn from. It looks at them up to the first that has."""
    parts = [part for part in parts_of(dataset) if isinstance(part, BaseDetDataset)]
    images = 0
    for part in parts:
        for index in range(len(part)):
            info = part.get_data_info(index)
            if 'instances' not in info:
                return  # of a task of its own
            images += 1
            if any(_is_usable(instance, info) for instance in info['instances']) or info.get('segments_info'):
                return
    if parts and len(parts) == len([*parts_of(dataset)]):
        part = parts[0]
        raise SetupError(
            f'The {split} data set has nothing to learn from: {images} images are left of {part.ann_file}, and none has a '
            f'box in it that has an area and is of {listed(part.metainfo.get("classes") or ())}',
            'Give annotations of the classes, in pixels of their image; or check classes and filter_cfg of the data set')


def check_same_classes(**datasets: Dataset) -> None:
    """Raise a SetupError if data sets with annotations, by their split, do not have the same classes in the same order."""
    labelled = [(split, part.metainfo['classes']) for split, dataset in datasets.items() for part in parts_of(dataset)
                if part.metainfo.get('classes') and not any('LoadEmpty' in type(step).__name__ for step in steps_of(part))]
    for split, theirs in labelled[1:]:
        first, ours = labelled[0]
        if tuple(ours) != tuple(theirs):
            other = f'another {split}' if split == first else f'the {split}'
            raise SetupError(
                f'The {first} data set has the classes {listed(ours)}, {other} data set {listed(theirs)}',
                'Give all data sets the same metainfo=dict(classes=...), in the same order')


def _is_usable(instance: Dict[str, Any], info: Dict[str, Any]) -> bool:
    x1, y1, x2, y2 = instance.get('bbox', (0, 0, 1, 1))
    inside = x1 < info.get('width', x2) and y1 < info.get('height', y2) and x2 > 0 and y2 > 0
    return not instance.get('ignore_flag') and x2 > x1 and y2 > y1 and inside


def check_trained_classes(checkpoint: Dict[str, Any], dataset: Dataset, strictly: bool) -> None:
    """Check that the classes that a checkpoint was trained with are those of a data set.

    Args:
        checkpoint: One of MMEngine's; if it names no classes, they are taken to be the same.
        dataset: The data set.
        strictly: Whether they must have the same names, to train on; or only may not be in another order, to test.

    Raises:
        SetupError: If they are not.
    """
    theirs = tuple((checkpoint.get('meta') or {}).get('dataset_meta', {}).get('classes') or ())
    ours = tuple(next(parts_of(dataset)).metainfo.get('classes') or ())
    if theirs and ours and theirs != ours and (strictly or sorted(theirs) == sorted(ours)):
        raise SetupError(f'The checkpoint was trained with the classes {listed(theirs)}; the data set has {listed(ours)}',
                         'Give the annotations that it was trained with, or the config in the work dir of that training')
