"""Checks of data sets in COCO's format, before a training starts and as its images are read."""
import functools
import os
import os.path as osp
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.fileio import load
from torch.utils.data import Dataset

from ..errors import SetupError


def check_coco(split: str, dataset: Dict[str, Any]) -> None:
    """Check the annotations of a ``CocoDataset`` by its config, and that the images are there that they name.

    Of a data set to train or validate on, something must be left once MMDetection has dropped what it filters.

    Raises:
        SetupError: If something is wrong or missing.
    """
    root = dataset.get('data_root') or ''
    path = osp.join(root, dataset['ann_file'])
    try:
        content = load(path)
    except ValueError as error:
        raise SetupError(f'{path} is no JSON file, or a damaged one: {error}', 'Put an intact one there') from None
    needed = ('images', 'categories') if split == 'test' else ('images', 'categories', 'annotations')
    lacking = [key for key in needed if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise SetupError(f'{path} has no list of {", ".join(lacking)}',
                         "Give annotations in COCO's format for object detection, or the type of data set that yours have")
    classes = CocoDataset._load_metainfo(dataset.get('metainfo') or {})['classes']
    check_classes(path, classes, [category['name'] for category in content['categories']])
    filter_cfg = dataset.get('filter_cfg') or {} if split == 'train' else {}
    images = content['images'] if split == 'test' else _used_images(path, filter_cfg, classes, content)
    prefix = (dataset.get('data_prefix') or {}).get('img', '')
    if not dataset.get('backend_args'):
        _check_files(path, osp.join(root, prefix), [image['file_name'] for image in images])


def check_classes(ann_file: str, classes: Sequence[str], theirs: List[str]) -> None:
    """Raise a SetupError if annotations lack classes: MMDetection drops those of other names without a word."""
    missing = [name for name in classes if name not in theirs]
    if missing:
        raise SetupError(
            f'{ann_file} lacks {len(missing)} classes of the config, such as {", ".join(missing[:5])}; it has '
            f'{", ".join(theirs[:5])}.', 'Set metainfo=dict(classes=...) of the data set to its own names, and num_classes '
            'of the heads to their number')


def check_categories(dataset: Dataset) -> None:
    """:func:`check_classes` of a data set that is built, for those who train without our tools."""
    for part in _parts(dataset):
        classes = part.metainfo.get('classes', ())
        if len(getattr(part, 'cat_ids', classes)) != len(classes):
            check_classes(part.ann_file, classes, [category['name'] for category in load(part.ann_file)['categories']])


def check_images(dataset: Dataset) -> None:
    """Have every image checked as it is loaded, by a :class:`CheckedLoading` around the first step of the pipelines."""
    for part in _parts(dataset):
        steps = getattr(getattr(part, 'pipeline', None), 'transforms', [])
        steps[:] = [CheckedLoading(step) if isinstance(step, LoadImageFromFile) else step for step in steps]


class CheckedLoading:
    """Loads an image, and refuses one that cannot be read, or whose size is not the annotated one, by its name."""

    def __init__(self, load: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]):
        self.load = load

    def __call__(self, results: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        path = results['img_path']
        try:
            loaded = self.load(results)
        except Exception as error:  # each decoder has its own
            reason = ' '.join(str(error).replace(f': {path}', '').split())
            raise SetupError(f'{path} cannot be read as an image: {reason:.200}',
                             'Put an intact one there, or take it out of the annotations') from None
        annotated = results.get('height'), results.get('width')
        if loaded is not None and None not in annotated and annotated != loaded['ori_shape']:
            (height, width), (rows, columns) = annotated, loaded['ori_shape']
            raise SetupError(f'{path} is {columns}x{rows} pixels large, but annotated as {width}x{height}',
                             'Put the image there that was annotated, or correct its annotations')
        return loaded


def _used_images(path: str, filter_cfg: Dict[str, Any], classes: Sequence[str],
                 content: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The images that MMDetection keeps."""
    wanted = {category['id'] for category in content['categories'] if category['name'] in classes}
    annotated = {a['image_id'] for a in content['annotations'] if a['category_id'] in wanted}
    images, min_size = content['images'], filter_cfg.get('min_size', 0)
    large = [image for image in images if min(image['width'], image['height']) >= min_size]
    usable = [image for image in large if image['id'] in annotated]
    if not usable:
        raise SetupError(
            f'{path} has no annotation to use: it has {len(images)} images, {len(images) - len(large)} of them smaller than '
            f'filter_cfg.min_size={min_size}, and {len(annotated)} with annotations of the classes',
            'Give annotations, or check the classes and the filter_cfg of the data set')
    return usable if filter_cfg.get('filter_empty_gt') else large


def _check_files(ann_file: str, folder: str, names: List[str]) -> None:
    if '://' in folder:
        return
    listing = functools.cache(lambda path: set(os.listdir(path)) if osp.isdir(path) else set())
    missing = [name for name in names
               if osp.basename(name) not in listing(osp.dirname(osp.join(folder, name)))]
    if missing:
        raise SetupError(
            f'{len(missing)} of {len(names)} images of {ann_file} are missing, the first is {osp.join(folder, missing[0])}',
            'Put them there, say where they are with data_prefix=dict(img=FOLDER), or take them out of the annotations')


def _parts(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets that read files, below any wrappers."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from _parts(part)
    elif hasattr(dataset, 'dataset'):
        yield from _parts(dataset.dataset)
    else:
        yield dataset
