#!/usr/bin/env python
"""Make the weights that ship with the package, from a world of printed glyphs. Two stages, each run by name:

1. ``dense``: backbone and neck learn to classify every pixel, on one GPU in about five minutes.
2. ``detector``: the whole detector learns on the same images; its weights are written in half precision.
"""
import argparse
import os
import subprocess
import sys
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from pycocotools.coco import COCO
from safetensors.torch import save_file
from torch import Tensor, nn

from liera_mm.engine.safe_loading import read_checkpoint

CONFIG = 'configs/digits/mask-rcnn_convnextv2-mini_pretrain_glyphs.py'
DATA = Path('data/glyphs')
WORK_DIR = Path('work_dirs/mask-rcnn_convnextv2-mini_pretrain_glyphs')
WEIGHTS = Path('liera_mm/weights/mask-rcnn_convnextv2-mini_glyphs.safetensors')
CLASSIFIER = 'roi_head.bbox_head.fc_cls.'  # it knows glyphs, which the digits config has no use for
CLASSES = 30
BACKGROUND_WEIGHT = 0.2


def make_data(train: int, val: int) -> None:
    subprocess.run([
        sys.executable, 'tools/dataset_converters/make_digits_coco.py', str(DATA), '--world', 'glyphs', '--train',
        str(train), '--val', str(val), '--workers', str(os.cpu_count())
    ], check=True)


def read_image(job: Tuple[str, list, list]) -> Tuple[np.ndarray, np.ndarray]:
    """One image, (3, H, W) uint8, and the class of every pixel, (H, W) uint8: 0 is background, 255 a crowd."""
    path, categories, masks = job
    image = cv2.imread(path)[..., ::-1]
    labels = np.zeros(image.shape[:2], np.uint8)
    for category, mask in zip(categories, masks):
        starts = np.cumsum(mask['counts'])
        flat = np.zeros(labels.size, bool)
        for begin, end in zip(starts[::2], starts[1::2]):  # uncompressed RLE: runs of 0 and 1 in turn, column by column
            flat[begin:end] = True
        labels[flat.reshape(labels.shape, order='F')] = category
    return image.transpose(2, 0, 1), labels


def load(split: str, device: str) -> Tuple[Tensor, Tensor]:
    """A whole split in device memory: images (N, 3, H, W) and pixel classes (N, H, W), both uint8."""
    coco = COCO(str(DATA / f'annotations/instances_{split}2017.json'))
    jobs = []
    for info in coco.dataset['images']:
        annotations = coco.imgToAnns[info['id']]
        jobs.append((str(DATA / f'{split}2017' / info['file_name']),
                     [255 if a['iscrowd'] else a['category_id'] for a in annotations],
                     [a['segmentation'] for a in annotations]))
    with Pool() as pool:
        images, labels = zip(*pool.map(read_image, jobs, chunksize=64))
    return torch.from_numpy(np.stack(images)).to(device), torch.from_numpy(np.stack(labels)).to(device)


def augment(images: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
    """Random scale, shift and colours of a batch: images (N, 3, H, W) float, labels (N, H, W) int64."""
    n, device = len(images), images.device
    scale = torch.exp((torch.rand(n, device=device) - 0.5) * 0.8)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = (torch.rand(n, 2, device=device) - 0.5) * 0.6
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, padding_mode='reflection', align_corners=False)
    labels = F.grid_sample(labels[:, None].float(), grid, mode='nearest', padding_mode='reflection', align_corners=False)
    gain = 1 + (torch.rand(n, 3, 1, 1, device=device) - 0.5) * 0.8
    offset = (torch.rand(n, 3, 1, 1, device=device) - 0.5) * 80
    return (images * gain + offset).clamp(0, 255), labels[:, 0].long()


def dense_loss(maps: Tuple[Tensor, ...], labels: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean cross-entropy over the levels, and the finest level's accuracy on glyph pixels."""
    weight = torch.ones(CLASSES + 1, device=labels.device)
    weight[0] = BACKGROUND_WEIGHT
    losses = []
    for level in maps:
        target = F.interpolate(labels[:, None].float(), level.shape[-2:], mode='nearest')[:, 0].long()
        losses.append(F.cross_entropy(level.float(), target, weight, ignore_index=255))
        if level is maps[0]:
            glyph = (target > 0) & (target < 255)
            accuracy = (level.argmax(1) == target)[glyph].float().mean()
    return torch.stack(losses).mean(), accuracy


def dense(steps: int, batch: int) -> None:
    """Stage 1; writes WORK_DIR/dense.pth with the keys of the detector."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG).model
    backbone, neck, preprocessor = (MODELS.build(cfg[part]) for part in ('backbone', 'neck', 'data_preprocessor'))
    backbone.init_weights()
    neck.init_weights()
    heads = nn.ModuleList(nn.Conv2d(cfg.neck.out_channels, CLASSES + 1, 1) for _ in range(cfg.neck.num_outs))
    model = nn.ModuleDict(dict(backbone=backbone, neck=neck, heads=heads)).to(device, memory_format=torch.channels_last)
    mean, std = preprocessor.mean.to(device), preprocessor.std.to(device)

    def forward(images: Tensor) -> Tuple[Tensor, ...]:
        x = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            return tuple(head(level) for head, level in zip(heads, neck(backbone(x))))

    images, labels = load('train', device)
    val_images, val_labels = load('val', device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        index = torch.randint(len(images), (batch, ), device=device)
        batch_images, batch_labels = augment(images[index].float(), labels[index])
        loss, accuracy = dense_loss(forward(batch_images), batch_labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            pace = (time.time() - start) / (step + 1)
            print(f'step {step + 1}/{steps}  eta {pace * (steps - step - 1):.0f} s  loss {loss:.3f}  '
                  f'glyph pixels {accuracy:.3f}', flush=True)
    model.eval()
    with torch.no_grad():
        _, accuracy = dense_loss(forward(val_images[:batch].float()), val_labels[:batch].long())
    print(f'validation: glyph pixels {accuracy:.3f}')
    WORK_DIR.mkdir(parents=True, exist_ok=True)
    state = {key: value.cpu() for key, value in model.state_dict().items() if not key.startswith('heads.')}
    torch.save(dict(state_dict=state), WORK_DIR / 'dense.pth')


def detector() -> None:
    """Stage 2; writes WEIGHTS."""
    subprocess.run([
        sys.executable, '-u', 'tools/train.py', CONFIG, '--work-dir', str(WORK_DIR), '--cfg-options',
        f'load_from={WORK_DIR / "dense.pth"}'
    ], check=True)
    checkpoint = read_checkpoint((WORK_DIR / 'last_checkpoint').read_text(), 'cpu')
    state = {k: v.half() for k, v in checkpoint['state_dict'].items() if not k.startswith(CLASSIFIER)}
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(state, WEIGHTS)
    print(f'{WEIGHTS}: {WEIGHTS.stat().st_size / 2**20:.2f} MiB')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('stages', nargs='*', default=['dense', 'detector'], help='dense, detector; default: both')
    parser.add_argument('--steps', type=int, default=4000, help='training steps of stage 1')
    parser.add_argument('--batch', type=int, default=128, help='images a step in stage 1')
    parser.add_argument('--train', type=int, default=16000, help='images to make')
    args = parser.parse_args()
    make_data(args.train, 300)
    if 'dense' in args.stages:
        dense(args.steps, args.batch)
    if 'detector' in args.stages:
        detector()


if __name__ == '__main__':
    main()
