"""Checks of data sets in Pascal VOC's layout, before MMDetection reads them: a list of images, and an XML file for each."""
import os.path as osp
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

from mmengine.fileio import list_from_file

from ..core.errors import SetupError
from .class_names import check_spaces, spelling
from .config_tree import type_name
from .datasets import classes_of, dataset_class, listed
from .images import check_files, check_sizes

SIDES = 'xmin', 'ymin', 'xmax', 'ymax'


class Photo(NamedTuple):
    """What an XML file says of its image."""
    size: Tuple[int, int]  # width, height; (0, 0) if it says nothing
    objects: List[Tuple[str, bool]]  # name of the class, and whether it can be used: with an area, and not difficult


def check_voc(split: str, dataset: Dict[str, Any]) -> None:
    """Check the files of an ``XMLDataset`` by its config.

    Of a data set to train or validate on, an object must be left to learn from, or to evaluate with.

    Args:
        split: ``train``, ``val`` or ``test``.
        dataset: The config.

    Raises:
        SetupError: If something is wrong or missing.
    """
    cls = dataset_class(dataset)
    root = dataset.get('data_root') or ''
    if not dataset.get('ann_file'):
        raise SetupError(f'The {split} data set, a {cls.__name__}, has no ann_file',
                         'Give it the path of its list of images, such as ImageSets/Main/trainval.txt')
    path = osp.join(root, dataset['ann_file'])
    names = list_from_file(path)
    if not any(names):
        raise SetupError(f'{path} is empty', 'It needs a line for each image: its name, without .jpg')
    if names[0].startswith(('{', '[')):
        raise SetupError(f'{path} is a JSON file, and the {cls.__name__} of the {split} data set reads a list of images',
                         "For annotations in COCO's format, take a CocoDataset")
    folder = osp.join(root, (dataset.get('data_prefix') or {}).get('sub_data_root', ''))
    annotations = osp.join(folder, dataset.get('ann_subdir', 'Annotations'))
    check_files(path, annotations, [f'{name}.xml' for name in names], 'annotations',
                'Put them there, say where they are with data_prefix=dict(sub_data_root=FOLDER) and ann_subdir, or take '
                'their lines out; a line is the name of an image, and nothing else')
    images = [osp.join(dataset.get('img_subdir', 'JPEGImages'), f'{name}.jpg') for name in names]
    check_files(path, folder, images, 'images', 'Put them there, say where they are with data_prefix=dict(sub_data_root='
                'FOLDER) and img_subdir, or take their lines out; they must be .jpg')
    classes = classes_of(split, dataset, cls) or ()
    photos = [read_photo(osp.join(annotations, f'{name}.xml'), classes) for name in names]
    loaders = [step for step in dataset.get('pipeline') or () if type_name(step) == 'LoadImageFromFile']
    if loaders:
        check_sizes(folder, [dict(file_name=image, width=photo.size[0], height=photo.size[1])
                             for image, photo in zip(images, photos) if photo.size != (0, 0)], loaders[0])
    if split != 'test' and classes:
        _check_objects(path, photos, classes)


def read_photo(path: str, classes: Sequence[str]) -> Photo:
    """Read an XML file as MMDetection does, which looks at the boxes of its classes alone.

    Raises:
        SetupError: If it is damaged, or lacks what MMDetection needs.
    """
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise SetupError(f'{path} is no XML file, or a damaged one: {error}', 'Put an intact one there') from None
    objects = []
    for index, entry in enumerate(root.findall('object'), 1):
        where, name = f'{path}, object {index}', entry.findtext('name')
        if not name:
            raise SetupError(f'{where} has no name', 'Give it the name of its class')
        if name not in classes:
            objects.append((name, False))
            continue
        where, box = f'{where}, {name!r},', entry.find('bndbox')
        if box is None:
            raise SetupError(f'{where} has no bndbox', f'Give it one, with {", ".join(SIDES)} in pixels')
        x1, y1, x2, y2 = (_number(where, box, side, lambda text: int(float(text))) for side in SIDES)
        if x2 < x1 or y2 < y1:
            raise SetupError(f'{where} has a bndbox whose corners are in the wrong order: {x1}, {y1}, {x2}, {y2}',
                             'xmin must not be larger than xmax, nor ymin than ymax')
        difficult = entry.find('difficult') is not None and _number(where, entry, 'difficult')
        objects.append((name, not difficult and x2 > x1 and y2 > y1))
    size = root.find('size')
    if size is None:
        return Photo((0, 0), objects)
    width, height = (_number(f'{path}, its size,', size, key) for key in ('width', 'height'))
    if min(width, height) < 1:
        raise SetupError(f'{path} says that its image is {width}x{height} pixels large',
                         'Give the size of the image, or take <size> out: it is then read from the image')
    return Photo((width, height), objects)


def _number(where: str, element: ET.Element, key: str, number: Callable[[str], int] = int) -> int:
    text = element.findtext(key)
    try:
        return number(text)
    except (TypeError, ValueError, OverflowError):
        wrong = f'has no {key}' if text is None else f'has {text!r} for {key}'
        raise SetupError(f'{where} {wrong}', f'Give {key} as a whole number') from None


def _check_objects(path: str, photos: Sequence[Photo], classes: Sequence[str]) -> None:
    """Raise a SetupError if no object is of the classes, or if those of a class have nearly its name."""
    counts = Counter(name for photo in photos for name, _ in photo.objects)
    others = [name for name in counts if name not in classes]
    for name in classes:
        similar = next((other for other in others if spelling(other) == spelling(name)), None)
        if name not in counts and similar:
            raise SetupError(
                f'{path} has no object of the class {name!r} of the config, but {counts[similar]} of {similar!r}',
                'Set metainfo=dict(classes=...) of the data set to the names that its annotations have')
    check_spaces(path, classes, counts)
    if not any(usable and name in classes for photo in photos for name, usable in photo.objects):
        found = f'; it has {listed(list(counts))}' if counts else ''
        raise SetupError(
            f'{path} has no object to use: none of its {sum(counts.values())} in {len(photos)} images has an area, is not '
            f'difficult, and is of {listed(list(classes))}{found}',
            'Set metainfo=dict(classes=...) of the data set to the names that its annotations have')
