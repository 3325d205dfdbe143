"""Checks of annotations in COCO's format as a file has them: what MMDetection and pycocotools would fail on, or lose.

They take whole columns at a time: on COCO's 118,000 images to train on, less time than reading the file does.
"""
import contextlib
import itertools
import json
import operator
from collections import Counter
from typing import Any, Dict, List, NamedTuple, Sequence, Set, Type

import numpy as np

from ..core.errors import SetupError
from .class_names import check_class_list, check_spaces, nearest
from .masks import are_finite, is_mask, pixels_of, polygons_of, runs_fit

NUMBER, ID, FLAG = {int, float}, {int, float, str}, {int, float, bool, type(None)}
SAMPLE = 1000  # annotations whose polygons are looked at
HOW_TO_GIVE = {
    'id': 'Give each a number of its own',
    'image_id': 'Give each the id of its image',
    'category_id': 'Give each the id of its category',
    'bbox': 'Give each its bbox=[x, y, width, height] in pixels, of its segmentation for instance',
    'area': 'Give each its area in pixels, of its segmentation or its bbox',
    'height': 'Give each its height in pixels',
    'width': 'Give each its width in pixels',
    'iscrowd': 'Give each iscrowd=0, or 1 if its mask is that of a crowd',
    'ignore': 'Give each ignore=0, or 1 if it is to be left out',
    'segmentation': 'Give each its mask: polygons of at least three points, or run lengths',
}


def read_json(path: str) -> Any:
    """The contents of a JSON file.

    Raises:
        SetupError: If it is none.
    """
    try:
        with open(path, 'rb') as file:
            return json.loads(file.read().decode())
    except IsADirectoryError:
        raise SetupError(f'{path} is a folder, and no file of annotations', 'Give the path of the file') from None
    except ValueError as error:
        raise SetupError(f'{path} is no JSON file in UTF-8, or a damaged one: {error}',
                         'Put an intact one there, in UTF-8 without a byte order mark') from None


def check_lists(path: str, content: Any, names: Sequence[str]) -> None:
    """Raise a SetupError unless a file's content has lists of dicts of those names."""
    lacking = [name for name in names if not isinstance(content, dict) or not isinstance(content.get(name), list)
               or set(map(type, content[name])) - {dict}]
    if lacking:
        raise SetupError(f'{path} has no list of {", ".join(lacking)}',
                         "Give annotations in COCO's format for object detection, or the type of data set that yours have")


def column(path: str, what: str, entries: Sequence[Dict[str, Any]], key: str, types: Set[Type]) -> List[Any]:
    """The values of a key in all entries of a list of the file.

    Raises:
        SetupError: If one of them lacks it, or has a value of another type.
    """
    values = [entry.get(key) for entry in entries]
    if set(map(type, values)) <= types:
        return values
    wrong = [entry for entry, value in zip(entries, values) if type(value) not in types]
    first, remedy = wrong[0], HOW_TO_GIVE.get(key, f'Give each its {key}')
    of = f'{len(wrong)} of {len(entries)} {what} of {path}'
    if key in first:
        key_with_article = f'{"an" if key[0] in "aei" else "a"} {key}'
        raise SetupError(f'{of} have {key_with_article} that cannot be used, the first is {first[key]!r:.80} '
                         f'({_name(first)})', remedy)
    raise SetupError(f'{of} have no {key}, the first is that with {_name(first)}', remedy)


def columns(path: str, what: str, entries: Sequence[Dict[str, Any]], types: Dict[str, Set[Type]]) -> List[List[Any]]:
    """The values of at least two keys, as :func:`column` gives those of one.

    All are taken at once: most of the time goes into fetching each of a million entries from memory.
    """
    with contextlib.suppress(KeyError):
        values = list(itertools.chain.from_iterable(map(operator.itemgetter(*types), entries)))
        found = [values[start::len(types)] for start in range(len(types))]
        if all(set(map(type, taken)) <= allowed for taken, allowed in zip(found, types.values())):
            return found
    return [column(path, what, entries, key, allowed) for key, allowed in types.items()]


def check_unique(path: str, what: str, values: Sequence[Any], remedy: str) -> None:
    """Raise a SetupError if a value is there twice."""
    twice = [value for value, count in Counter(values).items() if count > 1] if len(set(values)) < len(values) else []
    if twice:
        raise SetupError(f'{path} has {len(twice)} {what} that several share, such as {twice[0]!r}: all but one of each '
                         'would be lost', remedy)


def check_categories(path: str, categories: Sequence[Dict[str, Any]]) -> None:
    """Raise a SetupError if a category has no name, or no id of its own."""
    column(path, 'categories', categories, 'name', {str})
    ids = column(path, 'categories', categories, 'id', ID)
    check_unique(path, 'ids of categories', ids, 'Give every category an id of its own')


def check_classes(path: str, classes: Sequence[str], theirs: Sequence[str]) -> None:
    """Raise a SetupError unless annotations have the classes of a config, in that order.

    MMDetection drops those of other names without a word, and numbers the others in the order that the file has them.
    """
    check_class_list(classes)
    missing = [name for name in classes if name not in theirs]
    if missing:
        meant = next(((near, name) for name in missing if (near := nearest(name, theirs))), None)
        raise SetupError(
            f'{path} lacks {len(missing)} classes of the config, such as {", ".join(map(str, missing[:5]))}; it has '
            f'{", ".join(map(str, theirs[:5]))}' + (f'. Did you mean {meant[0]!r} by {meant[1]!r}?' if meant else ''),
            'Set metainfo=dict(classes=...) of the data set to its own names, and num_classes of the heads to their number')
    ordered = [name for name in theirs if name in set(classes)]
    check_unique('The config', 'names of classes', classes, 'Give each class a name of its own')
    check_unique(path, 'names of categories', ordered, 'Give each category a name of its own')
    if ordered != list(classes):
        raise SetupError(
            f'{path} has its categories in another order than the config has its classes: {", ".join(ordered[:5])} there, '
            f'{", ".join(classes[:5])} here. They would be numbered in the first order and named in the second',
            f'Set metainfo=dict(classes=...) of the data sets to the order of the file: {tuple(ordered[:20])}'
            + ' ...' * (len(ordered) > 20))


class Boxes(NamedTuple):
    """The annotations that MMDetection looks at, as arrays of (N,): of images that are there, and without ``ignore``."""
    entries: List[Dict[str, Any]]
    xywh: np.ndarray  # (N, 4)
    area: np.ndarray
    image: np.ndarray  # index of the image
    size: np.ndarray  # (N, 2): width and height of the image
    wanted: np.ndarray  # of a category that is one of the classes
    crowd: np.ndarray


def check_images(path: str, images: Sequence[Dict[str, Any]], name: str = 'file_name') -> None:
    """Check the list of images; ``name`` is the key of what they are called.

    Raises:
        SetupError: If one lacks what MMDetection needs, or the id of another.
    """
    ids = column(path, 'images', images, 'id', ID)
    check_unique(path, 'ids of images', ids, 'Give every image an id of its own, and its annotations that image_id')
    column(path, 'images', images, name, {str})
    for key in ('height', 'width'):
        column(path, 'images', images, key, NUMBER)


def check_annotations(path: str, content: Dict[str, Any], classes: Sequence[str], unique: bool = True) -> Boxes:
    """Check the list of annotations, and that they are of the images and categories of the file.

    Args:
        path: The file, for messages.
        content: Its content: ``images`` that :func:`check_images` has seen, ``categories`` and ``annotations``.
        classes: Names of the categories to use.
        unique: Whether ids of annotations must be unique, as they need not be for panoptic segmentation.

    Raises:
        SetupError: If one lacks what MMDetection needs, or is of a category that is not there; if boxes are no boxes in
            pixels.
    """
    images, annotations = content['images'], content['annotations']
    ids, of_image, of_category = columns(path, 'annotations', annotations, dict(id=ID, image_id=ID, category_id=ID))
    if unique:
        check_unique(path, 'ids of annotations', ids, 'Give every annotation an id of its own')
    image = _indices(path, 'image', of_image, images)
    category = _indices(path, 'category', of_category, content['categories'])
    if (category < 0).any():
        strange = list(itertools.compress(annotations, category < 0))
        raise SetupError(
            f'{len(strange)} of {len(annotations)} annotations of {path} have a category_id that no category has, the first '
            f'is {strange[0]["category_id"]!r} ({_name(strange[0])}): they would be lost',
            f'Correct them, or list the category: there are {", ".join(repr(c["id"]) for c in content["categories"][:10])}')
    counts = np.bincount(category, minlength=len(content['categories'])).tolist()
    check_spaces(path, classes, dict(zip((entry['name'] for entry in content['categories']), counts)))
    used = (image >= 0) & ~np.array(column(path, 'annotations', annotations, 'ignore', FLAG), bool)
    entries, image, category = list(itertools.compress(annotations, used)), image[used], category[used]
    rows, areas = columns(path, 'annotations', entries, dict(bbox={list}, area=NUMBER))
    sides = itertools.chain.from_iterable
    well_formed = set(map(len, rows)) <= {4} and set(map(type, sides(rows))) <= NUMBER
    xywh = np.fromiter(sides(rows) if well_formed else (), float).reshape(-1, 4)
    if not (well_formed and np.isfinite(xywh).all()):
        wrong = next(a for a in entries if len(a['bbox']) != 4 or set(map(type, a['bbox'])) - NUMBER
                     or not np.isfinite(a['bbox']).all())
        raise SetupError(f'{path} has a bbox that is none: {wrong["bbox"]!r:.80} ({_name(wrong)})', HOW_TO_GIVE['bbox'])
    boxes = Boxes(
        entries,
        xywh,
        np.array(areas, float),
        image,
        np.array([(image['width'], image['height']) for image in images], float).reshape(-1, 2)[image],
        np.array([category['name'] in set(classes) for category in content['categories']], bool)[category],
        np.array(column(path, 'annotations', entries, 'iscrowd', FLAG), bool))
    _check_pixels(path, boxes)
    return boxes


def segments(path: str, annotations: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The segments of annotations for panoptic segmentation, each with its ``image_id``, as if they were annotations."""
    of_image = column(path, 'annotations', annotations, 'image_id', ID)
    lists = column(path, 'annotations', annotations, 'segments_info', {list})
    return [dict(segment, image_id=image_id) for image_id, entries in zip(of_image, lists) for segment in entries]


def check_masks(path: str, entries: Sequence[Dict[str, Any]], sizes: Sequence[Sequence[float]], least: int = 0) -> None:
    """Check the masks of annotations of images of these sizes, (width, height) each; ``least`` numbers a polygon.

    Raises:
        SetupError: If one has no segmentation at all, one that is neither of its two kinds, or run lengths that cannot be
            decoded, or not to the size of the image.
    """
    lacking = [a for a in entries if not (mask := a.get('segmentation')) or not (
        {'counts', 'size'} <= mask.keys() if isinstance(mask, dict) else
        isinstance(mask, list) and all(type(part) is list and len(part) >= least and are_finite(part) for part in mask))]
    if lacking:
        raise SetupError(
            f'{len(lacking)} of {len(entries)} annotations of {path} have no segmentation that can be read, and the config '
            f'asks for masks; the first is that with {_name(lacking[0])}',
            f'{HOW_TO_GIVE["segmentation"]}. Or train boxes alone: a model without mask heads, with_mask=False in the '
            "pipelines, and metric='bbox' of the evaluators")
    runs = [(a, *size) for a, size in zip(entries, sizes) if isinstance(a['segmentation'], dict)]
    wrong = [each for each in runs if not runs_fit(each[0]['segmentation'], *each[1:])]
    if wrong:
        first, width, height = wrong[0]
        size, pixels = first['segmentation']['size'], pixels_of(first['segmentation']['counts'])
        raise SetupError(
            f'{len(wrong)} of {len(runs)} masks of run lengths of {path} are not of the size of their image; the first, of '
            f'the annotation with {_name(first)} in an image of {width:g}x{height:g}, has size={size!r:.40} and '
            + ('unreadable counts' if pixels is None else f'counts of {pixels} pixels'),
            'Give size=[height, width], and counts as pycocotools.mask.encode does, or as a list of run lengths')


def usable(boxes: Boxes, masks: bool = False) -> Dict[str, np.ndarray]:
    """Which boxes MMDetection keeps to learn from, ``kept``, and why it drops the others, each as an array of (N,)."""
    x, y, w, h = boxes.xywh.T
    width, height = boxes.size.T
    empty = (boxes.area <= 0) | (w < 1) | (h < 1)
    outside = (np.minimum(x + w, width) <= np.maximum(x, 0)) | (np.minimum(y + h, height) <= np.maximum(y, 0))
    shapeless = np.array([not is_mask(a.get('segmentation')) for a in boxes.entries] if masks else np.zeros(len(x)), bool)
    reasons = {'of other classes': ~boxes.wanted, 'smaller than a pixel or of area 0': empty,
               'outside their image': outside, 'of crowds': boxes.crowd, 'without a mask that can be used': shapeless}
    left, found = np.ones(len(x), bool), {}
    for reason, dropped in reasons.items():
        found[reason] = left & dropped
        left = left & ~dropped
    return {'kept': left, **found}


def check_usable(path: str, content: Dict[str, Any], boxes: Boxes, masks: bool, min_size: float) -> None:
    """Raise a SetupError if no annotation is left to learn from, or to evaluate with; say why.

    Args:
        path: The file, for messages.
        content: Its content.
        boxes: Of :func:`check_annotations`.
        masks: Whether an annotation needs a mask.
        min_size: Images of less height or width are not used.
    """
    kept = usable(boxes)['kept'] & (boxes.size.min(1, initial=np.inf) >= min_size)
    if any(not masks or is_mask(boxes.entries[index].get('segmentation')) for index in np.flatnonzero(kept)):
        return
    found = usable(boxes, masks)
    del found['kept']
    images, annotations = content['images'], content['annotations']
    small = sum(min(image['width'], image['height']) < min_size for image in images)
    counts = {reason: int(dropped.sum()) for reason, dropped in found.items()}
    counts['to ignore'] = sum(bool(a.get('ignore')) for a in annotations)
    counts['of images that it has not'] = len(annotations) - len(boxes.entries) - counts['to ignore']
    reasons = ', '.join(f'{count} {reason}' for reason, count in counts.items() if count > 0)
    outside = np.flatnonzero(found['outside their image'])[:1]
    example = ''.join(f' (such as {boxes.entries[i]["bbox"]} in {boxes.size[i, 0]:g}x{boxes.size[i, 1]:g})' for i in outside)
    raise SetupError(
        f'{path} has no annotation to use: it has {len(images)} images, {small} of them smaller than '
        f'filter_cfg.min_size={min_size}, and {len(annotations)} annotations' + f': {reasons}{example}' * bool(reasons),
        'Give annotations of the classes, with bbox=[x, y, width, height] in pixels of their image; or check the classes '
        'and the filter_cfg of the data set')


def check_ground_truth(path: str, content: Dict[str, Any], classes: Sequence[str], images: Set[Any], masks: bool) -> None:
    """Check the annotations that pycocotools evaluates with: those of the classes, in those images.

    Raises:
        SetupError: If one lacks what it needs.
    """
    wanted = {category['id'] for category in content['categories'] if category['name'] in set(classes)}
    entries = [a for a in content.get('annotations', ()) if a['category_id'] in wanted and a['image_id'] in images]
    column(path, 'annotations', entries, 'bbox', {list})
    column(path, 'annotations', entries, 'area', NUMBER)
    column(path, 'annotations', entries, 'iscrowd', {int, bool})
    if masks:
        sizes = {image['id']: (image.get('width') or 0, image.get('height') or 0) for image in content['images']}
        check_masks(path, entries, [sizes[a['image_id']] for a in entries], least=5)  # it takes four for a box


def _indices(path: str, what: str, ids: Sequence[Any], entries: Sequence[Dict[str, Any]]) -> np.ndarray:
    """For each of (N,) ids, the index of the image or category that has it, or -1.

    Raises:
        SetupError: If ids would match, were they not text in one place and numbers in the other.
    """
    where = {entry['id']: index for index, entry in enumerate(entries)}
    indices = np.fromiter(map(where.get, ids, itertools.repeat(-1)), int, len(ids))
    mistaken = next((value for value in itertools.compress(ids, indices < 0) if _other_type(value) in where), None)
    if mistaken is not None:
        kinds = ('text', 'a number') if isinstance(mistaken, str) else ('a number', 'text')
        plural = dict(image='images', category='categories')[what]
        raise SetupError(
            f'Annotations of {path} would be lost: they have {kinds[0]} for {what}_id, such as {mistaken!r}, where its '
            f'{plural} have {kinds[1]} for id, {_other_type(mistaken)!r}', 'Make both numbers, or both text')
    return indices


def _other_type(value: Any) -> Any:
    if not isinstance(value, str):
        return str(value)
    try:
        return int(value)
    except ValueError:
        return value


def _check_pixels(path: str, boxes: Boxes) -> None:
    """Raise a SetupError if most boxes are fractions of their image, or are corners and seen to be."""
    large = boxes.wanted & (boxes.size.min(1, initial=np.inf) > 1)
    xywh, size, count = boxes.xywh[large], boxes.size[large], int(large.sum())
    if not count:
        return
    bbox = boxes.entries[np.flatnonzero(large)[0]]['bbox']
    fractions = ((xywh >= 0) & (xywh <= 1)).all(1) & (xywh % 1 > 0).any(1)
    if fractions.mean() > .1:
        raise SetupError(
            f'{fractions.mean():.0%} of the boxes of {path} lie between 0 and 1, the first is {bbox}: they are normalised, '
            'not in pixels',
            'Multiply x and width by the width of the image, y and height by its height; and give area in pixels')
    x, y, w, h = xywh.T
    width, height = size.T
    beyond = (x + w > 1.02 * width + 1) | (y + h > 1.02 * height + 1)
    if _look_like_corners(boxes, large, beyond):
        raise SetupError(
            f'The boxes of {path} look like corners, [x1, y1, x2, y2]; the first is {bbox} in an image of {width[0]:g}x'
            f'{height[0]:g}. Read as [x, y, width, height], {beyond.mean():.0%} of them reach beyond their image',
            "In COCO's format bbox is [x, y, width, height]: write [x1, y1, x2 - x1, y2 - y1]")


def _look_like_corners(boxes: Boxes, chosen: np.ndarray, beyond: np.ndarray) -> bool:
    """Whether a bbox is where its polygons are if it gives corners, not if it gives a corner and a size.

    Without polygons: whether nearly all could be corners in their image, but as sizes many reach beyond it, or do not agree
    with the area.
    """
    indices = np.flatnonzero(chosen)
    as_corners = as_sizes = 0
    for index in indices[::max(1, len(indices) // SAMPLE)]:
        polygons = polygons_of(boxes.entries[index].get('segmentation'))
        if polygons:
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
            ends = np.concatenate([points.min(0), points.max(0)])
            bbox = boxes.xywh[index]
            as_corners += np.abs(ends - bbox).max() <= 2
            as_sizes += np.abs(ends - bbox - [0, 0, *bbox[:2]]).max() <= 2
    if as_corners + as_sizes:
        return as_corners > as_sizes
    x, y, w, h = boxes.xywh[chosen].T
    width, height = boxes.size[chosen].T
    corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
    area = (w - x) * (h - y)
    by_area = (x + y > 0) & (np.abs(boxes.area[chosen] - area) <= .01 * area)
    return corners.mean() > .95 and (beyond.mean() > .25 or len(x) >= 5 and by_area.mean() > .5)


def _name(entry: Dict[str, Any]) -> str:
    """What one finds an entry by."""
    key = next((key for key in ('id', 'file_name', 'image_id', 'name') if key in entry), None)
    return f'{key} {entry[key]!r}' if key else f'the keys {", ".join(entry)}'
