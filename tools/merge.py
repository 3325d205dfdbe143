"""Fold the perturbations into the weights: tools/merge.py CONFIG CHECKPOINT OUT.

Writes a plain checkpoint OUT (.pth) and, beside it, a plain config (.py): stock MMDetection runs them without liera_mm.
"""
import argparse
from pathlib import Path
from pickle import UnpicklingError

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

import liera_mm
from liera_mm.engine.cli import check_checkpoint, exit_clearly, load_config
from liera_mm.engine.hook import check_settings
from liera_mm.errors import SetupError


def plain_config(cfg: Config) -> Config:
    """The same detector with the backbone's own type, and without anything of this package."""
    cfg = Config(cfg.to_dict())
    backbone = cfg.model.backbone
    if backbone.type == 'LieRABackbone':
        cfg.model.backbone = backbone.backbone
    else:
        backbone.type = 'mmpretrain.ConvNeXt'
        backbone.pop('liera', None)
    for part in cfg.model.values():
        if isinstance(part, ConfigDict) and (part.get('init_cfg') or {}).get('type') == 'Pretrained':
            part.init_cfg = None  # the checkpoint has these weights
    others = [name for name in cfg.get('custom_imports', {}).get('imports', []) if name != 'liera_mm']
    cfg.custom_imports = dict(imports=[*others, 'mmpretrain.models'], allow_failed_imports=False)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks', []) if hook['type'] != 'LieRAHook']
    return cfg


def reason(error: RuntimeError) -> str:
    """The line of an error that says what does not fit."""
    lines = str(error).splitlines()
    return lines[0] if isinstance(error, SetupError) else lines[-1]


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
    try:
        checkpoint = load_checkpoint(model, args.checkpoint, map_location='cpu', strict=True)
        check_settings(model, checkpoint)
    except (UnpicklingError, EOFError) as error:
        raise SetupError(f'{args.checkpoint} is no checkpoint, or a damaged one: {error}',
                         'Give a checkpoint that tools/train.py wrote') from None
    except RuntimeError as error:
        raise SetupError(f'{args.checkpoint} was not trained with {args.config}: {reason(error):.300}',
                         'Use the config in the work dir of that checkpoint') from None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    meta = {key: value for key, value in checkpoint.get('meta', {}).items() if key != 'cfg'}
    torch.save(dict(state_dict=liera_mm.export(model), meta=meta), args.out)
    plain_config(cfg).dump(args.out.with_suffix('.py'))
    print(f'{args.out} and {args.out.with_suffix(".py")} run in stock MMDetection')


if __name__ == '__main__':
    exit_clearly(main)
