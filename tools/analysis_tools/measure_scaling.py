#!/usr/bin/env python
"""Throughput and losses of trainings on one GPU and on several: measure_scaling.py [--gpus N] [--steps N].

Runs tools/dist_train.sh at full size on data/digits (make_digits_coco.py), from random backbone weights, one training
after the other. Times and losses are those of the training's own log, one line a step; the first steps do not count.
"""
import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any, Dict, List

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine.cli import load_config

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope

CONFIG = 'configs/mask-rcnn_convnextv2-b_{}.py'
SKIPPED = 20  # steps in which kernels are compiled and workers start
SMOOTHED = 10  # steps of a point of the loss curve


def random_weights(path: Path) -> None:
    """A backbone's initial weights, as a checkpoint in the layout of the pretrained ones."""
    cfg = load_config(CONFIG.format('full'))
    cfg.model.backbone.pop('init_cfg')
    torch.manual_seed(0)
    backbone = MODELS.build(cfg.model.backbone)
    torch.save({f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()
                if not name.startswith('norm')}, path)


def train(name: str, gpus: int, batch: int, steps: int, out: Path) -> List[Dict[str, float]]:
    """The log of a training, an entry a step."""
    work_dir = out / f'{name}_{gpus}x{batch}'
    digits = load_config('configs/digits/mask-rcnn_convnextv2-mini_full_digits.py')
    cfg = load_config(CONFIG.format(name), {
        'data_root': 'data/digits',
        'model.backbone.init_cfg.checkpoint': str(out / 'random.pth'),
        'model.roi_head.bbox_head.num_classes': 10,
        'model.roi_head.mask_head.num_classes': 10,
        'train_dataloader.dataset.metainfo': digits.train_dataloader.dataset.metainfo.to_dict(),
        'train_dataloader.dataset.indices': steps * batch * gpus,
        'train_dataloader.batch_size': batch,
        'train_cfg.max_epochs': 1,
        'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None,
        'param_scheduler.0.end': SKIPPED,
        'default_hooks.logger.interval': 1,
        'log_processor.window_size': 1,
        'randomness.seed': 0
    })
    config = out / f'{work_dir.name}.py'
    cfg.dump(config)
    with open(out / f'{work_dir.name}.log', 'w') as log:
        subprocess.run(['tools/dist_train.sh', config, str(gpus), '--work-dir', work_dir], check=True, stdout=log,
                       stderr=log, env=dict(os.environ, PORT=str(29600 + gpus)))
    scalars = max(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
    return [entry for entry in map(json.loads, scalars) if 'time' in entry]


def row(name: str, gpus: int, batch: int, log: List[Dict[str, float]]) -> Dict[str, Any]:
    timed = log[SKIPPED:]
    low, median, high = statistics.quantiles([entry['time'] for entry in timed], n=4)
    data = statistics.median(entry['data_time'] for entry in timed)
    return dict(config=name, gpus=gpus, batch=batch, ms=1000 * median, low=1000 * low, high=1000 * high,
                data_ms=1000 * data, images_a_second=gpus * batch / median,
                memory_mib=max(entry['memory'] for entry in log), losses=[entry['loss'] for entry in log])


def draw(rows: List[Dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout='constrained')
    for one in rows:
        smooth = np.convolve(one['losses'], np.ones(SMOOTHED) / SMOOTHED, 'valid')
        axes.plot(np.arange(len(smooth)) + SMOOTHED, smooth, label=f'{one["gpus"]} x {one["batch"]} images')
    axes.set(xlabel='step', ylabel=f'loss (mean of {SMOOTHED} steps)')
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description='Throughput and losses on one GPU and on several')
    parser.add_argument('--configs', nargs='+', default=['liera_r16', 'full'], metavar='NAME', help='configs/..._NAME.py')
    parser.add_argument('--gpus', type=int, default=torch.cuda.device_count(), help='to compare with one; default: all')
    parser.add_argument('--batch', type=int, default=4, help='images of each GPU')
    parser.add_argument('--steps', type=int, default=140)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/scaling'), help='folder of the trainings and figures')
    args = parser.parse_args()
    if args.gpus < 2 or args.batch % args.gpus:
        parser.error('--gpus must be at least 2, and divide --batch for the comparison of losses')
    args.out.mkdir(parents=True, exist_ok=True)
    init_default_scope('mmdet')
    random_weights(args.out / 'random.pth')
    first, *others = [[(name, gpus, args.batch) for gpus in (1, args.gpus)] for name in args.configs]
    settings = [first[0], (args.configs[0], args.gpus, args.batch // args.gpus), *first[1:], *sum(others, [])]
    rows = []
    for name, gpus, batch in settings:
        rows.append(row(name, gpus, batch, train(name, gpus, batch, args.steps, args.out)))
        one = rows[-1]
        alone = next(other for other in rows if other['config'] == name)
        print(f'{name:12} {gpus} x {batch} images: {one["ms"]:6.1f} ms a step ({one["low"]:.1f}-{one["high"]:.1f}), '
              f'{one["data_ms"]:.1f} of them for data, {one["images_a_second"]:6.1f} images/s, '
              f'{one["images_a_second"] / alone["images_a_second"]:.2f} x', flush=True)
        (args.out / 'scaling.json').write_text(json.dumps(rows, indent=1))
    draw([rows[0], rows[1]], args.out / 'losses.png')


if __name__ == '__main__':
    main()
