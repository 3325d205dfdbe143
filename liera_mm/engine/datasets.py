"""What the data sets of a config, and those that are built from it, are made of."""
import inspect
import os.path as osp
from typing import Any, Dict, Iterator, List, Optional, Sequence, Type

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.dataset import BaseDataset
from torch.utils.data import Dataset

from ..core.errors import SetupError
from .class_names import check_class_list

IMAGES = 100  # that are looked at before a training, where looking at all would take long


def datasets_of(wrapper: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """The data sets that read files, in a dataloader or below wrappers of data sets."""
    for part in (wrapper.get('dataset'), *(wrapper.get('datasets') or ())):
        if isinstance(part, dict):
            yield from datasets_of(part) if 'dataset' in part or 'datasets' in part else [part]


def dataset_class(dataset: Dict[str, Any]) -> Optional[Type[Dataset]]:
    """The class of a data set's config, if it is one of MMDetection or of the user."""
    kind = dataset.get('type')
    return kind if inspect.isclass(kind) else DATASETS.get(kind) if isinstance(kind, str) else None


def reads_coco(cls: Type[Dataset]) -> bool:
    """Whether a data set reads annotations in COCO's format in a way that is known here: one of MMDetection's, or heir."""
    return issubclass(cls, CocoDataset) and cls.load_data_list.__module__.startswith('mmdet.')


def reads_voc(cls: Type[Dataset]) -> bool:
    """Whether a data set reads annotations in Pascal VOC's layout as MMDetection does."""
    return issubclass(cls, XMLDataset) and all(getattr(cls, name) is getattr(XMLDataset, name) for name in (
        'load_data_list', 'parse_data_info', '_parse_instance_info'))


def classes_of(split: str, dataset: Dict[str, Any], cls: Type[BaseDataset]) -> Sequence[str]:
    """The names of a data set's classes by its config.

    Raises:
        SetupError: If it has no list of them.
    """
    metainfo = dict(dataset.get('metainfo') or {})
    if 'CLASSES' in metainfo:  # of MMDetection 2
        raise SetupError(f'metainfo of the {split} data set has CLASSES, which is not read: its classes would be those of '
                         f'{cls.__name__}', 'Call it classes')
    names = metainfo.get('classes')
    if isinstance(names, str) and not osp.isfile(names):
        check_class_list(names)
    return cls._load_metainfo(metainfo).get('classes')


def category_names(cls: Type[Dataset], categories: Sequence[Dict[str, Any]]) -> List[str]:
    """Names of categories, in the order in which a data set of that class numbers them."""
    by_id = 'Objects365' in cls.__name__
    return [category['name'] for category in (sorted(categories, key=lambda entry: entry['id']) if by_id else categories)]


def parts_of(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets that read files, below any wrappers."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from parts_of(part)
    elif hasattr(dataset, 'dataset'):
        yield from parts_of(dataset.dataset)
    else:
        yield dataset


def steps_of(dataset: Dataset) -> List[Any]:
    """The steps of its pipeline."""
    return list(getattr(getattr(dataset, 'pipeline', None), 'transforms', []))


def some_of(images: Sequence[Any]) -> Sequence[Any]:
    """Some of all images, from first to last."""
    return images[::len(images) // IMAGES + 1]


def listed(names: Sequence[Any]) -> str:
    """The first of them, for messages."""
    return ', '.join(map(str, names[:5])) + (f' and {len(names) - 5} more' if len(names) > 5 else '')
