"""Pictures of ground truth, alone or beside predictions."""
import pickle
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import liera_mm  # noqa: F401  (before MMDetection, which may need the operators that liera_mm stands in for)

# isort: split
import cv2
import mmcv
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from pycocotools import mask as rle
from pycocotools.coco import COCO

from .masks import is_mask, polygons_of, runs_fit


def to_sample(boxes: np.ndarray, labels: list, zoom: int, masks: Optional[np.ndarray],
              scores: Optional[np.ndarray] = None) -> InstanceData:
    """Instances of an image enlarged by ``zoom``: boxes (n, 4) in xyxy pixels, masks (n, h, w)."""
    sample = InstanceData(
        bboxes=torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) * zoom,
        labels=torch.as_tensor(labels, dtype=torch.long))
    if scores is not None:
        sample.scores = torch.as_tensor(scores)
    if masks is not None:
        masks = masks.repeat(zoom, 1).repeat(zoom, 2)
        sample.masks = BitmapMasks(masks, *masks.shape[1:])
    return sample


def draw_sheet(predictions: Path, data_root: Path, out: Path, images: int = 9, columns: int = 3, zoom: int = 3) -> None:
    """Write one picture of validation images, ground truth left and predictions above a score of 0.5 right of it.

    Args:
        predictions: File of ``tools/test.py --out``, with masks or without.
        data_root: Folder of the data set, in the layout of COCO 2017.
        out: File to write.
        images: How many, the first of the file.
        columns: How many pairs stand beside each other.
        zoom: Whole number by which images are enlarged.
    """
    coco = COCO(str(data_root / 'annotations/instances_val2017.json'))
    visualizer = DetLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dict(classes=[c['name'] for c in coco.dataset['categories']], palette='coco')
    label_of = {category: label for label, category in enumerate(sorted(coco.cats))}
    tiles = []
    for prediction in pickle.loads(predictions.read_bytes())[:images]:
        info = coco.imgs[prediction['img_id']]
        image = mmcv.imread(data_root / 'val2017' / info['file_name'], channel_order='rgb')
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        shape = (info['height'], info['width'])
        truth = [a for a in coco.imgToAnns[info['id']] if not a['iscrowd']]
        found = prediction['pred_instances']
        keep = (found['scores'] > 0.5).nonzero().flatten().tolist()
        masks = [None, None]
        if 'masks' in found:
            parts = [coco.annToMask(a) for a in truth], [rle.decode(found['masks'][i]) for i in keep]
            masks = [np.stack(part or [np.zeros(shape, np.uint8)])[:len(part)] for part in parts]
        sample = DetDataSample(
            gt_instances=to_sample(
                np.array([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in truth)]),
                [label_of[a['category_id']] for a in truth], zoom, masks[0]),
            pred_instances=to_sample(
                found['bboxes'][keep], found['labels'][keep], zoom, masks[1], found['scores'][keep]))
        visualizer.add_datasample('', image, sample, pred_score_thr=0.5)
        tile = np.pad(visualizer.get_image(), ((36, 8), (0, 16), (0, 0)), constant_values=255)
        for left, text in ((0, 'ground truth'), (image.shape[1], 'predictions')):
            cv2.putText(tile, text, (left + 4, 27), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 2, cv2.LINE_AA)
        tiles.append(tile)
    mmcv.imwrite(arrange(tiles, columns)[..., ::-1], str(out))


def arrange(tiles: List[np.ndarray], columns: int) -> np.ndarray:
    """Images of (h, w, 3) in rows of so many, as one image; white where they are smaller than the largest."""
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    tiles = [np.pad(tile, ((0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0)), constant_values=255)
             for tile in tiles]
    columns = min(columns, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows)


def draw_annotations(images: Sequence[Dict[str, Any]], paths: Sequence[str], annotations: Sequence[Sequence[Dict[str, Any]]],
                     labels: Dict[Any, int], classes: Sequence[str], out: Path, columns: int = 3, side: int = 640) -> None:
    """Write one picture of images with the boxes and masks that they are annotated with, crowds in grey.

    Args:
        images: Their entries in COCO's format.
        paths: Their files.
        annotations: Those of each image.
        labels: Index of the class by id of the category; others are left out.
        classes: Names of the classes.
        out: File to write.
        columns: How many images stand beside each other.
        side: Longer side of each, in pixels.
    """
    visualizer = DetLocalVisualizer(alpha=.4)
    visualizer.dataset_meta = dict(classes=list(classes), palette='coco' if len(classes) <= 80 else 'random')
    tiles = []
    for info, path, entries in zip(images, paths, annotations):
        image = mmcv.imread(path, channel_order='rgb')
        scale = side / max(image.shape[:2])
        image = mmcv.imrescale(image, scale)
        height, width = image.shape[:2]
        ours = [entry for entry in entries if entry['category_id'] in labels and not entry.get('iscrowd')]
        for entry in entries:
            if entry.get('iscrowd'):
                x, y, w, h = (round(value * scale) for value in entry['bbox'])
                cv2.rectangle(image, (x, y), (x + w, y + h), (128, 128, 128), 2)
        masks = np.stack([_mask(entry, info, (width, height)) for entry in ours] or [np.zeros((height, width), np.uint8)])
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (entry['bbox'] for entry in ours)]).reshape(-1, 4) * scale
        boxes = boxes.clip(0, np.tile([width - 1, height - 1], 2))  # the visualizer warns of what lies beyond
        instances = InstanceData(
            bboxes=torch.as_tensor(boxes, dtype=torch.float32),
            labels=torch.as_tensor([labels[entry['category_id']] for entry in ours], dtype=torch.long))
        if masks[:len(ours)].any():
            instances.masks = BitmapMasks(masks[:len(ours)], height, width)
        visualizer.add_datasample('', image, DetDataSample(gt_instances=instances), draw_pred=False)
        tile = np.pad(visualizer.get_image(), ((30, 6), (0, 8), (0, 0)), constant_values=255)
        cv2.putText(tile, Path(path).name, (4, 21), cv2.FONT_HERSHEY_SIMPLEX, .6, (0, 0, 0), 1, cv2.LINE_AA)
        tiles.append(tile)
    out.parent.mkdir(parents=True, exist_ok=True)
    mmcv.imwrite(arrange(tiles, columns)[..., ::-1], str(out))


def _mask(entry: Dict[str, Any], info: Dict[str, Any], size: Sequence[int]) -> np.ndarray:
    """The mask of an annotation (h, w) at another size of its image, (w, h); without any pixel if it has none."""
    segmentation = entry.get('segmentation')
    if isinstance(segmentation, list):
        segmentation = polygons_of(segmentation)
    undecodable = isinstance(segmentation, dict) and not (
        is_mask(segmentation) and runs_fit(segmentation, info['width'], info['height']))
    if not segmentation or not isinstance(segmentation, (list, dict)) or undecodable:
        return np.zeros(size[::-1], np.uint8)
    if isinstance(segmentation, list) or isinstance(segmentation['counts'], list):
        segmentation = rle.frPyObjects(segmentation, info['height'], info['width'])
    if isinstance(segmentation, list):
        segmentation = rle.merge(segmentation)
    return cv2.resize(rle.decode(segmentation), tuple(size), interpolation=cv2.INTER_NEAREST)
