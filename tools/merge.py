#!/usr/bin/env python
"""Fold the perturbations into the weights: tools/merge.py CONFIG CHECKPOINT OUT.

Writes a plain checkpoint OUT (.pth) and, beside it, a plain config (.py): stock MMDetection runs them without liera_mm.
"""
import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint

import liera_mm
from liera_mm.engine.checkpoint import load_trained
from liera_mm.engine.cli import check_checkpoint, exit_clearly, load_config


def plain_config(cfg: Config) -> Config:
    """The same detector with the backbone's own type, and without anything of this package."""
    cfg = Config(cfg.to_dict())
    backbone = cfg.model.backbone
    if backbone.type == 'LieRABackbone':
        cfg.model.backbone = backbone.backbone
    else:
        backbone.type = 'mmpretrain.ConvNeXt'
        for ours in ('liera', 'fast'):
            backbone.pop(ours, None)
    for part in cfg.model.values():
        if isinstance(part, ConfigDict) and (part.get('init_cfg') or {}).get('type') == 'Pretrained':
            part.init_cfg = None  # the checkpoint has these weights
    others = [name for name in cfg.get('custom_imports', {}).get('imports', []) if name != 'liera_mm']
    cfg.custom_imports = dict(imports=[*others, 'mmpretrain.models'], allow_failed_imports=False)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks', []) if hook['type'] != 'LieRAHook']
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description='Fold the perturbations of a checkpoint into its weights')
    parser.add_argument('config', help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint of tools/train.py')
    parser.add_argument('out', type=Path, help='plain checkpoint to write, .pth; the plain config goes beside it, .py')
    args = parser.parse_args()
    if args.out.suffix != '.pth':
        parser.error(f'out must be a .pth file, not {args.out}')
    check_checkpoint(args.checkpoint)
    cfg = load_config(args.config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model)
    checkpoint = load_trained(model, args.checkpoint, args.config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key not in ('cfg', 'liera')}
    plain = dict(state_dict=liera_mm.export(model), meta=meta)
    save_checkpoint(plain, str(args.out), backend_args=dict(backend='checkpoints'))
    plain_config(cfg).dump(args.out.with_suffix('.py'))
    print(f'{args.out} and {args.out.with_suffix(".py")} run in stock MMDetection')


if __name__ == '__main__':
    exit_clearly(main)
