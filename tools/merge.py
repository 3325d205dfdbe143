#!/usr/bin/env python
"""Fold the perturbations into the weights: tools/merge.py CONFIG CHECKPOINT OUT.

Writes a plain checkpoint OUT (.pth) and, beside it, a plain config (.py): stock MMDetection runs them without liera_mm.
"""
import argparse
import copy
from pathlib import Path

from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import save_checkpoint

import liera_mm
from liera_mm.engine.checkpoint import load_trained
from liera_mm.engine.cli import check_checkpoint, exit_clearly, load_config
from liera_mm.engine.files import check_out
from liera_mm.engine.invariants import check_finite
from liera_mm.engine.options import add_cfg_options
from liera_mm.engine.plain import plain_config


def main() -> None:
    parser = argparse.ArgumentParser(description='Fold the perturbations of a checkpoint into its weights')
    parser.add_argument('config', help='config that the checkpoint was trained with')
    parser.add_argument('checkpoint', help='checkpoint of tools/train.py')
    parser.add_argument('out', type=Path, help='plain checkpoint to write, .pth; the plain config goes beside it, .py')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.out.suffix != '.pth':
        parser.error(f'out must be a .pth file, not {args.out}')
    check_checkpoint(args.checkpoint)
    check_out([args.out, args.out.with_suffix('.py')], args.config, args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    plain = plain_config(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors write into their config
    checkpoint = load_trained(model, args.checkpoint, args.config)
    check_finite(model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key not in ('cfg', 'liera')}
    content = dict(state_dict=liera_mm.export(model), meta=meta)
    save_checkpoint(content, str(args.out), backend_args=dict(backend='checkpoints'))
    plain.dump(args.out.with_suffix('.py'))
    print(f'{args.out} and {args.out.with_suffix(".py")} run in stock MMDetection')


if __name__ == '__main__':
    exit_clearly(main)
