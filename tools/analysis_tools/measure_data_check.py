#!/usr/bin/env python
"""What the checks of annotations cost on a file of the size of COCO's to train on, beside reading it: for the docs.

measure_data_check.py [--checks-only]: writes the file, of random boxes and polygons, to a temporary folder; reads no images.
"""
import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Dict
from unittest.mock import patch

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine import annotations as coco
from liera_mm.engine.data_files import check_coco
from liera_mm.engine.files import without_garbage_collection

# isort: split
import numpy as np
from mmdet.datasets import CocoDataset

PIPELINE = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]


def coco_like(images: int, annotations: int, points: int = 22) -> Dict[str, Any]:
    """Annotations in COCO's format: images of 640x480 with boxes, and polygons of that many points in them."""
    rng = np.random.default_rng(0)
    names = CocoDataset.METAINFO['classes']
    wh = rng.uniform(8, 200, (annotations, 2))
    xy = rng.uniform(0, [640, 480] - wh)
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) / 2 + .5
    polygons = np.round(xy[:, None] + circle * wh[:, None], 2).reshape(annotations, -1)
    boxes = np.concatenate([xy, wh], 1).round(2)
    return dict(
        images=[dict(id=i, file_name=f'{i:012}.jpg', width=640, height=480) for i in range(1, images + 1)],
        categories=[dict(id=i, name=name) for i, name in enumerate(names, 1)],
        annotations=[dict(id=i + 1, image_id=int(image), category_id=int(category), iscrowd=0, bbox=box.tolist(),
                          area=float(box[2] * box[3] * .78), segmentation=[polygon.tolist()])
                     for i, (image, category, box, polygon) in enumerate(zip(
                         rng.integers(1, images + 1, annotations), rng.integers(1, len(names) + 1, annotations), boxes,
                         polygons))])


def cost(function, *args, **kwargs) -> str:
    """Seconds that a call took, by the clock and of the processor: the first are more where others work beside it."""
    start = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        function(*args, **kwargs)
    return f'{time.perf_counter() - start[0]:6.1f} s, {time.process_time() - start[1]:.1f} s of the processor'


def main() -> None:
    parser = argparse.ArgumentParser(description='Time the checks of annotations on a file as large as COCO\'s')
    parser.add_argument('--checks-only', action='store_true', help='do not build MMDetection\'s CocoDataset beside them')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'instances.json'
        path.write_text(json.dumps(coco_like(118_000, 860_000)))
        print(f'{path.stat().st_size / 2**20:.0f} MiB')
        dataset = dict(ann_file=str(path), data_prefix=dict(img='train2017/'))
        config = dict(dataset, type='CocoDataset', pipeline=PIPELINE, backend_args=dict(backend='local'))  # of no images
        if not args.checks_only:
            print('CocoDataset alone         ', cost(CocoDataset, **dataset))
        with without_garbage_collection():
            print('reading the JSON file     ', cost(coco.read_json, str(path)))
            content = coco.read_json(str(path))
            with patch.object(coco, 'read_json', lambda path: content):
                print('checking it               ', cost(check_coco, 'train', config, keep=True))
        if not args.checks_only:
            print('CocoDataset, handed over  ', cost(CocoDataset, **dataset))


if __name__ == '__main__':
    main()
