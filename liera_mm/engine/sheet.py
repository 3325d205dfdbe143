"""A picture of predictions beside the ground truth, for tools/demo.py and tools/analysis_tools/study.py."""
import pickle
from pathlib import Path
from typing import Optional

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
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    tiles = [np.pad(tile, ((0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0)), constant_values=255)
             for tile in tiles]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % min(columns, len(tiles)))
    columns = min(columns, len(tiles))
    rows = [np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)]
    mmcv.imwrite(np.concatenate(rows)[..., ::-1], str(out))
