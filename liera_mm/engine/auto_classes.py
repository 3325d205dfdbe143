"""``auto_classes = True`` in a config: its classes are the categories of its annotations."""
import os.path as osp
from typing import Any, Dict, Sequence, Tuple

from mmdet.datasets import CocoPanopticDataset
from mmengine.config import Config

from ..core.errors import SetupError
from . import annotations as coco
from .config_tree import dicts
from .datasets import category_names, dataset_class, datasets_of, listed, reads_coco

CLASS_AGNOSTIC = {'backbone', 'neck', 'rpn_head', 'semantic_head'}
"""Parts of a detector whose number of classes, if they have one, is not that of the objects."""
REMEDY = 'Or take auto_classes out of the config, and set metainfo=dict(classes=...) of the data sets and num_classes'


def fill_classes(cfg: Config) -> None:
    """Write the categories of the annotations into a config, in place, as the classes of all data sets and heads.

    They are those of the first annotation file that is there, of the data sets to train on, or else to validate or test
    on, in the order of the file. ``num_classes`` changes wherever ``model`` has it, but for class-agnostic parts.

    Raises:
        SetupError: If none of the files is there, one is not in COCO's format, or two to train and validate on have other
            categories.
    """
    files = {split: [annotation_file(split, dataset) for dataset in datasets_of(cfg.get(f'{split}_dataloader') or {})]
             for split in ('train', 'val', 'test')}
    known = [pair for pairs in files.values() for pair in pairs]
    there = [pair for pair in known if osp.isfile(pair[0])]
    if not there:
        raise SetupError(
            f'auto_classes reads the classes from the annotations, and there is no {known[0][0]}' if known else
            f'auto_classes reads the classes from the annotations, and {cfg.filename} has no data set',
            'Say where they are with --cfg-options data_root=FOLDER; or without the data, use the config in the work dir of '
            'a training, which has the classes in it')
    path, classes = there[0][0], read_categories(*there[0])
    for other in files['train'] + files['val']:
        if osp.isfile(other[0]):
            check_same(path, classes, other[0], read_categories(*other))
    for split in files:
        for dataset in datasets_of(cfg.get(f'{split}_dataloader') or {}):
            metainfo = dict(dataset.get('metainfo') or {}, classes=classes)
            if len(metainfo.get('palette') or classes) < len(classes):
                del metainfo['palette']
            dataset['metainfo'] = metainfo
    for key, node in dicts(cfg.get('model') or {}, 'model'):
        if not CLASS_AGNOSTIC & set(key.split('.')):
            node.update({name: len(classes) for name in ('num_classes', 'num_things_classes') if name in node})


def annotation_file(split: str, dataset: Dict[str, Any]) -> Tuple[str, type]:
    """Path of a data set's annotations, and its class.

    Raises:
        SetupError: If it reads no annotations of objects in COCO's format.
    """
    cls = dataset_class(dataset)
    if cls is None or not reads_coco(cls) or issubclass(cls, CocoPanopticDataset) or not dataset.get('ann_file'):
        raise SetupError(f'auto_classes reads the classes from annotations in COCO\'s format, and the {split} data set is a '
                         f'{dataset.get("type")} with ann_file={dataset.get("ann_file")!r}',
                         "Convert its annotations (tools/dataset_converters/to_coco.py) for a CocoDataset. " + REMEDY)
    return osp.join(dataset.get('data_root') or '', dataset['ann_file']), cls


def read_categories(path: str, cls: type) -> Tuple[str, ...]:
    """Names of the categories of an annotation file, in the order in which a data set of that class numbers them.

    Raises:
        SetupError: If it has none, or they have no names of their own.
    """
    content = coco.read_json(path)
    coco.check_lists(path, content, ['categories'])
    coco.check_categories(path, content['categories'])
    names = category_names(cls, content['categories'])
    if not names:
        raise SetupError(f'{path} has no categories, from which auto_classes reads the classes',
                         'Give each class its category: dict(id=1, name=...)')
    coco.check_unique(path, 'names of categories', names, 'Give each category a name of its own')
    return tuple(names)


def check_same(path: str, ours: Sequence[str], other: str, theirs: Sequence[str]) -> None:
    """Raise a SetupError if two annotation files have other categories, or another order of them."""
    if ours == theirs:
        return
    alone = {path: [name for name in ours if name not in theirs], other: [name for name in theirs if name not in ours]}
    only = [f'only {file} has {listed(names)}' for file, names in alone.items() if names]
    if not only:
        first = next(pair for pair in zip(ours, theirs) if len(set(pair)) > 1)
        only = [f'where the first has {first[0]}, the other has {first[1]}']
    raise SetupError(f'{path} and {other} have different categories, and auto_classes needs one list: {", ".join(only)}',
                     f'Give both files the same categories in the same order. {REMEDY}')
