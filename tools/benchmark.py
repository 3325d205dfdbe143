#!/usr/bin/env python
"""Time and memory of a training step of Mask R-CNN with ConvNeXt-V2, for ways to train its backbone.

All variants stay on the card, and take turns within one process: ratios between them are of one run, on one machine. Random
weights and synthetic images, boxes and masks; the config's optimizer and mixed precision.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

from benchmark_kernels import ceilings, floors, kernels, on_card, operators, waits
from benchmark_variants import ALL, CONFIG, PARAMETERISATIONS, PARTS, SETTINGS, VARIANTS, Variant, batch, build

import liera_mm
from liera_mm.engine.cli import check_data, exit_clearly, load_config
from liera_mm.models import LieRAConvNeXt

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from tqdm import tqdm, trange

SWEEPS = dict(
    images=[1, 2, 4, 8], size=[512, 768, 1024, 1344], rank=[2, 8, 16, 32, 64], arch=['tiny', 'base', 'large', 'huge'])


def measure(names: List[str], arch: str, rank: int, images: int, size: int, rounds: int) -> List[Dict[str, Any]]:
    """Rows of the variants, from ``rounds`` turns of three steps each.

    In ``card``, the milliseconds of a step for which the card works: what would be left if it never waited for the host.
    """
    data = batch(images, size)
    variants = []
    for name in names:
        variants.append(Variant(name, arch, rank, size))
        for _ in range(3):
            variants[-1].weigh(data)
        variants[-1].warmed_up()
    for turn in trange(rounds):
        for variant in variants:
            for _ in range(3):
                (variant.repeat if turn else variant.weigh)(data)
    rows = [variant.row() for variant in variants]
    card = [sum(ms for ms, _ in on_card(variant, data).values()) for variant in variants]
    return [dict(row, card=ms, **variant.sizes()) for row, ms, variant in zip(rows, card, variants)]


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
                variant.warmed_up()
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
        variant = Variant(name, arch, rank, size)
        for step in range(steps):
            torch.manual_seed(step)
            variant.repeat(batches[step % len(batches)])
        losses[label] = variant.losses
        del variant
    return losses


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
                        help=f'default: {", ".join(VARIANTS)}; of --settings: {", ".join(SETTINGS)}; also: '
                        f'{", ".join(PARAMETERISATIONS)}')
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
