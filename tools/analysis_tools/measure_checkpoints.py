#!/usr/bin/env python
"""Sizes of checkpoints and adapter files, and what switching adapters and LieRAHook's checks cost, for the docs.

measure_checkpoints.py [--config CONFIG]: builds the detector with random weights; trains and downloads nothing.
"""
import argparse
import tempfile
import time
from pathlib import Path
from typing import Dict

import torch
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

import liera_mm
from liera_mm.core.report import range_report
from liera_mm.engine.checkpoint import leave_out_base
from liera_mm.engine.cli import load_config
from liera_mm.engine.invariants import check_frozen, frozen_digests
from liera_mm.engine.watches import LossWatch

MIB = 2**20


def save(content: dict, path: Path) -> str:
    torch.save(content, path)
    return f'{path.stat().st_size / MIB:.1f} MiB'


def sizes(model: nn.Module, folder: Path) -> None:
    checkpoint = dict(meta={}, state_dict=model.state_dict())
    print(f'weights, full fine-tuning     {save(dict(state_dict=liera_mm.export(model)), folder / "full.pth")}')
    leave_out_base(model, checkpoint)
    print(f'weights, training checkpoint  {save(checkpoint, folder / "checkpoint.pth")}')
    for dtype in (torch.float32, torch.float16):
        path = folder / 'adapter.safetensors'
        liera_mm.save_adapter(model.backbone, path, dtype)
        print(f'adapter of the backbone, {str(dtype)[6:]}  {path.stat().st_size / MIB:.1f} MiB')


@torch.no_grad()
def switching(backbone: nn.Module, count: int) -> None:
    """Time to make another adapter the active one, against copying merged weights into one backbone."""
    image = torch.randn(1, 3, 64, 64)
    outputs = []
    for i in range(count):
        state = {name: t + 0.01 * torch.randn_like(t) if t.is_floating_point() else t
                 for name, t in liera_mm.adapter_state_dict(backbone).items()}
        liera_mm.load_adapter(backbone, state, name=str(i))
        outputs.append(backbone(image))
    start = time.perf_counter()
    for i in range(count):
        liera_mm.set_adapter(backbone, str(i))
    seconds = (time.perf_counter() - start) / count
    exact = all(torch.equal(a, b) for i, output in enumerate(outputs)
                for a, b in zip(liera_mm.set_adapter(backbone, str(i))(image), output))
    merged = liera_mm.export(backbone)
    weights = {name: tensor.clone() for name, tensor in merged.items()}
    start = time.perf_counter()
    for name, tensor in merged.items():
        weights[name].copy_(tensor)
    copying = time.perf_counter() - start
    adapter, base = (size(state) for state in (liera_mm.adapter_state_dict(backbone), merged))
    print(f'switching to one of {count} adapters  {1000 * seconds:.1f} ms, the outputs afterwards '
          f'{"are" if exact else "ARE NOT"} those of before, bit for bit')
    print(f'copying merged weights instead  {1000 * copying:.0f} ms')
    print(f'memory of a backbone and {count} adapters  {(base + count * adapter) / MIB:.0f} MiB')
    print(f'memory of {count} merged backbones  {count * base / MIB:.0f} MiB')


def checks(model: nn.Module) -> None:
    """Time that LieRAHook's checks take: after each step, of the 14 terms of Mask R-CNN's loss, and after each epoch."""
    watch = LossWatch(model, OptimWrapper(torch.optim.SGD(model.parameters(), lr=.1)))
    losses = {f'loss_{i}': torch.tensor(1.) for i in range(14)}
    model.train()
    start = time.perf_counter()
    for _ in range(1000):
        watch.note(model, (), {}, losses)
        watch.check()
    seconds = (time.perf_counter() - start) / 1000
    model.eval()
    print(f'look at the losses of a step  {1000 * seconds:.2f} ms')
    start = time.perf_counter()
    check_frozen(model, frozen_digests(model))  # takes two of the hash, a training one an epoch
    middle = time.perf_counter()
    range_report(model)
    print(f'hash of all frozen tensors  {(middle - start) / 2:.2f} s, report on all Δ  {time.perf_counter() - middle:.2f} s')


def size(state: Dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description='Sizes of checkpoints, and the cost of switching adapters and of checks')
    parser.add_argument('--config', default='configs/mask-rcnn_convnextv2-b_liera_r16.py')
    parser.add_argument('--adapters', type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = load_config(args.config)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    MMLogger.get_current_instance().setLevel('WARNING')  # MMEngine logs every tensor that it initialises
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, 'base.pth')
        cfg.model.backbone.init_cfg.checkpoint = str(base)
        model = MODELS.build(cfg.model).eval()
        torch.save({f'backbone.{name}': tensor for name, tensor in liera_mm.export(model.backbone).items()}, base)
        model.backbone.init_weights()
        sizes(model, Path(folder))
    checks(model)
    switching(model.backbone, args.adapters)


if __name__ == '__main__':
    main()
