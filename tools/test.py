#!/usr/bin/env python
"""Evaluate a detector or classifier: tools/test.py CONFIG CHECKPOINT [options]."""
import argparse
import os.path as osp

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine.cli import (
    add_options,
    build_runner,
    check_checkpoint,
    check_data,
    check_hook,
    config_of,
    exit_clearly,
)
from liera_mm.engine.config_tree import dicts
from liera_mm.engine.datasets import datasets_of

# isort: split
from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict


def use_tta(cfg: Config) -> None:
    """Wrap model and test pipeline for flipping, as the config says or in the default way: of boxes only, or of scores."""
    boxes = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    cfg.setdefault('tta_model', dict(type='AverageClsScoreTTA') if cfg.get('default_scope') == 'mmpretrain' else boxes)
    datasets = [*datasets_of(cfg.get('test_dataloader') or {})]
    if 'tta_pipeline' not in cfg and datasets:
        *steps, pack = datasets[0].pipeline
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=[flips, [dict(pack, meta_keys=keys)]])]
    if (cfg.model.get('roi_head') or {}).get('mask_head'):
        print('MMDetection merges boxes of flipped images, but not masks: testing boxes only')
        cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
        for _, metric in dicts(cfg.test_evaluator, 'test_evaluator'):
            if 'segm' in metric.get('metric', ()):
                metric.metric = 'bbox'
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook, of mmpretrain or of MMDetection; one that is there by default."""
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    if cfg.get('default_scope') == 'mmpretrain':
        cfg.default_hooks.setdefault('visualization', dict(type='VisualizationHook'))
        folder = args.show_dir and osp.join(cfg.work_dir, args.show_dir)
        cfg.default_hooks.visualization.update(
            enable=True, interval=1, show=args.show, wait_time=args.wait_time, out_dir=folder)
    else:
        cfg.default_hooks.setdefault('visualization', dict(type='DetVisualizationHook'))
        trigger_visualization_hook(cfg, args)


def main() -> None:
    parser = argparse.ArgumentParser(description='Evaluate a detector or classifier')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='write the predictions to this .pkl file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', help='write the predictions as pictures to work_dir/<time>/<this folder>')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show stays at a picture')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: horizontal flips')
    add_options(parser)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must be a .pkl file, not {args.out}')

    cfg = config_of(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    check_checkpoint(args.checkpoint)
    check_hook(cfg)
    check_data(cfg, ['test'], keep=True)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    if args.tta:
        use_tta(cfg)
    runner = build_runner(cfg, 'test')
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    exit_clearly(main)
