#!/usr/bin/env python
"""Train a detector or classifier: tools/train.py CONFIG [options]."""
import argparse
import os

from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import (
    add_options,
    build_runner,
    check_data,
    check_hook,
    check_optimizers,
    check_weights,
    config_of,
    exit_clearly,
)
from liera_mm.engine.safe_loading import latest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description='Train a detector or classifier')
    parser.add_argument('config', help='config file')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint; without one, from the latest in the work dir that is intact')
    add_options(parser)
    args = parser.parse_args()

    cfg = config_of(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
            raise SetupError(f'{args.config} has no auto_scale_lr.base_batch_size',
                             'Set it to the total batch size that the learning rate was chosen for')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        checkpoint = latest_checkpoint(cfg.work_dir) if args.resume == 'auto' else args.resume
        if checkpoint:
            cfg.resume, cfg.load_from = True, checkpoint
        elif os.environ.get('RANK', '0') == '0':  # one of several processes
            print(f'{cfg.work_dir} has no checkpoint to resume from: training from the beginning')
    check_optimizers(cfg)
    check_hook(cfg)
    check_data(cfg, ['train', 'val'], keep=True)
    check_weights(cfg)
    runner = build_runner(cfg)
    runner.train()
    # Ends the workers: at exit, torch would wait 5 s for each of those that persist and pin memory (pytorch issue 81794)
    runner.train_dataloader._iterator = None


if __name__ == '__main__':
    exit_clearly(main)
