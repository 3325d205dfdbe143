#!/usr/bin/env python
"""Train the digits detector with LieRA and with a frozen backbone, test both, and show what came out.

Needs data/digits (tools/make_digits_coco.py). Writes demo/sheet.png, ground truth beside predictions, and prints a table.
"""
import pickle
import subprocess
from pathlib import Path
from typing import Any, Dict

import liera_mm  # before MMDetection, which may need the operators that liera_mm stands in for

# isort: split
import cv2
import mmcv
import numpy as np
import torch
from digits_table import CONFIG, last_checkpoint, test_command, test_metrics, train_command
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData
from pycocotools import mask as rle
from pycocotools.coco import COCO

CONFIGS = dict(LieRA=CONFIG.format('liera'), frozen=CONFIG.format('frozen'))
OUT = Path('demo')


def train_and_test(config: str, work_dir: Path) -> Dict[str, Any]:
    """Run the two tools on one config; returns a row of the table, with the test's own metrics."""
    subprocess.run(train_command(config, work_dir), check=True)
    subprocess.run(test_command(config, work_dir, '--out', str(work_dir / 'predictions.pkl')), check=True)
    metrics = test_metrics(work_dir)
    counts = liera_mm.summary(MODELS.build(Config.fromfile(config).model))
    return dict(
        trainable=counts.trainable,
        total=counts.total,
        checkpoint_mib=last_checkpoint(work_dir).stat().st_size / 2**20,
        bbox=metrics['coco/bbox_mAP'],
        segm=metrics['coco/segm_mAP'])


def to_sample(boxes: np.ndarray, labels: list, masks: np.ndarray, scores: np.ndarray, zoom: int) -> InstanceData:
    """Instances of an image enlarged by ``zoom``: boxes (n, 4) in xyxy pixels, masks (n, h, w)."""
    masks = masks.repeat(zoom, 1).repeat(zoom, 2)
    return InstanceData(
        bboxes=torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) * zoom,
        labels=torch.as_tensor(labels, dtype=torch.long),
        masks=BitmapMasks(masks, *masks.shape[1:]),
        scores=torch.as_tensor(scores))


def draw_sheet(predictions: Path, data_root: Path, out: Path, images: int = 9, columns: int = 3, zoom: int = 3) -> None:
    """Write one picture of validation images, ground truth left and predictions above a score of 0.5 right of it."""
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
        sample = DetDataSample(
            gt_instances=to_sample(
                np.array([[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in truth)]),
                [label_of[a['category_id']] for a in truth],
                np.stack([coco.annToMask(a) for a in truth] or [np.zeros(shape, np.uint8)])[:len(truth)],
                np.ones(len(truth)), zoom),
            pred_instances=to_sample(
                found['bboxes'][keep], found['labels'][keep],
                np.stack([rle.decode(found['masks'][i]) for i in keep] or [np.zeros(shape, np.uint8)])[:len(keep)],
                found['scores'][keep], zoom))
        visualizer.add_datasample('', image, sample, pred_score_thr=0.5)
        tile = np.pad(visualizer.get_image(), ((36, 8), (0, 16), (0, 0)), constant_values=255)
        for left, text in ((0, 'ground truth'), (image.shape[1], 'predictions')):
            cv2.putText(tile, text, (left + 4, 27), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 2, cv2.LINE_AA)
        tiles.append(tile)
    rows = [np.concatenate(tiles[i:i + columns], axis=1) for i in range(0, len(tiles), columns)]
    mmcv.imwrite(np.concatenate(rows)[..., ::-1], str(out))


def main() -> None:
    init_default_scope('mmdet')
    rows = {name: train_and_test(config, OUT / name) for name, config in CONFIGS.items()}
    draw_sheet(OUT / 'LieRA/predictions.pkl', Path('data/digits'), OUT / 'sheet.png')
    print(f'\n{"backbone":10}{"trainable":>12}{"total":>12}{"checkpoint":>14}{"bbox mAP":>10}{"segm mAP":>10}')
    for name, row in rows.items():
        print(f'{name:10}{row["trainable"]:12,}{row["total"]:12,}{row["checkpoint_mib"]:10.1f} MiB'
              f'{row["bbox"]:10.3f}{row["segm"]:10.3f}')
    print(f'\nGround truth and predictions, side by side: {OUT / "sheet.png"}')


if __name__ == '__main__':
    main()
