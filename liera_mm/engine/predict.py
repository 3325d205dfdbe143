"""Detections in pictures without annotations: MMDetection's ``DetInferencer`` on a detector with adapters, or merged."""
import copy
import difflib
import glob
import inspect
import os.path as osp
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmdet.apis import DetInferencer
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ..core.adapted import adapter_names
from ..core.adapters import set_adapter
from ..core.errors import SetupError
from ..core.merging import merge
from .checkpoint import adapted_backbones, load_adapter_file, load_trained
from .datasets import datasets_of
from .heads import wrong_heads
from .images import CheckedLoading
from .invariants import check_finite


class Predictor(DetInferencer):
    """A detector with the weights of a checkpoint: loaded strictly, and merged as ``tools/test.py`` merges it.

    Args:
        cfg: The config; ``filename`` is what messages call it.
        checkpoint: Path of a checkpoint of a training or of ``tools/merge.py``; where there are adapters, of the whole
            detector that they belong to, which need not have any itself.
        adapters: Files of :func:`liera_mm.save_adapter` by the names that :meth:`use` takes; the last one is active.
        device: As in ``torch.device``; by default the best that there is.

    Raises:
        SetupError: If a file is damaged or does not fit the config, there is no such device, or neither checkpoint nor
            config name the classes that the heads predict.
    """

    def __init__(self, cfg: Config, checkpoint: str, adapters: Optional[Dict[str, str]] = None,
                 device: Optional[str] = None):
        self.adapters = adapters or {}
        cfg = copy.deepcopy(cfg)
        scope, dataset = cfg.get('default_scope') or 'mmdet', next(datasets_of(cfg.get('test_dataloader') or {}), None)
        if scope == 'mmpretrain' or not (dataset and dataset.get('pipeline')):
            raise SetupError(f'{cfg.filename} has no test data set of a detector, whose pipeline says how to read images',
                             'Give the config of a detector of MMDetection, with a test_dataloader')
        cfg.test_dataloader.dataset = dataset
        for step in dataset.pipeline:
            if inspect.isclass(step.type):  # in a pure Python-style config
                step.type = f'{step.type.__module__}.{step.type.__qualname__}'
        cfg.visualizer = dict(cfg.get('visualizer') or dict(type='DetLocalVisualizer'), vis_backends=None)
        super().__init__(cfg, checkpoint, check_device(device), scope, show_progress=False)

    def _init_model(self, cfg: Config, weights: str, device: Optional[str] = None) -> nn.Module:
        model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors write into their config
        backbones = adapted_backbones(model)
        if self.adapters and not backbones:
            raise SetupError(f'{cfg.filename} has no adapted backbone for {next(iter(self.adapters.values()))}',
                             'Give the config that the adapter was trained with')
        own = {f'{name}.{key}' for name, module in backbones.items() for key in adapter_names(module)}
        checkpoint = load_trained(model, weights, cfg.filename, may_lack=own if self.adapters else ())
        for name, path in self.adapters.items():
            load_adapter_file(model, path, cfg.filename, name)
        model.cfg, model.dataset_meta = cfg, dataset_meta(model, cfg, weights, checkpoint)
        check_finite(model)
        merge(model)
        return model.to(device).eval()

    def _init_pipeline(self, cfg: Config):
        pipeline = super()._init_pipeline(cfg)
        pipeline.transforms[:] = [CheckedLoading(step) if type(step).__name__ == 'InferencerLoader' else step
                                  for step in pipeline.transforms]
        return pipeline

    def use(self, adapter: str) -> None:
        """Predict with another of the adapters."""
        for backbone in adapted_backbones(self.model).values():
            set_adapter(backbone, adapter)


def dataset_meta(model: nn.Module, cfg: Config, path: str, checkpoint: Dict[str, Any]) -> Dict[str, Any]:
    """The classes, as the checkpoint names them, or else the config, and their colours.

    Raises:
        SetupError: If the heads predict another number of classes than there are names.
    """
    configured = DATASETS.build(dict(cfg.test_dataloader.dataset, lazy_init=True)).metainfo
    trained = {key.lower(): value for key, value in (checkpoint.get('meta') or {}).get('dataset_meta', {}).items()}
    named = bool(trained.get('classes'))
    meta = {**configured, **trained} if named else dict(configured)
    count = len(meta.get('classes') or ())
    wrong = next(iter(wrong_heads(model, meta).items()), None)
    if wrong or not count:
        source = f'{path} has' if named else f'{path} names no classes, and {cfg.filename} has'
        heads = f', where {wrong[0]} is {wrong[1][0]}' if wrong else ''
        raise SetupError(f'{source} {count}{heads}', 'Name them in the config in the order of the training: test_dataloader='
                         'dict(dataset=dict(metainfo=dict(classes=(...))))')
    palette = configured.get('palette')
    meta['palette'] = palette if isinstance(palette, (list, tuple)) and len(palette) >= count else 'random'
    return meta


def check_device(device: Optional[str]) -> Optional[str]:
    """The device.

    Raises:
        SetupError: If torch cannot use it.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(f'There is no device {device!r} that torch can use: {str(error).splitlines()[0]:.200}',
                         'Give --device cpu, or cuda:0 on a machine with a GPU') from None
    return device


def find_images(inputs: Sequence[str]) -> List[str]:
    """The image files that paths mean: files, the images in folders, globs; URLs stay as they are. Each one once.

    Raises:
        SetupError: If there is no such file, or no image in a folder.
    """
    images: Dict[str, str] = {}
    for given in inputs:
        path = osp.expanduser(given)
        if '://' in given or osp.isfile(path):
            found = [path]
        elif osp.isdir(path):
            found = _images_among(glob.glob(osp.join(glob.escape(path), '*')))
            if not found:
                below = sorted({osp.dirname(name) for name in _images_among(
                    glob.glob(osp.join(glob.escape(path), '**/*'), recursive=True))})
                raise SetupError(f'There are no images in {given}', f'There are in {", ".join(below[:3])}' if below else
                                 f'Give a folder with images ({", ".join(IMG_EXTENSIONS)})')
        else:
            found = _images_among(glob.glob(path, recursive=True))
            if not found:
                raise SetupError(f'No such image: {given}', _nearest(path))
        images.update((name if '://' in name else osp.realpath(name), name) for name in found)
    return list(images.values())


def _images_among(paths: Sequence[str]) -> List[str]:
    return sorted(path for path in paths if path.lower().endswith(IMG_EXTENSIONS) and osp.isfile(path))


def _nearest(path: str) -> str:
    folder = next(parent for parent in Path(path).parents if parent.is_dir())
    known = {osp.basename(name): name for name in _images_among(glob.glob(osp.join(glob.escape(str(folder)), '*')))}
    closest = difflib.get_close_matches(osp.basename(path), known, n=3, cutoff=.3) or sorted(known)[:3]
    return f'The closest ones are {", ".join(known[name] for name in closest)}' if closest else f'{folder} has no images'


def picture_names(images: Sequence[str]) -> List[str]:
    """Names for pictures of images, below one folder: those of the images, with their folders where these are several."""
    local = [osp.abspath(path) for path in images if '://' not in path]
    top = osp.commonpath([osp.dirname(path) for path in local]) if local else ''
    names = [osp.basename(path) if '://' in path else osp.relpath(osp.abspath(path), top) for path in images]
    return [name if name.lower().endswith(('.jpg', '.jpeg', '.png')) else f'{name}.jpg' for name in names]


def coco_results(image_id: int, prediction: Dict[str, Any], categories: Sequence[int]) -> List[Dict[str, Any]]:
    """The detections in an image in COCO's format for results; of a prediction as ``DetInferencer`` gives it."""
    masks = prediction.get('masks') or [None] * len(prediction['labels'])
    return [dict(image_id=image_id, category_id=categories[label], bbox=[x1, y1, x2 - x1, y2 - y1], score=score,
                 **(dict(segmentation=mask) if mask else {}))
            for label, score, (x1, y1, x2, y2), mask in zip(
                prediction['labels'], prediction['scores'], prediction['bboxes'], masks)]
