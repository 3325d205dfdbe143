#!/usr/bin/env python
"""Try README's one edit on MMDetection's own configs: tools/analysis_tools/detector_matrix.py OUT.json [PATTERN ...].

Each config is tried in a process of its own, with random weights and two small images, in columns that stop at the first
that fails: ``stock`` (the detector as MMDetection has it builds and gives a loss), ``builds``, ``trains`` (exactly adapters,
neck and heads), ``start`` (features of the backbone are those of the stock one, bit for bit), ``moves`` (after two steps
every factor that has a gradient has moved), ``export`` (strict in the stock detector, with the same features). What stock
MMDetection itself cannot do is told apart. OUT.json is written after every config, and what it has is not tried again.
"""
import argparse
import copy
import fnmatch
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

COLUMNS = ('stock', 'builds', 'trains', 'start', 'moves', 'export')


def zoo() -> Path:
    """The folder of MMDetection's configs in its installed package."""
    import mmdet
    package = Path(mmdet.__file__).parent
    return next(folder for folder in (package / '.mim/configs', package.parent / 'configs') if folder.is_dir())


def edited(model: Dict[str, Any], rank: int = 2) -> Dict[str, Any]:
    """The config of a detector with README's one edit."""
    model = copy.deepcopy(model)
    model['backbone'] = dict(type='LieRABackbone', backbone=model['backbone'], liera=dict(rank=rank))
    return model


def without_pretrained(cfg: Any) -> None:
    """Take the pretrained weights out of a config, in place; nothing is downloaded here."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ():
        without_pretrained(value)
    if isinstance(cfg, dict) and isinstance(cfg.get('init_cfg'), dict) and 'checkpoint' in cfg['init_cfg']:
        cfg['init_cfg'] = None
    if isinstance(cfg, dict) and isinstance(cfg.get('pretrained'), str):
        cfg['pretrained'] = None


def try_config(path: Path) -> Dict[str, str]:
    """``ok``, or what went wrong, for every column that was reached."""
    import torch
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import liera_mm
    from liera_mm.core.adapt import adapted_layers, intended_parameters

    torch.manual_seed(0)
    config = Config.fromfile(path)
    init_default_scope(config.get('default_scope', 'mmdet'))
    without_pretrained(config.model)
    result = {}

    def build(model):
        model = MODELS.build(copy.deepcopy(model))
        model.init_weights()
        return model

    def loss(model):
        torch.manual_seed(0)
        data = demo_mm_inputs(2, [[3, 128, 128]] * 2, num_classes=2, with_mask=True, with_semantic='panoptic' in path.name)
        data = model.data_preprocessor(data, True)
        losses, _ = model.parse_losses(model(**data, mode='loss'))
        return losses

    def features(model):
        model.backbone.eval()  # that of MMDetection's returns None
        with torch.no_grad():
            out = model.backbone(torch.ones(1, 3, 128, 128))
        return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]

    def same(a, b, **tolerance):
        return all(torch.allclose(x, y, equal_nan=True, **tolerance) for x, y in zip(a, b))

    try:
        column = 'stock'
        stock = build(config.model)
        stock.train()
        loss(stock).backward()
        result[column], column = 'ok', 'builds'
        ours = build(edited(config.model))
        result[column], column = 'ok', 'trains'
        ours.train()
        trained = {name for name, p in ours.backbone.named_parameters() if p.requires_grad}
        others = {name for name, p in ours.named_parameters() if p.requires_grad and not name.startswith('backbone.')}
        assert trained == intended_parameters(ours.backbone), sorted(trained ^ intended_parameters(ours.backbone))[:3]
        assert others == {name for name, p in stock.named_parameters()
                          if p.requires_grad and not name.startswith('backbone.')}, 'other parts train'
        result[column], column = 'ok', 'start'
        stock.backbone.requires_grad_(False)
        stock.load_state_dict(ours.state_dict(), strict=False)
        assert all(torch.equal(x, y) for x, y in zip(features(ours), features(stock))), 'other features'
        result[column], column = 'ok', 'moves'
        ours.train()
        before = {name: p.detach().clone() for name, p in ours.backbone.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 1e-4, weight_decay=0.)
        for _ in range(2):
            optimizer.zero_grad()
            loss(ours).backward()
            optimizer.step()
        stuck = [name for name, p in ours.backbone.named_parameters()
                 if name in before and p.grad is not None and p.grad.any() and torch.equal(p, before[name])]
        assert not stuck, f'stuck: {stuck[:3]}'
        assert any(p.grad is not None and p.grad.any() for p in ours.backbone.parameters()), 'nothing has a gradient'
        result[column], column = 'ok', 'export'
        stock.load_state_dict(liera_mm.export(ours), strict=True)
        assert same(features(ours), features(stock), rtol=1e-3, atol=1e-4), 'other features'
        result[column] = 'ok'
        assert list(adapted_layers(ours.backbone))
    except Exception as error:  # of every kind: telling which is what this tool is for
        result[column] = f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'
    return result


def table(results: Dict[str, Dict[str, str]]) -> List[str]:
    """What was found, as lines."""
    stock = {name for name, row in results.items() if row.get('stock') == 'ok'}
    whole = [name for name in stock if results[name].get('export') == 'ok']
    lines = [f'{len(whole)} of the {len(stock)} configs that stock MMDetection can train here pass every column; '
             f'{len(results) - len(stock)} of {len(results)} it cannot']
    for name, row in sorted(results.items()):
        column, text = list(row.items())[-1]
        if text != 'ok':
            lines.append(f'{name}: {column}: {text}')
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Try README's one edit on MMDetection's own configs")
    parser.add_argument('out', type=Path, help='JSON file with the results; goes on where it ended')
    parser.add_argument('patterns', nargs='*', default=['*'], help='globs on FOLDER/NAME.py, all by default')
    parser.add_argument('--one-each', action='store_true', help='only the first config of every folder')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for a config')
    parser.add_argument('--only', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print('RESULT ' + json.dumps(try_config(args.only)))
        return
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    folder, seen = zoo(), set()
    for path in sorted(folder.glob('*/*.py')):
        name = path.relative_to(folder).as_posix()
        if name.startswith('_base_') or not any(fnmatch.fnmatch(name, pattern) for pattern in args.patterns):
            continue
        if args.one_each and path.parent in seen:
            continue
        seen.add(path.parent)
        if name in results:
            continue
        command = [sys.executable, __file__, str(args.out), '--only', str(path)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
            line = next((line for line in run.stdout.splitlines() if line.startswith('RESULT ')), None)
            results[name] = json.loads(line[7:]) if line else dict(stock=f'the process ended: {run.stderr[-300:]}')
        except subprocess.TimeoutExpired:
            results[name] = dict(stock=f'took longer than {args.timeout:g} s')
        args.out.write_text(json.dumps(results, indent=1))
        print(name, list(results[name].items())[-1], flush=True)
    print('\n'.join(table(results)))


if __name__ == '__main__':
    main()
