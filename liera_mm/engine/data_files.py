"""Checks of the files of a data set by its config, before anything is built."""
import itertools
import os.path as osp
from typing import Any, Dict, Optional

import numpy as np
from mmdet.datasets import CocoPanopticDataset, LVISV05Dataset, LVISV1Dataset, Objects365V2Dataset

from ..core.errors import SetupError
from . import annotations as coco
from .config_tree import type_name
from .datasets import category_names, classes_of, dataset_class
from .files import without_garbage_collection
from .images import check_files, check_sizes

PARSED: Dict[str, Dict[str, Any]] = {}
"""Content of annotation files that were checked, for the data sets that are built next; by path."""


@without_garbage_collection()
def check_coco(split: str, dataset: Dict[str, Any], keep: bool = False) -> None:
    """Check the annotations of a ``CocoDataset`` by its config, and that the images are there that they name.

    Of a data set to train or validate on, something must be left once MMDetection has dropped what it filters.

    Args:
        split: ``train``, ``val`` or ``test``.
        dataset: The config.
        keep: Keep the file's content for the data set that is built from this config, which need not read it again.

    Raises:
        SetupError: If something is wrong or missing.
    """
    cls = dataset_class(dataset)
    root = dataset.get('data_root') or ''
    if not dataset.get('ann_file'):
        raise SetupError(f'The {split} data set, a {cls.__name__}, has no ann_file', 'Give it the path of its annotations')
    path = osp.join(root, dataset['ann_file'])
    content = coco.read_json(path)
    pipeline = [step for step in dataset.get('pipeline') or () if isinstance(step, dict)]
    unlabelled = split == 'test' or any(type_name(step) == 'LoadEmptyAnnotations' for step in pipeline)
    given = isinstance(content, dict) and content.get('annotations') or not unlabelled
    coco.check_lists(path, content, ['images', 'categories'] + ['annotations'] * bool(given))
    images, categories = content['images'], content['categories']
    coco.check_images(path, images, 'coco_url' if issubclass(cls, LVISV1Dataset) else 'file_name')
    coco.check_categories(path, categories)
    classes = classes_of(split, dataset, cls)
    if not issubclass(cls, LVISV05Dataset):  # which takes all categories, whatever the classes are
        coco.check_classes(path, classes, category_names(cls, categories))

    filter_cfg = dataset.get('filter_cfg') or {} if split == 'train' and not dataset.get('test_mode') else {}
    min_size = filter_cfg.get('min_size', 0)
    if given:
        annotated = dict(content)
        if issubclass(cls, CocoPanopticDataset):
            annotated['annotations'] = coco.segments(path, content['annotations'])
        boxes = coco.check_annotations(path, annotated, classes, cls.ANN_ID_UNIQUE)
        masks = not issubclass(cls, CocoPanopticDataset) and any(
            type_name(step) == 'LoadAnnotations' and step.get('with_mask') for step in pipeline)
        if masks:
            found = coco.usable(boxes)
            loaded = found['kept'] | found['of crowds']
            coco.check_masks(path, list(itertools.compress(boxes.entries, loaded)), boxes.size[loaded].tolist())
        if not unlabelled or split == 'test':
            coco.check_usable(path, annotated, boxes, masks, min_size)
        if filter_cfg.get('filter_empty_gt'):
            images = [images[index] for index in np.unique(boxes.image[boxes.wanted])]
    images = [image for image in images if min(image['width'], image['height']) >= min_size]
    by_file_name = not issubclass(cls, (LVISV05Dataset, Objects365V2Dataset))
    if by_file_name and not dataset.get('backend_args') and '://' not in root:
        folder = osp.join(root, (dataset.get('data_prefix') or {}).get('img') or '')
        check_files(path, folder, [image['file_name'] for image in images], 'images',
                    'Put them there, say where they are with data_prefix=dict(img=FOLDER), or take them out of the '
                    'annotations')
        loaders = [step for step in pipeline if type_name(step) == 'LoadImageFromFile']
        if loaders:
            check_sizes(folder, images, loaders[0])
    if keep:
        PARSED[osp.realpath(path)] = content
        if not issubclass(cls.COCOAPI, _ReadBefore):
            cls.COCOAPI = type(cls.COCOAPI.__name__, (_ReadBefore, cls.COCOAPI), {})


class _ReadBefore:
    """Mixed into pycocotools' ``COCO``: takes the content of a file that was checked, instead of reading it again."""

    def __init__(self, annotation_file: Optional[str] = None):
        content = PARSED.pop(osp.realpath(annotation_file), None) if annotation_file else None
        super().__init__(annotation_file if content is None else None)
        if content is not None:
            self.dataset = content
            with without_garbage_collection():
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs
