#!/usr/bin/env python
"""Train detectors of MMDetection with README's one edit, briefly: tools/analysis_tools/train_detectors.py [NAME ...].

Each takes a few steps of two images at MMDetection's full size and a validation run, from a ResNet-50 of random weights, on
a data set in COCO's layout (``make data/digits``). Every training is a process of its own, and those that fail go a second
time alone, with CUDA_LAUNCH_BLOCKING=1, so that the error is where it is raised. Prints a table; OUT has configs and logs.
"""
import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict

import torch
from torchvision.models import resnet50

DETECTORS = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'Deformable-DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'Mask2Former': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'Faster-R-CNN-DCNv2': 'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
}
TRAIN = Path(__file__).parents[1] / 'train.py'
CONFIG = '''_base_ = 'mmdet::{config}'
custom_imports = dict(imports=['liera_mm'])
model = dict(backbone=dict(_delete_=True, type='LieRABackbone', backbone={{{{_base_.model.backbone}}}}, liera=dict(rank=8)))
custom_hooks = [dict(type='LieRAHook')]
auto_classes = True
randomness = dict(seed=0)
train_dataloader = dict(batch_size=2, num_workers=1)
val_dataloader = dict(num_workers=1, dataset=dict(indices={images}))
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={steps}, val_interval={steps})
log_processor = dict(by_epoch=False, window_size=1)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(by_epoch=False, interval={steps}))
'''
# Of ten digits and no object
MASK2FORMER = "model['panoptic_head'] = dict(loss_cls=dict(class_weight=[1.0] * 10 + [0.1]))\n"


def train(name: str, args: argparse.Namespace, blocking: bool) -> Dict[str, object]:
    """A training in a process of its own: its losses, seconds of its steps, peak MiB, metrics, and what went wrong."""
    work_dir = args.out / (f'{name}_blocking' if blocking else name)
    shutil.rmtree(work_dir, ignore_errors=True)
    config = work_dir.with_suffix('.py')
    config.write_text(CONFIG.format(config=DETECTORS[name], images=args.images, steps=args.steps)
                      + MASK2FORMER * (name == 'Mask2Former'))
    command = [sys.executable, TRAIN, config, '--work-dir', work_dir,
               '--cfg-options', f'data_root={args.data}/',
               f'model.backbone.backbone.init_cfg.checkpoint={args.out / "resnet50.pth"}']
    with open(work_dir.with_suffix('.log'), 'w') as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=args.timeout,
                                  env={**os.environ, **({'CUDA_LAUNCH_BLOCKING': '1'} if blocking else {})}).returncode
        except subprocess.TimeoutExpired:
            code = f'more than {args.timeout:g} s'
    scalars = [json.loads(line) for path in work_dir.glob('*/vis_data/scalars.json')
               for line in path.read_text().splitlines()]
    steps = [row for row in scalars if 'loss' in row]
    validations = [row for row in scalars if 'time' in row and 'loss' not in row]
    metrics = {metric: value for row in validations for metric, value in row.items() if metric.endswith('_mAP')}
    done = code == 0 and len(steps) == args.steps and validations
    return dict(name=work_dir.name, losses=[row['loss'] for row in steps], seconds=[row['time'] for row in steps],
                memory=max((row.get('memory', 0) for row in steps), default=0), metrics=metrics,
                error=None if done else f'{code}: {last_error(work_dir.with_suffix(".log").read_text())}')


def last_error(log: str) -> str:
    """The last line of a log that names an exception, else its last two lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.match(r'[\w.]*(Error|Exception)\b', line)), '; '.join(lines[-2:]))


def line(row: Dict[str, object]) -> str:
    """A training as a row of Markdown."""
    losses = ', '.join(f'{loss:.2f}' for loss in row['losses'][::max(1, len(row['losses']) - 1)])
    time = f'{1000 * statistics.median(row["seconds"]):.0f}' if row['seconds'] else ''
    found = ', '.join(f'{metric} {value:.3f}' for metric, value in row['metrics'].items()) or 'done, no detections'
    return f'| {row["name"]} | {len(row["losses"])} | {losses} | {time} | {row["memory"]} | {row["error"] or found} |'


def main() -> None:
    parser = argparse.ArgumentParser(description="Train detectors of MMDetection with README's one edit, briefly")
    parser.add_argument('names', nargs='*', default=list(DETECTORS), help=f'of {", ".join(DETECTORS)}; all by default')
    parser.add_argument('--data', type=Path, default='data/digits', help="data set of ten classes in COCO's layout")
    parser.add_argument('--out', type=Path, default='work_dirs/detectors', help='folder for configs and logs')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--images', type=int, default=20, help='how many to validate on')
    parser.add_argument('--jobs', type=int, default=1, help='trainings at a time')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for a training')
    args = parser.parse_args()
    args.data, args.out = args.data.absolute(), args.out.absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(resnet50().state_dict(), args.out / 'resnet50.pth')
    print('| detector | steps | loss, first and last | median ms a step | peak MiB | validation |')
    print('| --- ' * 6 + '|', flush=True)
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(lambda name: train(name, args, False), args.names):
            print(line(row), flush=True)
            failed += [row['name']] if row['error'] else []
    for name in failed:
        print(line(train(name, args, True)), flush=True)


if __name__ == '__main__':
    main()
