"""What annotations in COCO's format hold, and what is odd about them: in counts, sentences and pictures."""
import hashlib
import os.path as osp
from collections import defaultdict
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence

import mmcv
import numpy as np
from mmdet.datasets import CocoPanopticDataset
from mmengine.config import Config

from ..core.errors import SetupError
from ..core.text import table_lines
from . import annotations as coco
from .datasets import classes_of, dataset_class, datasets_of, reads_coco

AREAS = dict(small=32**2, medium=96**2, large=np.inf)
"""Sizes of objects as in COCO's evaluation: areas in pixels that they stay below."""
TINY = 8  # px, twice the stride of a detector's finest features
FEW = 10  # boxes


class Split(NamedTuple):
    """A data set of a config, and its annotations as arrays of (N,): of crowds and of what MMDetection drops too."""
    name: str
    ann_file: str
    folder: str
    content: Dict[str, Any]
    classes: List[str]
    boxes: coco.Boxes
    of_class: np.ndarray  # index of the class, or -1
    objects: np.ndarray  # what is learnt and to be found


def read_splits(cfg: Config, names: Sequence[str] = ('train', 'val', 'test')) -> List[Split]:
    """The annotated data sets of a config, each once.

    Raises:
        SetupError: If one is not in COCO's format, or its annotations cannot be used.
    """
    splits: Dict[str, Split] = {}
    for name in names:
        for dataset in datasets_of(cfg.get(f'{name}_dataloader') or {}):
            cls = dataset_class(dataset)
            if cls is None or not reads_coco(cls) or issubclass(cls, CocoPanopticDataset):
                raise SetupError(f'The {name} data set is a {dataset.get("type")}, not a CocoDataset',
                                 "Convert its annotations to COCO's format")
            root = dataset.get('data_root') or ''
            path = osp.join(root, dataset['ann_file'])
            content = coco.read_json(path)
            if not content.get('annotations') or osp.realpath(path) in splits:
                continue
            classes = list(classes_of(name, dataset, cls))
            boxes = coco.check_annotations(path, content, classes, cls.ANN_ID_UNIQUE)
            class_index = {category['id']: classes.index(category['name']) for category in content['categories']
                           if category['name'] in classes}
            parts = sum(split.name.partition('-')[0] == name for split in splits.values())
            splits[osp.realpath(path)] = Split(
                f'{name}-{parts + 1}' if parts else name, path,
                osp.join(root, (dataset.get('data_prefix') or {}).get('img') or ''), content, classes, boxes,
                np.array([class_index.get(entry['category_id'], -1) for entry in boxes.entries], int),
                coco.usable(boxes)['kept'])
    return list(splits.values())


def table(split: Split) -> List[str]:
    """Lines of a table: images, objects and their sizes for every class."""
    size = np.searchsorted([*AREAS.values()], split.boxes.area, side='right')
    rows = [['class', 'images', 'boxes', *AREAS, 'crowds']]
    for name, ours in [*((name, split.of_class == index) for index, name in enumerate(split.classes)),
                       ('all', split.of_class >= 0)]:
        kept = ours & split.objects
        images = len(split.content['images']) if name == 'all' else len(set(split.boxes.image[kept]))
        counts = [images, kept.sum(), *((kept & (size == index)).sum() for index in range(len(AREAS))),
                  (ours & split.boxes.crowd).sum()]
        rows.append([name, *(f'{count:,}' for count in counts)])
    return table_lines(rows)


def findings(split: Split) -> List[str]:
    """What is odd about a data set by its annotations, a sentence each; nothing if nothing is."""
    return [*_about_images(split), *_about_boxes(split), *_about_classes(split)]


def _about_images(split: Split) -> Iterable[str]:
    images = split.content['images']
    empty = sorted(set(range(len(images))) - set(split.boxes.image[split.objects]))
    if empty:
        yield f'{len(empty)} of {len(images)} images have no box, such as {images[empty[0]]["file_name"]}'
    ids, annotations = {image['id'] for image in images}, split.content['annotations']
    for reason, lost in (('of images that are not listed', [a for a in annotations if a['image_id'] not in ids]),
                         ('marked to ignore', [a for a in annotations if a['image_id'] in ids and a.get('ignore')])):
        if lost:
            yield (f'{len(lost)} of {len(annotations)} annotations are {reason}, and not used, such as that with id '
                   f'{lost[0]["id"]}')


def _about_boxes(split: Split) -> Iterable[str]:
    boxes, objects = split.boxes, split.objects
    (x, y, w, h), (width, height) = boxes.xywh.T, boxes.size.T
    reasons = [(f'are {reason}, and not used', dropped) for reason, dropped in coco.usable(boxes).items()
               if reason not in ('kept', 'of crowds')]
    reasons += [
        (f'are narrower or lower than {TINY} pixels', objects & (np.minimum(w, h) < TINY)),
        ('reach beyond their image', objects & ((np.minimum(x, y) < -1) | (x + w > width + 1) | (y + h > height + 1))),
        ('fill their image', objects & (w * h > .95 * width * height)),
    ]
    places = defaultdict(list)
    for index in np.flatnonzero(objects):
        places[(split.boxes.image[index], *boxes.xywh[index].round().tolist())].append(index)
    again, other = np.zeros((2, len(objects)), bool)
    for first, *rest in places.values():
        for index in rest:
            (again if split.of_class[index] == split.of_class[first] else other)[index] = True
    reasons += [('are where another box of their class is', again), ('are where a box of another class is', other)]
    for reason, which in reasons:
        if which.any():
            index = min(np.flatnonzero(which), key=lambda index: boxes.xywh[index, 2:].min())
            bbox = ', '.join(f'{value:g}' for value in boxes.xywh[index])
            yield (f'{which.sum()} of {len(which)} boxes {reason}, such as [{bbox}] in '
                   f'{split.content["images"][split.boxes.image[index]]["file_name"]}')


def _about_classes(split: Split) -> Iterable[str]:
    counts = np.bincount(split.of_class[split.objects], minlength=len(split.classes))
    for text, chosen in (('no box', counts == 0), (f'fewer than {FEW} boxes', (counts > 0) & (counts < FEW))):
        if chosen.any():
            names = [split.classes[index] for index in np.flatnonzero(chosen)]
            yield (f'{len(names)} of {len(counts)} classes have {text}: {", ".join(names[:10])}'
                   + f' and {len(names) - 10} more' * (len(names) > 10))
    if len(counts) > 1 and counts.sum():
        most = int(counts.argmax())
        images = set(split.boxes.image[split.objects])
        if counts[most] > .9 * counts.sum():
            yield f'{split.classes[most]} has {counts[most] / counts.sum():.0%} of all boxes'
        elif len(images) > FEW and images == set(split.boxes.image[split.objects & (split.of_class == most)]):
            yield f'{split.classes[most]} is in every image that has a box'


def image_path(split: Split, image: Dict[str, Any]) -> str:
    return osp.join(split.folder, image['file_name'])


def content_digest(path: str) -> str:
    """A hash of what an image shows, whatever the name and format of its file.

    Raises:
        SetupError: If it cannot be read.
    """
    try:
        pixels = mmcv.imread(path)
    except Exception:  # each decoder has its own
        pixels = None
    if pixels is None:
        raise SetupError(f'{path} cannot be read as an image', 'Put an intact one there, or take it out of the annotations')
    return hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode(), digest_size=16).hexdigest()


def duplicates(splits: Sequence[Split], digests: Sequence[Sequence[str]]) -> List[str]:
    """Sentences on images that are there twice, within a split and in two of them.

    Args:
        splits: The data sets.
        digests: For each of them, :func:`content_digest` of its images.
    """
    found = []
    seen = [dict(zip(reversed(theirs), reversed(split.content['images']))) for split, theirs in zip(splits, digests)]
    for number, (split, theirs) in enumerate(zip(splits, digests)):
        pairs = [(image, seen[number][digest]) for image, digest in zip(split.content['images'], theirs)
                 if seen[number][digest] is not image]
        if pairs:
            found.append(f'{split.name}: {len(pairs)} of {len(theirs)} images are copies of others, such as '
                         f'{pairs[0][0]["file_name"]} of {pairs[0][1]["file_name"]}')
        for earlier in range(number):
            pairs = [(image, seen[earlier][digest]) for image, digest in zip(split.content['images'], theirs)
                     if digest in seen[earlier]]
            if pairs:
                found.append(
                    f'{len(pairs)} of {len(theirs)} images of {split.name} are in {splits[earlier].name} too, such as '
                    f'{pairs[0][0]["file_name"]}, {pairs[0][1]["file_name"]} there: metrics will flatter the detector')
    return found
