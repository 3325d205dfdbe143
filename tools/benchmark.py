#!/usr/bin/env python
"""Time and memory of a training step of Mask R-CNN with ConvNeXt-V2, for ways to train its backbone.

All variants stay on the card, and take turns within one process: ratios between them are of one run, on one machine. Random
weights and synthetic images, boxes and masks; the config's optimizer and mixed precision.
"""
import argparse
import copy
import gc
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import liera_mm
from liera_mm.engine.cli import check_data, exit_clearly, load_config
from liera_mm.models import DeviceMaskPreprocessor, LieRAConvNeXt

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from mmcv.ops import sigmoid_focal_loss
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor, nn
from tqdm import tqdm, trange

from liera_mm.core.adapt import layer_kind
from liera_mm.core.algebra import factor_shapes
from liera_mm.engine.invariants import LossWatch

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/mask-rcnn_convnextv2-b_liera_r16.py'
PARTS = ('data', 'backbone', 'rest', 'backward', 'optimizer')
SWEEPS = dict(
    images=[1, 2, 4, 8], size=[512, 768, 1024, 1344], rank=[2, 8, 16, 32, 64], arch=['tiny', 'base', 'large', 'huge'])


# Of the kernels of the fast blocks: how often a training step passes a tensor of the block's width through memory, where
# the hidden one counts for four
PASSES = dict(
    _depthwise=5, _depthwise_weight_grad=2, _layer_norm=2, _layer_norm_grad=4, _gelu=16, _gelu_grad=12, _residual=3)


class LoralibLinear(nn.Module):
    """Microsoft's loralib on a linear layer: the update as a second branch."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.A = nn.Parameter(.01 * torch.randn(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T @ self.B.T) * self.scale


class LoralibConv(nn.Module):
    """Microsoft's loralib on a convolution: the update added to the weight, by plain autograd."""

    def __init__(self, layer: nn.Conv2d, rank: int, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        a, b = factor_shapes(layer.weight.shape, layer.groups, rank)
        self.A, self.B = nn.Parameter(.01 * torch.randn(a)), nn.Parameter(torch.zeros(b))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight + (self.B @ self.A).view(self.layer.weight.shape) * self.scale
        return self.layer._conv_forward(x, weight, self.layer.bias)


def loralib(backbone: nn.Module, rank: int) -> None:
    for name, layer in list(backbone.named_modules()):
        if layer_kind(layer):
            wrapper = LoralibLinear if isinstance(layer, nn.Linear) else LoralibConv
            parent, _, child = name.rpartition('.')
            setattr(backbone.get_submodule(parent), child, wrapper(layer, rank, 2.))


def hf_peft(backbone: nn.Module, rank: int) -> None:
    """LoRA of Hugging Face's PEFT on the layers that it takes; the others stay frozen."""
    from peft import LoraConfig, inject_adapter_in_model
    names = {name: layer_kind(layer) for name, layer in backbone.named_modules() if layer_kind(layer)}
    try:
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(names)), copy.deepcopy(backbone))
    except ValueError as error:
        print(f'PEFT refuses the depthwise convolutions, which stay frozen in its row: {error}')
        names = [name for name, kind in names.items() if kind != 'depthwise']
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names)), backbone)


@MODELS.register_module()
class PinnedMaskPreprocessor(DeviceMaskPreprocessor):
    """Copies the masks to pinned memory before they go to the device."""

    def pad_gt_masks(self, batch_data_samples: List[DetDataSample]) -> None:
        for sample in batch_data_samples:
            masks = sample.gt_instances.masks
            masks.masks = torch.from_numpy(masks.masks).pin_memory().numpy()
        super().pad_gt_masks(batch_data_samples)


# What our base config sets for speed, as MMDetection has it
UNDONE: Dict[str, Dict[str, Any]] = {
    'pageable': {'train_dataloader.pin_memory': False, 'model.data_preprocessor.non_blocking': False},
    'DetDataPreprocessor': {'model.data_preprocessor.type': 'DetDataPreprocessor'},
    'RandomSampler': {f'model.train_cfg.{stage}.sampler.type': 'RandomSampler' for stage in ('rpn', 'rcnn')},
    'AdamW not fused': {'optim_wrapper.optimizer.fused': None},
    '2 workers': {'train_dataloader.num_workers': 2},
}
STOCK = {key: value for options in UNDONE.values() for key, value in options.items()}

# The heads of liera_mm/models/device_heads.py
DEVICE_HEADS = {
    'model.rpn_head.type': 'DeviceRPNHead', 'model.rpn_head.padded': True, 'model.roi_head.type': 'DeviceRoIHead',
    'model.roi_head.bbox_roi_extractor.type': 'DeviceRoIExtractor',
    'model.roi_head.mask_roi_extractor.type': 'DeviceRoIExtractor',
}

# What each changes in the backbone's config. Beside that: its update rule, whether all of it trains, what replaces its
# layers, other options of the config, and whether the loss is looked at as LieRAHook does (watched).
VARIANTS: Dict[str, Dict[str, Any]] = {
    'full': dict(options=STOCK, fast=False, trainable=True),
    'frozen': dict(options=STOCK, fast=False),
    'lora loralib': dict(options=STOCK, fast=False, replace=loralib),
    'lora peft': dict(options=STOCK, fast=False, replace=hf_peft),
    'liera': dict(options=STOCK, fast=False, update='taylor'),
    'liera exp': dict(options=STOCK, fast=False, update='exp'),
    'liera config': dict(fast=False, update='taylor'),
    'full fast': dict(trainable=True),
    'frozen fast': dict(),
    'lora fast': dict(update='additive'),
    'liera fast': dict(update='taylor'),
    'liera exp fast': dict(update='exp'),
    'liera fast with_cp': dict(update='taylor', with_cp=True),
}
# LieRA as our configs have it, but for one of their settings
SETTINGS: Dict[str, Dict[str, Any]] = {
    'liera fast': VARIANTS['liera fast'],
    'liera fast again': VARIANTS['liera fast'],
    **{name: dict(update='taylor', options=options) for name, options in UNDONE.items()},
    'pinned masks': dict(update='taylor', options={'model.data_preprocessor.type': 'PinnedMaskPreprocessor'}),
    'cudnn_benchmark': dict(update='taylor', options={'env_cfg.cudnn_benchmark': True}),
    'prefetch_factor 4': dict(update='taylor', options={'train_dataloader.prefetch_factor': 4}),
    'workers end': dict(update='taylor', options={'train_dataloader.persistent_workers': False}),
    'watched': dict(update='taylor', watched=True),
    'device heads': dict(update='taylor', options=DEVICE_HEADS),
}
ALL = {**VARIANTS, **SETTINGS}


class Variant:
    """A detector and its optimizer on the card, and what was measured of its training steps.

    Attributes:
        times (list[dict]): Milliseconds of the parts of every timed step.
        losses (list[float]): Loss of every timed step.
        peak (int): Most bytes allocated during a step, without those of other variants.
    """

    def __init__(self, name: str, arch: str, rank: int, **options: Any):
        self.name, self.times, self.losses, self.peak = name, [], [], 0
        others = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        self.cfg, self.model, self.optimizer = build(name, arch, rank, **options)
        if 'watched' in ALL[name]:
            LossWatch(self.model, self.optimizer)
        self.model.backbone.register_forward_hook(lambda *_: self._mark('backbone'))
        self.resident = torch.cuda.memory_allocated() - others

    def repeat(self, data: Dict[str, Any]) -> None:
        """A step on a copy of a batch, since preprocessing changes it, and the memory that it takes."""
        data = copy.deepcopy(data)
        if self.cfg.train_dataloader.pin_memory:
            data['inputs'] = [image.pin_memory() for image in data['inputs']]
        others = torch.cuda.memory_allocated() - self.resident
        torch.cuda.reset_peak_memory_stats()
        self.step(data)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others)
        del data
        gc.collect()  # or it would be freed within another variant's step, and lower that one's peak
        self.resident = torch.cuda.memory_allocated() - others

    def step(self, data: Dict[str, Any]) -> None:
        torch.backends.cudnn.benchmark = self.cfg.env_cfg.cudnn_benchmark
        torch.cuda.synchronize()
        self.marks = {}
        self._mark('start')
        inputs = self.model.data_preprocessor(data, training=True)
        self._mark('data')
        with self.optimizer.optim_context(self.model):
            losses = self.model(**inputs, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self._mark('rest')
        self.optimizer.backward(loss)
        self._mark('backward')
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._mark('optimizer')
        torch.cuda.synchronize()
        times = [self.marks[part] for part in ('start', *PARTS)]
        self.times.append({part: a.elapsed_time(b) for part, a, b in zip(PARTS, times, times[1:])})
        self.losses.append(loss.item())

    def _mark(self, part: str) -> None:
        self.marks[part] = torch.cuda.Event(enable_timing=True)
        self.marks[part].record()

    def row(self) -> Dict[str, Any]:
        """Medians of the steps' times in ms, and the quartiles of the whole step."""
        totals = [sum(step.values()) for step in self.times]
        low, _, high = statistics.quantiles(totals, n=4)
        parts = {part: statistics.median(step[part] for step in self.times) for part in PARTS}
        return dict(variant=self.name, ms=statistics.median(totals), quartiles=[low, high], **parts)

    def sizes(self) -> Dict[str, float]:
        """Peak of the memory in GiB, parameters that train in millions, and what a checkpoint holds of the model in MiB."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        saved = [t for t in self.model.state_dict(keep_vars=True).values() if id(t) not in frozen]
        return dict(
            peak_gib=self.peak / 2**30,
            trainable_m=sum(p.numel() for p in trainable) / 1e6,
            checkpoint_mib=sum(t.numel() * t.element_size() for t in saved) / 2**20)


def build(name: str, arch: str, rank: int, **options: Any) -> Tuple[Config, nn.Module, OptimWrapper]:
    """Our config for COCO as a variant has it, with other options, and its detector on the card, with an optimizer."""
    setting = ALL[name]
    cfg = load_config(str(CONFIG), {**setting.get('options', {}), **options})
    liera = dict(rank=rank, alpha=2 * rank, update=setting['update']) if 'update' in setting else None
    cfg.model.backbone.update(
        arch=arch, init_cfg=None, liera=liera, **{key: setting[key] for key in ('fast', 'with_cp') if key in setting})
    cfg.model.neck.in_channels = LieRAConvNeXt.arch_settings[arch]['channels']
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        if 'replace' in setting:
            setting['replace'](model.backbone, rank)
        if 'trainable' in setting:
            model.backbone.requires_grad_(True)
        model.cuda().train()
        return cfg, model, build_optim_wrapper(model, cfg.optim_wrapper)


def batch(images: int, size: int, seed: int = 0) -> Dict[str, Any]:
    """Noise with eight ellipses an image as instances, as a dataloader gives it."""
    random = np.random.RandomState(seed)
    data = dict(inputs=[], data_samples=[])
    rows, columns = np.ogrid[:size, :size]
    for _ in range(images):
        data['inputs'].append(torch.from_numpy(random.randint(0, 256, (3, size, size), dtype=np.uint8)))
        centre, radius = random.uniform(.2, .8, (8, 2)) * size, random.uniform(.03, .2, (8, 2)) * size
        boxes = np.concatenate([centre - radius, centre + radius], 1)
        masks = [((columns - x) / a)**2 + ((rows - y) / b)**2 <= 1 for (x, y), (a, b) in zip(centre, radius)]
        sample = DetDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(random.randint(0, 80, 8)),
            masks=BitmapMasks(np.stack(masks).astype(np.uint8), size, size))
        data['data_samples'].append(sample)
    return data


def measure(names: List[str], arch: str, rank: int, images: int, size: int, rounds: int) -> List[Dict[str, Any]]:
    """Rows of the variants, from ``rounds`` turns of three steps each."""
    data = batch(images, size)
    variants = []
    for name in names:
        variants.append(Variant(name, arch, rank))
        for _ in range(3):
            variants[-1].repeat(data)
        variants[-1].times.clear()
    for _ in trange(rounds):
        for variant in variants:
            for _ in range(3):
                variant.repeat(data)
    return [{**variant.row(), **variant.sizes()} for variant in variants]


def measure_settings(names: List[str], data_root: str, arch: str, rank: int, images: int,
                     rounds: int) -> List[Dict[str, Any]]:
    """Rows of the variants, each fed by its own dataloader, from ``rounds`` turns of an epoch each.

    In ``wait``, the milliseconds that a step waits for its batch, and in ``first``, those that the first of an epoch does.
    """
    check_data(load_config(str(CONFIG), {'data_root': data_root}), ['train'])
    options = {'data_root': data_root, 'train_dataloader.batch_size': images}
    variants = [Variant(name, arch, rank, **options) for name in names]
    with DefaultScope.overwrite_default_scope('mmdet'):
        loaders = [Runner.build_dataloader(variant.cfg.train_dataloader, seed=0) for variant in variants]
    waits = [[] for _ in names]
    for turn in range(rounds + 1):
        for variant, loader, epochs in tqdm(list(zip(variants, loaders, waits)), f'turn {turn} of {rounds}'):
            epochs.append([])
            asked = time.perf_counter()
            for data in loader:
                epochs[-1].append(1000 * (time.perf_counter() - asked))
                variant.step(data)
                asked = time.perf_counter()
            if turn == 0:  # kernels are compiled, and workers start
                variant.times.clear()
                epochs.clear()
    return [dict(variant.row(), wait=statistics.median(sum((epoch[1:] for epoch in epochs), [])),
                 first=statistics.median(epoch[0] for epoch in epochs)) for variant, epochs in zip(variants, waits)]


def table(rows: List[Dict[str, Any]]) -> str:
    """The rows under their names."""
    def cell(value: Any) -> str:
        return value if isinstance(value, str) else '-'.join(f'{number:.2f}' for number in np.atleast_1d(value))

    lines = [list(rows[0]), *(map(cell, row.values()) for row in rows)]
    return '\n'.join(f'{name:26}' + ''.join(f'{value:>15}' for value in values) for name, *values in lines)


def inference(arch: str, rank: int, images: int, size: int, rounds: int) -> Dict[str, List[float]]:
    """Milliseconds of a forward pass of the backbone and neck: unadapted, and adapted but merged."""
    models = {'unadapted': build('frozen fast', arch, rank)[1], 'merged': build('liera fast', arch, rank)[1]}
    liera_mm.merge(models['merged'])
    x = torch.randn(images, 3, size, size, device='cuda')
    times = {name: [] for name in models}
    for turn in range(10 * rounds + 3):
        for name, model in sorted(models.items(), reverse=turn % 2 == 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.no_grad(), torch.autocast('cuda', dtype=torch.float16):
                model.eval()
                torch.cuda.synchronize()
                start.record()
                model.extract_feat(x)
                end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(start.elapsed_time(end))
    return times


def trajectories(names: List[str], arch: str, rank: int, images: int, size: int, steps: int) -> Dict[str, List[float]]:
    """Losses of each variant over the same steps: the same weights, batches and random numbers.

    The first is trained twice: how far it is from itself, since sums on the card are in no fixed order, is the noise.
    """
    batches = [batch(images, size, seed) for seed in range(8)]
    losses = {}
    for label, name in [*zip(names, names), (f'{names[0]} again', names[0])]:
        variant = Variant(name, arch, rank)
        for step in range(steps):
            torch.manual_seed(step)
            variant.repeat(batches[step % len(batches)])
        losses[label] = variant.losses
        del variant
    return losses


def ceilings() -> Dict[str, float]:
    """What the card can do at best: TB/s of a copy, read and written, and TFLOP/s of a matrix product in half precision."""
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.float16) for _ in range(2))
    big = torch.empty(2**31, dtype=torch.uint8, device='cuda')
    other = torch.empty_like(big)
    return {'TB/s': 2 * big.numel() / _seconds(lambda: other.copy_(big)) / 1e12,
            'TFLOP/s': 2 * 8192**3 / _seconds(lambda: a @ b) / 1e12}


def _seconds(call: Callable[[], Any]) -> float:
    """Median over twenty calls, on the card."""
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def floors(arch: str, images: int, size: int, ceilings: Dict[str, float]) -> Dict[str, float]:
    """Least milliseconds that the kernels of the fast blocks need: their bytes in half precision, or operations.

    The six matrix products of a block and step multiply N·H·W tokens of C and 4·C channels.
    """
    settings = LieRAConvNeXt.arch_settings[arch]
    numbers = operations = 0
    for stage, (depth, channels) in enumerate(zip(settings['depths'], settings['channels'])):
        tokens = images * (size // (4 << stage))**2
        numbers += depth * tokens * channels
        operations += depth * 6 * 2 * tokens * channels * 4 * channels
    result = {name: 1000 * 2 * passes * numbers / (1e12 * ceilings['TB/s']) for name, passes in PASSES.items()}
    return dict(result, **{'matrix products': 1000 * operations / (1e12 * ceilings['TFLOP/s'])})


def kernels(names: List[str], arch: str, rank: int, images: int, size: int) -> Dict[str, Dict[str, List[float]]]:
    """For each variant, by kernel: milliseconds and launches of a step on the card."""
    data, result = batch(images, size), {}
    for name in names:
        variant = Variant(name, arch, rank)
        for _ in range(3):
            variant.repeat(data)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(3):
                variant.repeat(data)
        averages = [event for event in profile.key_averages() if event.self_device_time_total and '#' not in event.key]
        result[name] = {event.key: [event.self_device_time_total / 3000, event.count / 3] for event in averages}
        del variant
    return result


def operator_calls(images: int, size: int, dtype: torch.dtype,
                   device: str) -> Dict[str, Tuple[List[Tensor], Callable[..., Tensor], Callable[..., Tensor]]]:
    """Inputs for mmcv's operators, what these are here, and what torch or torchvision has.

    The logits of RetinaNet's anchors, and an encoder layer of Deformable DETR, on images of this size.
    """
    anchors = images * 9 * sum((size // stride)**2 for stride in (8, 16, 32, 64, 128))
    logits = torch.randn(anchors, 80, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 81, (anchors, ), device=device)
    one_hot = nn.functional.one_hot(target, 81)[:, :80].to(dtype)
    shapes = [(size // stride, size // stride) for stride in (8, 16, 32, 64)]
    sizes = torch.tensor(shapes, device=device)
    starts, keys = sizes.prod(1).cumsum(0) - sizes.prod(1), sum(height * width for height, width in shapes)
    attention = [torch.rand(images, keys, 8, *rest, device=device, dtype=dtype, requires_grad=True)
                 for rest in ((32, ), (4, 4, 2), (4, 4))]  # values, where to look, and with what weights
    return {
        'sigmoid_focal_loss': ([logits], lambda x: sigmoid_focal_loss(x, target, 2., .25, None, 'sum'),
                               lambda x: torchvision.ops.sigmoid_focal_loss(x, one_hot, .25, 2., 'sum')),
        'ms_deform_attn': (attention,
                           lambda value, *rest: MultiScaleDeformableAttnFunction.apply(value, sizes, starts, *rest, 64),
                           lambda value, *rest: multi_scale_deformable_attn_pytorch(value, shapes, *rest)),
    }


def operators(images: int, size: int) -> Dict[str, List[float]]:
    """Milliseconds, forward and backward, of mmcv's operators as they are here, and of torch's or torchvision's."""
    result = {}
    for dtype in (torch.float32, torch.float16):
        for name, (inputs, *calls) in operator_calls(images, size, dtype, 'cuda').items():
            result[f'{name}, {str(dtype)[6:]}'] = [1000 * _seconds(
                lambda call=call, inputs=inputs: torch.autograd.grad(call(*inputs).sum(), inputs)) for call in calls]
    return result


def waits(names: List[str], arch: str, rank: int, images: int, size: int) -> Dict[str, Dict[str, int]]:
    """For each variant, how often the host waits for the device in a step, by the line of Python that has it wait."""
    data, result = batch(images, size), {}
    for name in names:
        variant = Variant(name, arch, rank)
        for _ in range(2):
            variant.repeat(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            variant.repeat(data)
            torch.cuda.set_sync_debug_mode('default')
        lines = Counter(f'{each.filename}:{each.lineno}' for each in caught if 'synchronizing' in str(each.message))
        result[name] = dict(lines.most_common())
        del variant
    return result


def draw_steps(rows: List[Dict[str, Any]], path: Path) -> None:
    """Bars of the parts of a step, with the peak of the memory behind them."""
    figure, axes = plt.subplots(figsize=(10, .45 * len(rows) + 1.2), layout='constrained')
    left = np.zeros(len(rows))
    for part in PARTS:
        widths = np.array([row[part] for row in rows])
        axes.barh([row['variant'] for row in rows], widths, left=left, label=part)
        left += widths
    for index, row in enumerate(rows):
        axes.text(left[index] + 3, index, f'{row["ms"]:.0f} ms, {row["peak_gib"]:.1f} GiB', va='center')
    axes.invert_yaxis()
    axes.set(xlabel='ms a training step (medians of the parts)', xlim=(0, 1.25 * left.max()))
    axes.legend(ncols=len(PARTS), loc='lower center', bbox_to_anchor=(.5, 1))
    figure.savefig(path, dpi=120)


def draw_losses(losses: Dict[str, List[float]], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 5), layout='constrained')
    first = next(iter(losses.values()))
    for name, values in losses.items():
        top.plot(values, label=name, alpha=.7)
        bottom.plot(np.subtract(values, first), label=f'{name} minus {next(iter(losses))}')
    top.set(ylabel='loss')
    bottom.set(ylabel='difference', xlabel='step')
    top.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--variants', nargs='+', choices=list(ALL), metavar='NAME',
                        help=f'default: {", ".join(VARIANTS)}; of --settings: {", ".join(SETTINGS)}')
    parser.add_argument('--arch', default='base', choices=list(LieRAConvNeXt.arch_settings), metavar='NAME')
    parser.add_argument('--rank', type=int, default=16)
    parser.add_argument('--images', type=int, default=4, help='images a batch')
    parser.add_argument('--size', type=int, default=1024, help='height and width of the images')
    parser.add_argument('--rounds', type=int, default=10, help='turns of three steps for each variant')
    parser.add_argument('--json', type=Path, help='write all figures to this file')
    parser.add_argument('--png', type=Path, help='draw them to this file')
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument('--sweep', choices=list(SWEEPS), help='one table for each value of this setting')
    instead.add_argument('--settings', metavar='DATA_ROOT',
                         help='time steps with single settings changed instead, fed from this folder in the layout of COCO')
    instead.add_argument('--inference', action='store_true', help='time the forward pass, unadapted and merged, instead')
    instead.add_argument('--kernels', action='store_true', help='where the time of a step on the card goes, instead')
    instead.add_argument('--operators', action='store_true',
                         help="time mmcv's operators as they are here, and what torch or torchvision has, instead")
    instead.add_argument('--waits', action='store_true', help='which lines have the host wait for the device, instead')
    instead.add_argument('--trajectory', type=int, metavar='STEPS', help='train each variant on the same data instead')
    args = parser.parse_args()
    args.variants = args.variants or list(SETTINGS if args.settings else VARIANTS)
    if not torch.cuda.is_available():
        sys.exit('tools/benchmark.py needs a CUDA device.')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, ConvNeXt-V2 {args.arch}, rank {args.rank}, '
          f'{args.images} x {args.size} x {args.size}')
    problem = dict(arch=args.arch, rank=args.rank, images=args.images, size=args.size)
    draw = draw_steps
    if args.inference:
        result, draw = inference(**problem, rounds=args.rounds), None
        for name, times in result.items():
            low, median, high = statistics.quantiles(times, n=4)
            print(f'{name:12}{median:8.2f} ms  ({low:.2f}-{high:.2f})')
        ratios = np.divide(result['merged'], result['unadapted'])
        print('merged against unadapted, in turns: {:.4f}  ({:.4f}-{:.4f})'.format(*np.quantile(ratios, [.5, .25, .75])))
    elif args.settings:
        result, draw = measure_settings(
            args.variants, args.settings, args.arch, args.rank, args.images, args.rounds), None
        print(table(result))
    elif args.kernels:
        result, draw = dict(ceilings=ceilings(), **kernels(args.variants, **problem)), None
        print('  '.join(f'{value:.2f} {unit}' for unit, value in result['ceilings'].items()))
        result['floors'] = floors(args.arch, args.images, args.size, result['ceilings'])
        print('floors of fast blocks:', '  '.join(f'{name} {ms:.2f} ms' for name, ms in result['floors'].items()))
        for name in args.variants:
            times = sorted(((ms, count, key) for key, (ms, count) in result[name].items()), reverse=True)
            print(f'{name}: {sum(ms for ms, *_ in times):.1f} ms on the card')
            print('\n'.join(f'{ms:8.2f} ms {count:6.0f} x {key:.100}' for ms, count, key in times[:25]))
    elif args.operators:
        result, draw = operators(args.images, args.size), None
        for name, (ours, native) in result.items():
            print(f'{name:28}{ours:8.2f} ms, torch and torchvision {native:8.2f} ms, ratio {ours / native:.2f}')
    elif args.waits:
        result, draw = waits(args.variants, **problem), None
        for name, lines in result.items():
            print(f'{name}: {sum(lines.values())} waits a step')
            print('\n'.join(f'{count:6} x {line}' for line, count in lines.items()))
    elif args.trajectory:
        result, draw = trajectories(args.variants, **problem, steps=args.trajectory), draw_losses
        first = result[args.variants[0]]
        for name, losses in result.items():
            print(f'{name:20}', *(f'{statistics.mean(part):.4f}' for part in zip(*[iter(losses)] * 20)),
                  f'  from the first: {statistics.mean(map(abs, np.subtract(losses, first))):.4f} on average')
    elif args.sweep:
        result = []
        for value in SWEEPS[args.sweep]:
            rows = measure(args.variants, **{**problem, args.sweep: value}, rounds=args.rounds)
            result += [dict(row, variant=f'{row["variant"]}, {args.sweep} {value}') for row in rows]
        print(table(result))
    else:
        result = measure(args.variants, **problem, rounds=args.rounds)
        print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.png and draw:
        draw(result, args.png)


if __name__ == '__main__':
    exit_clearly(main)
