"""Checks of data sets: of their files before a training, of what is built from them, and of images as they are read."""
import functools
import inspect
import os
import os.path as osp
import re
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Type

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import (
    BaseDetDataset,
    CocoDataset,
    CocoPanopticDataset,
    LVISV05Dataset,
    LVISV1Dataset,
    Objects365V2Dataset,
)
from mmdet.registry import DATASETS
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..core.errors import SetupError
from . import annotations as coco

IMAGES = 100  # that are looked at before a training, where looking at all would take long
ORIENTATION = 0x0112  # the tag in EXIF
PARSED: Dict[str, Dict[str, Any]] = {}
"""Content of annotation files that were checked, for the data sets that are built next; by path."""


# Before anything is built


def dataset_class(dataset: Dict[str, Any]) -> Optional[Type[Dataset]]:
    """The class of a data set's config, if it is one of MMDetection or of the user."""
    kind = dataset.get('type')
    return kind if inspect.isclass(kind) else DATASETS.get(kind) if isinstance(kind, str) else None


def reads_coco(cls: Type[Dataset]) -> bool:
    """Whether a data set reads annotations in COCO's format in a way that is known here: one of MMDetection's, or heir."""
    return issubclass(cls, CocoDataset) and cls.load_data_list.__module__.startswith('mmdet.')


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
        coco.check_class_list(names)
    return cls._load_metainfo(metainfo).get('classes')


@coco.without_garbage_collection()
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
    unlabelled = split == 'test' or any(_is(step, 'LoadEmptyAnnotations') for step in pipeline)
    given = isinstance(content, dict) and content.get('annotations') or not unlabelled
    coco.check_lists(path, content, ['images', 'categories'] + ['annotations'] * bool(given))
    images, categories = content['images'], content['categories']
    coco.check_images(path, images, 'coco_url' if issubclass(cls, LVISV1Dataset) else 'file_name')
    coco.check_categories(path, categories)
    classes = classes_of(split, dataset, cls)
    if not issubclass(cls, LVISV05Dataset):  # which takes all categories, whatever the classes are
        ordered = sorted(categories, key=lambda category: category['id']) if 'Objects365' in cls.__name__ else categories
        coco.check_classes(path, classes, [category['name'] for category in ordered])

    filter_cfg = dataset.get('filter_cfg') or {} if split == 'train' and not dataset.get('test_mode') else {}
    min_size = filter_cfg.get('min_size', 0)
    if given:
        annotated = dict(content)
        if issubclass(cls, CocoPanopticDataset):
            annotated['annotations'] = coco.segments(path, content['annotations'])
        boxes = coco.check_annotations(path, annotated, classes, cls.ANN_ID_UNIQUE)
        masks = not issubclass(cls, CocoPanopticDataset) and any(
            _is(step, 'LoadAnnotations') and step.get('with_mask') for step in pipeline)
        if masks:
            kept = coco.usable(boxes)['kept']
            coco.check_masks(path, [a for a, keeps in zip(boxes.entries, kept) if keeps])
        if not unlabelled or split == 'test':
            coco.check_usable(path, annotated, boxes, masks, min_size)
        if filter_cfg.get('filter_empty_gt'):
            used = {a['image_id'] for a, wanted in zip(boxes.entries, boxes.wanted) if wanted}
            images = [image for image in images if image['id'] in used]
    images = [image for image in images if min(image['width'], image['height']) >= min_size]
    by_file_name = not issubclass(cls, (LVISV05Dataset, Objects365V2Dataset))
    if by_file_name and not dataset.get('backend_args') and '://' not in root:
        folder = osp.join(root, (dataset.get('data_prefix') or {}).get('img') or '')
        _check_files(path, folder, [image['file_name'] for image in images])
        loaders = [step for step in pipeline if _is(step, 'LoadImageFromFile')]
        if loaders:
            _check_sizes(folder, images, loaders[0])
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
            with coco.without_garbage_collection():
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs


def _is(step: Dict[str, Any], name: str) -> bool:
    """Whether a step of a pipeline's config is of that class."""
    kind = step.get('type')
    return (kind.__name__ if inspect.isclass(kind) else str(kind).rpartition('.')[2]) == name


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


def _check_sizes(folder: str, images: Sequence[Dict[str, Any]], loader: Dict[str, Any]) -> None:
    """Compare the size of some images with the annotated one; :class:`CheckedLoading` does it for all as they are read."""
    turns = _turns(loader.get('color_type', 'color'), loader.get('imdecode_backend', 'cv2'))
    for image in _sample(images):
        path = osp.join(folder, image['file_name'])
        stored = _stored_size(path)
        if stored and turns is not None:
            (width, height), orientation = stored
            read = (height, width) if turns and orientation in range(5, 9) else (width, height)
            _check_size(path, (image['width'], image['height']), read)


def _turns(color_type: str, backend: Optional[str]) -> Optional[bool]:
    """Whether images are turned as their EXIF data say when they are read; None if that is not known."""
    known = (backend or 'cv2') in ('cv2', 'pillow')
    return not (color_type == 'unchanged' or color_type.endswith('ignore_orientation')) if known else None


def _stored_size(path: str) -> Optional[Tuple[Tuple[int, int], int]]:
    """Width and height of an image file, and its orientation; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size, image.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError):
        return None


def _check_size(path: str, annotated: Tuple[int, int], read: Tuple[int, int]) -> None:
    """Raise a SetupError if an image that was read is not as large as annotated; say if EXIF is why."""
    if annotated == read:
        return
    stored = _stored_size(path)
    is_large = f'{path} is {read[0]}x{read[1]} pixels large, but annotated as {annotated[0]}x{annotated[1]}'
    if stored and stored[1] in range(5, 9) and annotated == read[::-1]:
        if read == stored[0]:
            raise SetupError(f'{is_large}: as if turned as its EXIF orientation, {stored[1]}, says',
                             "Have it turned: color_type='color' of LoadImageFromFile in the pipelines")
        raise SetupError(
            f'{is_large}: as it is stored, before it is turned as its EXIF orientation, {stored[1]}, says',
            "Have it read as stored: color_type='color_ignore_orientation' of LoadImageFromFile in the pipelines; or "
            'correct the annotations')
    raise SetupError(is_large, 'Put the image there that was annotated, or correct its annotations')


# What was built


@HOOKS.register_module()
class DataChecks(Hook):
    """Checks data sets, heads and evaluators against each other before a training or test, and images as they are read.

    ``LieRAHook`` registers it, and the tools do.
    """

    def before_train(self, runner: Runner) -> None:
        check_dataset('train', runner.train_dataloader, runner.model)
        check_masks_of_heads(runner.train_dataloader.dataset, runner.model)
        if runner.val_loop is not None:
            self._check_evaluation(runner, 'val', runner.val_dataloader, runner.val_evaluator)
            check_same_classes(runner.train_dataloader.dataset, runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):
            self._check_evaluation(runner, 'val', runner.val_dataloader, runner.val_evaluator)

    def before_test(self, runner: Runner) -> None:
        self._check_evaluation(runner, 'test', runner.test_dataloader, runner.test_evaluator)

    @staticmethod
    def _check_evaluation(runner: Runner, split: str, dataloader: DataLoader, evaluator: Evaluator) -> None:
        check_dataset(split, dataloader, runner.model)
        check_evaluator(split, dataloader.dataset, evaluator, runner.model, runner.cfg.get(f'{split}_evaluator'))


def check_dataset(split: str, dataloader: DataLoader, model: nn.Module) -> None:
    """Check the data sets of a dataloader, for those who train without our tools; have their images checked.

    Raises:
        SetupError: If annotations lack classes, or heads have another number; or, but for testing, if nothing is left of
            the annotations.
    """
    dataset = dataloader.dataset
    check_categories(dataset)
    check_heads(model, dataset)
    if split != 'test':
        check_instances(split, dataset)
    check_images(dataset)


def check_categories(dataset: Dataset) -> None:
    """Raise a SetupError if the annotation file of a data set lacks classes of it."""
    for part in _parts(dataset):
        classes = part.metainfo.get('classes') or ()
        coco.check_class_list(classes)
        if len(getattr(part, 'cat_ids', classes)) != len(classes) and not isinstance(part, LVISV05Dataset):
            categories = coco.read_json(part.ann_file)['categories']
            coco.check_classes(part.ann_file, classes, [category['name'] for category in categories])


def check_instances(split: str, dataset: Dataset) -> None:
    """Raise a SetupError if no image of the data sets has a box to learn from. It looks at them up to the first that has."""
    parts = [part for part in _parts(dataset) if isinstance(part, BaseDetDataset)]
    images = 0
    for part in parts:
        for index in range(len(part)):
            info = part.get_data_info(index)
            if 'instances' not in info:
                return  # of a task of its own
            images += 1
            if any(_is_usable(instance, info) for instance in info['instances']) or info.get('segments_info'):
                return
    if parts and len(parts) == len([*_parts(dataset)]):
        part = parts[0]
        raise SetupError(
            f'The {split} data set has nothing to learn from: {images} images are left of {part.ann_file}, and none has a '
            f'box in it that has an area and is of {_list(part.metainfo.get("classes") or ())}',
            'Give annotations of the classes, in pixels of their image; or check classes and filter_cfg of the data set')


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Raise a SetupError if one trains on other classes than one validates on, or in another order."""
    ours, theirs = (next(_parts(dataset)).metainfo.get('classes') for dataset in (train, val))
    if ours and theirs and tuple(ours) != tuple(theirs):
        raise SetupError(
            f'The train data set has the classes {_list(ours)}, the val data set {_list(theirs)}',
            'Give all data sets the same metainfo=dict(classes=...), in the same order')


def check_heads(model: nn.Module, dataset: Dataset) -> None:
    """Check that every head of a detector predicts the classes of a data set.

    Raises:
        SetupError: If one has another number of them; names all that have.
    """
    metainfo = next(_parts(dataset)).metainfo
    wrong = wrong_heads(model, metainfo)
    if wrong:
        name, (given, count) = next(iter(wrong.items()))
        names = metainfo['stuff_classes'] if 'stuff' in name else metainfo.get('thing_classes') or metainfo['classes']
        raise SetupError(
            f'{name} is {given}, but the data have {count} classes: {_list(names)}' + (
                f'. Nor do {len(wrong) - 1} other heads fit' if len(wrong) > 1 else ''),
            '--cfg-options ' + ' '.join(f'model.{name}={count}' for name, (_, count) in wrong.items())
            + ' gives the heads the classes of the data; or else correct metainfo=dict(classes=...) of the data sets')


def wrong_heads(model: nn.Module, metainfo: Dict[str, Any]) -> Dict[str, Tuple[int, int]]:
    """Heads of a detector that predict another number of classes: by name, that number and the one of the classes.

    Raises:
        SetupError: If the classes of a loss have other weights than there are classes.
    """
    from mmdet.models import RPN, FusedSemanticHead  # late, for its import takes seconds
    detector = _detector(model)
    if not metainfo.get('classes') or detector is None or isinstance(detector, RPN) or hasattr(detector, 'language_model'):
        return {}
    things = metainfo.get('thing_classes') or metainfo['classes']
    stuff = metainfo.get('stuff_classes')
    wrong = {}
    for name, module in detector.named_modules():
        parts = name.split('.')
        if {'backbone', 'neck', 'rpn_head'} & {*parts} or isinstance(module, FusedSemanticHead):
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
    from mmdet.models import TwoStageDetector
    detector = _detector(model)
    steps = [step for part in _parts(dataset) for step in _steps(part)]
    loads = [step for step in steps if hasattr(step, 'with_mask')]
    if isinstance(detector, TwoStageDetector) and detector.with_mask and loads and not any(s.with_mask for s in loads):
        raise SetupError('The model has a mask head, but the train data set loads no masks',
                         "Write dict(type='LoadAnnotations', with_bbox=True, with_mask=True) in its pipeline, or set "
                         'model.roi_head.mask_head=None')


def check_evaluator(split: str, dataset: Dataset, evaluator: Evaluator, model: nn.Module, cfg: Any = None) -> None:
    """Check that the metrics of an evaluator are of the images of a data set, and have what they will ask for.

    Raises:
        SetupError: If one has not.
    """
    from mmdet.evaluation import CocoMetric, LVISMetric, MultiDatasetsEvaluator, VOCMetric  # late, for its import warns
    parts = [*_parts(dataset)]
    metrics = list(getattr(evaluator, 'metrics', ()))
    settings = cfg.get('metrics', cfg) if isinstance(cfg, dict) else cfg
    settings = settings if isinstance(settings, (list, tuple)) else [settings]
    for index, metric in enumerate(metrics):
        its_parts = parts[index:index + 1] if isinstance(evaluator, MultiDatasetsEvaluator) else parts
        its_cfg = settings[index] if index < len(settings) and isinstance(settings[index], dict) else {}
        if not all(isinstance(part, BaseDetDataset) for part in its_parts):
            continue
        if isinstance(metric, VOCMetric) and not any('LoadAnnotations' in type(s).__name__ for s in _steps(its_parts[0])):
            raise SetupError(f'VOCMetric has no boxes to evaluate with: the pipeline of the {split} data set loads none',
                             "Add dict(type='LoadAnnotations', with_bbox=True) to it, before PackDetInputs")
        if isinstance(metric, CocoMetric) and not isinstance(metric, LVISMetric) and not metric.format_only:
            _check_coco_metric(split, metric, its_cfg.get('ann_file'), its_parts, model)


def _check_coco_metric(split: str, metric: BaseMetric, ann_file: Optional[str], parts: Sequence[BaseDetDataset],
                       model: nn.Module) -> None:
    detector, segm = _detector(model), 'segm' in metric.metrics
    if segm and type(detector).__module__.startswith('mmdet.') and not any(
            'mask' in name or 'panoptic' in name for name, _ in detector.named_modules()):
        raise SetupError(f"metric='segm' of the {split} evaluator asks for masks, and the model predicts none",
                         f"Take it out: {split}_evaluator.metric='bbox'")
    if metric._coco_api is None:
        packs = [step.meta_keys for step in _steps(parts[0]) if hasattr(step, 'meta_keys')]
        if packs and 'instances' not in packs[-1]:
            raise SetupError(
                f'The {split} evaluator has no ann_file, and the data set does not hand on its annotations',
                f'Say which annotations it evaluates with: {split}_evaluator.ann_file={parts[0].ann_file}')
        return
    path = ann_file or f'The annotation file of the {split} evaluator'
    api = metric._coco_api
    remedy = f'Give it the annotations of its data set: --cfg-options {split}_evaluator.ann_file={parts[0].ann_file}'
    infos = [part.get_data_info(index) for part in parts for index in range(len(part))]
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
            for info in _sample([info for info in infos if info['instances']])
            for boxes in [_corners(api.imgToAnns.get(info['img_id'], ()))]]
    if same and sum(same) < len(same) / 2:
        raise SetupError(
            f'{path}, of the evaluator, is of other images: {len(same) - sum(same)} of {len(same)} with the ids of the '
            f'{split} data set have none of the boxes that they have there', remedy)
    classes = parts[0].metainfo['classes']
    coco.check_lists(path, api.dataset, ['categories', 'annotations'])
    coco.check_classes(path, classes, [category['name'] for category in api.dataset['categories']])
    coco.check_ground_truth(path, api.dataset, classes, {info['img_id'] for info in infos}, segm)


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
        annotated = results.get('width'), results.get('height')
        if loaded is not None and None not in annotated:
            _check_size(path, annotated, tuple(loaded['ori_shape'][::-1]))
        return loaded


def _is_usable(instance: Dict[str, Any], info: Dict[str, Any]) -> bool:
    x1, y1, x2, y2 = instance.get('bbox', (0, 0, 1, 1))
    inside = x1 < info.get('width', x2) and y1 < info.get('height', y2) and x2 > 0 and y2 > 0
    return not instance.get('ignore_flag') and x2 > x1 and y2 > y1 and inside


def _detector(model: nn.Module) -> Optional[nn.Module]:
    """The detector in a model and its wrappers."""
    from mmdet.models import BaseDetector
    return next((module for module in model.modules() if isinstance(module, BaseDetector)), None)


def _steps(dataset: Dataset) -> List[Any]:
    return list(getattr(getattr(dataset, 'pipeline', None), 'transforms', []))


def _sample(images: Sequence[Any]) -> Sequence[Any]:
    """Some of all images, from first to last."""
    return images[::len(images) // IMAGES + 1]


def _corners(annotations: Sequence[Dict[str, Any]]) -> np.ndarray:
    """Boxes in COCO's format as (N, 4) of x1, y1, x2, y2."""
    boxes = [a['bbox'] for a in annotations if len(a.get('bbox') or ()) == 4]
    return np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], float).reshape(-1, 4)


def _stem(path: str) -> str:
    return osp.splitext(osp.basename(path))[0]


def _list(names: Sequence[Any]) -> str:
    return ', '.join(map(str, names[:5])) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def _parts(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets that read files, below any wrappers."""
    if hasattr(dataset, 'datasets'):
        for part in dataset.datasets:
            yield from _parts(part)
    elif hasattr(dataset, 'dataset'):
        yield from _parts(dataset.dataset)
    else:
        yield dataset
