#!/usr/bin/env python
"""Try README's one edit on MMDetection's own configs: tools/analysis_tools/detector_matrix.py OUT.json [PATTERN ...].

Each config is tried at its full size in a process of its own, with random weights and two small images, in columns that
end with the first that fails:

- ``stock``: the detector as MMDetection has it builds, and has a finite loss and gradients. All else is told apart by this.
- ``builds``: so does the detector with the edit.
- ``trains``: exactly adapters, neck and heads.
- ``start``: features, and every loss of a training step, are those of the stock detector with the same weights, bit for bit.
- ``moves``: two steps, under the checks of LieRAHook, move every factor and nothing that is frozen. Blocks that stochastic
  depth skipped have four more; what has no gradient in the stock detector either, all of which trains, stays as it is.
- ``export``: the merged weights are strict in the stock detector and give the same features, and without the edit the config
  is the stock one.
- ``file``: the adapter file, read in another process into a new backbone with the base weights, gives the same features.

Configs whose ``model`` is the same, but for image normalisation and test settings, are tried once. The first of each folder
comes first. OUT.json is written after every config, and what it has is not tried again. All is on the CPU.
"""
import argparse
import collections
import copy
import fnmatch
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

COLUMNS = ('stock', 'builds', 'trains', 'start', 'moves', 'export', 'file')
STEPS = 6
Row = Dict[str, str]


def zoo() -> Path:
    """The folder of MMDetection's configs in its installed package."""
    package = Path(importlib.util.find_spec('mmdet').origin).parent
    return next(folder for folder in (package / '.mim/configs', package.parent / 'configs') if folder.is_dir())


def in_turns(names: Iterable[str], one_each: bool) -> List[str]:
    """The first config of every folder, then the second of those that have one, and so on; or only the first."""
    folders = collections.defaultdict(list)
    for name in sorted(names):
        folders[name.partition('/')[0]].append(name)
    turns = itertools.zip_longest(*folders.values())
    return [name for turn in itertools.islice(turns, 1 if one_each else None) for name in turn if name]


def edited(model: Dict[str, Any], rank: int = 2) -> Dict[str, Any]:
    """The config of a detector, or of what has one, with README's one edit."""
    model = copy.deepcopy(model)
    owner = model
    while 'backbone' not in owner and 'detector' in owner:
        owner = owner['detector']
    owner['backbone'] = dict(type='LieRABackbone', backbone=owner['backbone'], liera=dict(rank=rank))
    return model


def items(cfg: Any) -> Iterator[Tuple[str, Any]]:
    """Every name and value in a config, at any depth."""
    if isinstance(cfg, dict):
        yield from cfg.items()
    for value in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ():
        yield from items(value)


def without_pretrained(cfg: Any) -> None:
    """Take the pretrained weights out of a config, in place; nothing is downloaded here."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ():
        without_pretrained(value)
    if isinstance(cfg, dict):
        if isinstance(cfg.get('init_cfg'), dict) and 'checkpoint' in cfg['init_cfg']:
            cfg['init_cfg'] = None
        for name in ('pretrained', 'teacher_ckpt'):
            if isinstance(cfg.get(name), str):
                cfg[name] = None


def load(path: Path) -> Tuple[Dict[str, Any], str, str]:
    """The detector of a config, without pretrained weights, empty if it has none; its default scope; what went wrong."""
    from mmengine.config import Config, ConfigDict
    try:
        config = Config.fromfile(path)
    except Exception as error:  # of every kind: telling which is what this tool is for
        return {}, '', describe(error)
    model = ConfigDict(config.to_dict().get('model') or {})
    without_pretrained(model)
    return model, config.get('default_scope') or 'mmdet', ''


def key_of(model: Dict[str, Any]) -> str:
    """A hash of what the columns depend on: not of test settings, nor of the normalisation of images."""
    model = {name: value for name, value in model.items() if name != 'test_cfg'}
    model['data_preprocessor'] = {name: value for name, value in (model.get('data_preprocessor') or {}).items()
                                  if name not in ('mean', 'std', 'bgr_to_rgb', 'rgb_to_bgr', 'batch_augments')}
    return hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()[:16]


def inputs(model: Dict[str, Any], size: int) -> Dict[str, Any]:
    """A packed batch of two images, with whatever any detector takes."""
    import torch
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import InstanceData
    settings = list(items(model))
    coarse = any(name == 'semantic_head' for name, _ in settings)  # whose maps are an eighth of the image
    masks = any(name in ('mask_head', 'loss_mask') or name == 'pad_mask' and value for name, value in settings)
    data = demo_mm_inputs(2, [(3, size, size)] * 2, num_classes=2, with_semantic=True, with_mask=masks,
                          sem_seg_output_strides=8 if coarse else 1)
    for sample in data['data_samples']:
        if ('num_classes', 1) in settings:
            sample.gt_instances.labels.zero_()
        boxes = sample.gt_instances.bboxes
        sample.proposals = InstanceData(bboxes=boxes.clone(), scores=torch.ones(len(boxes)))
    return data


def make_small(cfg: Any) -> None:
    """Have images not resized or padded to a size of full training, and few proposals of a second stage; in place."""
    for value in cfg.values() if isinstance(cfg, dict) else cfg if isinstance(cfg, (list, tuple)) else ():
        make_small(value)
    if isinstance(cfg, dict):
        cfg.pop('batch_augments', None)
        if isinstance(cfg.get('sampler'), dict) and 'num' in cfg['sampler']:
            cfg['sampler']['num'] = min(cfg['sampler']['num'], 32)


def try_training(model: Dict[str, Any], scope: str, folder: Path, size: int) -> Iterator[None]:
    """One column after the other; an exception is what went wrong with it."""
    import torch
    from mmengine.config import Config
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.optim import OptimWrapper
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import set_random_seed

    import liera_mm
    from liera_mm.core.adapted import adapted_layers, intended_parameters
    from liera_mm.core.targets import is_norm
    from liera_mm.engine import invariants
    from liera_mm.engine.plain import plain_config
    from liera_mm.engine.watches import LossWatch
    from liera_mm.models.backbones import build_initialised

    init_default_scope(scope)
    for counter, value in dict(epoch=0, iter=0, max_epochs=12, max_iters=1000).items():
        MessageHub.get_current_instance().update_info(counter, value)  # which some heads look up
    data, model = inputs(model, size), copy.deepcopy(model)
    make_small(model)

    def losses(detector, seed=0):
        set_random_seed(seed)
        return detector(**detector.data_preprocessor(copy.deepcopy(data), True), mode='loss')

    def total(losses):
        value = sum(term.sum() for name, term in terms(losses))
        assert value.isfinite(), 'the loss is not finite'
        return value

    def terms(losses):
        return [(name, term) for name, value in sorted(losses.items()) if 'loss' in name
                for term in (value if isinstance(value, (list, tuple)) else [value])]

    def only(names):
        return [p for name, p in ours.named_parameters() if name in names]

    stock = build_initialised(copy.deepcopy(model))
    stock.init_weights()
    for module in stock.modules():
        if is_norm(module) and module.weight is not None and not module.weight.any():
            torch.nn.init.constant_(module.weight, .5)  # at zero, nothing in its block has a gradient
    stock.train()
    others = {name for name, p in stock.named_parameters() if p.requires_grad}
    stock.requires_grad_(True)  # frozen stages too: what has no gradient then is nothing that the loss depends on
    total(losses(stock)).backward()
    idle = {name for name, p in stock.named_parameters() if p.grad is None or not p.grad.any()}
    assert not idle.issuperset(others), 'nothing has a gradient'
    stock.zero_grad()
    weights = {name: tensor.clone() for name, tensor in stock.state_dict().items()}  # DDQ has more names by now
    yield

    ours = MODELS.build(edited(model))
    place, backbone = next((name, module) for name, module in ours.named_modules() if hasattr(module, 'liera')
                           and not invariants.frozen_by_design(ours, name))
    ours.init_weights()  # some parts begin as uninitialised memory, such as DDQ's
    ours.train()
    total(losses(ours))
    yield

    invariants.check_trainable(place, backbone)
    mine = {f'{place}.{name}' for name in intended_parameters(backbone)}
    others = {name for name in others if not name.startswith(f'{place}.')}
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == mine | others, f'{sorted(trained ^ (mine | others))[:3]} of {len(trained)}'
    yield

    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all('.adapter.' in name for name in missing), (missing[:3], unexpected[:3])
    stock.load_state_dict(weights)
    for name, teacher in vars(stock).items():
        if isinstance(teacher, torch.nn.Module):  # hidden from state dicts
            vars(ours)[name].load_state_dict(teacher.state_dict())
    theirs = stock.get_submodule(place)
    theirs.requires_grad_(False)  # torch's attention chooses its kernel by what trains
    start = features(backbone, size)
    assert equal(start, features(theirs, size)), 'other features'
    torch.save({name: tensor for name, tensor in backbone.state_dict().items() if '.adapter.' not in name},
               folder / 'base.pth')
    before = {name: p.detach().clone() for name, p in ours.named_parameters() if name in mine}
    bases = {f'{place}.{name}.adapter.{factor}': f'{place}.{name}.weight' for name, layer in adapted_layers(backbone)
             for factor, _ in layer.adapter.named_parameters()}
    # By signs, for with random weights gradients are up to 1e26, of which AdamW's squares overflow. The learning rate moves
    # offsets to within the image
    groups = [dict(params=only(bases), lr=1e-3), dict(params=only(mine.union(others).difference(bases)), lr=1e-6)]
    wrapper = OptimWrapper(torch.optim.Rprop(groups))
    watch = LossWatch(ours, wrapper)
    for each in (stock, ours):
        each.train()
    reference, now = losses(stock), losses(ours)
    different = [name for (name, x), (_, y) in zip(terms(now), terms(reference)) if not torch.equal(x, y)]
    assert not different and now.keys() == reference.keys(), f'other losses: {different[:3]}'
    yield

    invariants.check_optimizer(ours, wrapper)
    invariants.check_movable(ours)
    invariants.watch_first_step(ours, wrapper, MMLogger.get_current_instance(), watch)
    digests = invariants.frozen_digests(ours)
    assert not idle.issuperset(bases.values()), 'no layer has a gradient'
    for step in range(STEPS):
        wrapper.update_params(total(now if step == 0 else losses(ours, step)))
        stuck = [name for name, p in ours.named_parameters() if name in before and torch.equal(p, before[name])
                 and bases.get(name, name) not in idle]
        if step and not stuck:
            break
    watch.remove()
    assert not stuck, f'{len(stuck)} of {len(before)} do not move: {stuck[:3]}'
    invariants.check_frozen(ours, digests)
    yield

    trained = features(backbone, size)
    assert not equal(trained, start), 'the features are those of the start'
    liera_mm.save_adapter(backbone, folder / 'adapter.safetensors')
    torch.save(trained, folder / 'features.pth')
    stock.load_state_dict(liera_mm.export(ours), strict=True)
    for x, y in zip(trained, features(theirs, size)):
        assert (x - y).abs().max() <= 1e-4 * x.abs().max(), f'other features, by {(x - y).abs().max() / x.abs().max():.2g}'
    assert plain_config(Config(dict(model=edited(model), default_scope=scope))).model.to_dict() == plain_config(
        Config(dict(model=model, default_scope=scope))).model.to_dict(), 'another config'
    yield


def read_back(model: Dict[str, Any], scope: str, folder: Path, size: int) -> Iterator[None]:
    """The column ``file``, in a process of its own, of what :func:`try_model` has left in a folder."""
    import torch
    from mmengine.registry import MODELS, init_default_scope

    import liera_mm

    init_default_scope(scope)
    torch.manual_seed(1)
    model = edited(model)
    while 'backbone' not in model:
        model = model['detector']
    backbone = MODELS.build(model['backbone'])
    _, unexpected = backbone.load_state_dict(torch.load(folder / 'base.pth'), strict=False)
    assert not unexpected, unexpected[:3]
    liera_mm.load_adapter(backbone, folder / 'adapter.safetensors')
    assert equal(features(backbone, size), torch.load(folder / 'features.pth')), 'other features'
    yield


def features(backbone: Any, size: int) -> List[Any]:
    """What a backbone makes of a picture, in the mode of evaluation, in which it stays."""
    import torch
    backbone.eval()  # which in some returns nothing
    with torch.no_grad():
        out = backbone(torch.linspace(-2, 2, 3 * size**2).view(1, 3, size, size))
    return [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]


def equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists of tensors are the same, bit for bit."""
    import torch
    return len(a) == len(b) and all(map(torch.equal, a, b))


def describe(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def columns(trial: Callable[..., Iterator[None]], names: Sequence[str], sender: Any, memory: float, *args: Any) -> None:
    """Send, for each column, ``ok`` or what went wrong, after which there are no more."""
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), ) * 2)
    steps = trial(*args)
    for name in names:
        try:
            next(steps)
        except Exception as error:  # of every kind, as above
            sender.send((name, describe(error)))
            return
        sender.send((name, 'ok'))


def in_process(trial: Callable[..., Iterator[None]], names: Sequence[str], timeout: float, *args: Any) -> Row:
    """What :func:`columns` sends, in a process that is forked here, where nothing but imports has happened yet."""
    context, row, end = multiprocessing.get_context('fork'), {}, time.monotonic() + timeout
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=columns, args=(trial, names, sender, *args))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            name, text = receiver.recv()
            row[name] = text
        problem = f'took longer than {timeout:g} s'
    except EOFError:  # it has ended
        process.join()
        problem = f'the process ended with {process.exitcode}'
    process.kill()
    process.join()
    if len(row) < len(names) and all(text == 'ok' for text in row.values()):
        row[names[len(row)]] = problem
    return row


def try_model(model: Dict[str, Any], scope: str, args: argparse.Namespace) -> Row:
    """A row of the table: every column that was reached."""
    for size in (args.size, 4 * args.size, 8 * args.size):
        with tempfile.TemporaryDirectory() as folder:
            common = args.timeout, args.memory, model, scope, Path(folder), size
            row = in_process(try_training, COLUMNS[:-1], *common)
            if row.get(COLUMNS[-2]) == 'ok':
                row.update(in_process(read_back, COLUMNS[-1:], *common))
        if row['stock'] == 'ok':
            break
    return row


def try_zoo(args: argparse.Namespace, results: Dict[str, Dict[str, Any]]) -> None:
    """Fill in the results, which are the key of every config's model, and the row of every key."""
    folder, keys, rows = zoo(), results['configs'], results['rows']
    names = [path.relative_to(folder).as_posix() for path in folder.glob('*/*.py')]
    names = in_turns([name for name in names if not name.startswith('_base_') and any(
        fnmatch.fnmatch(name, pattern) for pattern in args.patterns)], args.one_each)
    if args.again:
        failed = {keys[name] for name in names if name in keys and rows[keys[name]].get(COLUMNS[-1]) != 'ok'}
        for key in failed:
            del rows[key]
    names = [name for name in names if keys.get(name) not in rows]
    if not names:
        return
    import torch
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    import liera_mm  # noqa: F401
    register_all_modules(init_default_scope=False)
    MMLogger.get_instance('mmengine', log_level='ERROR')
    os.chdir(folder.parent)  # teachers are given as configs/...
    torch.set_num_threads(max(torch.get_num_threads() // args.jobs, 1))
    # A worker has done nothing but import, and has no thread beside its own, when it forks a trial
    workers = ProcessPoolExecutor(args.jobs, multiprocessing.get_context('fork'))
    with workers:
        trials = {}
        for name, (model, scope, error) in zip(names, workers.map(load, [folder / name for name in names], chunksize=8)):
            if error:
                model = dict(config=name)
            elif not model:
                continue  # settings for other configs
            keys[name] = key = key_of(model)
            if error:
                rows[key] = dict(stock=error)
            elif key not in rows and key not in trials:
                trials[key] = name, workers.submit(try_model, model, scope, args)
        of = {trial: (key, name) for key, (name, trial) in trials.items()}
        for trial in as_completed(of):
            key, name = of[trial]
            rows[key] = trial.result()
            write(args.out, results)
            print(name, *list(rows[key].items())[-1], flush=True)
    write(args.out, results)


def write(path: Path, results: Dict[str, Dict[str, Any]]) -> None:
    """Write the results whole or not at all, without the configs that are yet to be tried."""
    configs = {name: key for name, key in results['configs'].items() if key in results['rows']}
    new = path.with_name(f'{path.name}.new')
    new.write_text(json.dumps(dict(results, configs=configs), indent=1))
    new.replace(path)


def table(results: Dict[str, Dict[str, Any]]) -> List[str]:
    """What was found, as lines: a summary, a row of Markdown for every folder, and what did not pass."""
    rows = {name: results['rows'][key] for name, key in results['configs'].items()}
    here = [row for row in rows.values() if row['stock'] == 'ok']
    whole = [row for row in here if row.get(COLUMNS[-1]) == 'ok']
    lines = [f'{len(whole)} of the {len(here)} configs that stock MMDetection can train here pass every column; '
             f'{len(rows) - len(here)} of {len(rows)} it cannot.',
             f'{len(results["rows"])} of them were tried; the others have the model of one of these.', '',
             f'| architecture | configs | {" | ".join(COLUMNS)} |', '| --- ' * (len(COLUMNS) + 2) + '|']
    folders = collections.defaultdict(list)
    for name, row in rows.items():
        folders[name.partition('/')[0]].append(row)
    for folder, members in sorted(folders.items()):
        counts = [str(sum(row.get(column) == 'ok' for row in members)) for column in COLUMNS]
        lines.append(f'| {folder} | {len(members)} | {" | ".join(counts)} |')
    lines.append('')
    reasons = collections.defaultdict(list)
    for name, row in sorted(rows.items()):
        column, text = list(row.items())[-1]
        if text != 'ok':
            reasons[f'{column}: {text}'].append(name)
    return lines + [f'- {reason}: {", ".join(names)}' for reason, names in sorted(reasons.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description="Try README's one edit on MMDetection's own configs")
    parser.add_argument('out', type=Path, help='JSON file with the results; goes on where it ended')
    parser.add_argument('patterns', nargs='*', default=['*'], help='globs on FOLDER/NAME.py, all by default')
    parser.add_argument('--one-each', action='store_true', help='only the first config of every folder')
    parser.add_argument('--size', type=int, default=64, help='side of the images in pixels; 4 or 8 times that if it fails')
    parser.add_argument('--jobs', type=int, default=1, help='configs at a time, of about 3 GiB and a core each')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for a config')
    parser.add_argument('--memory', type=float, default=0, help='GiB of address space for a config; 0 for no limit')
    parser.add_argument('--again', action='store_true', help='try what has not passed, of these patterns, once more')
    parser.add_argument('--table', action='store_true', help='print the table of what OUT.json has, and try nothing')
    args = parser.parse_args()
    args.out = args.out.absolute()
    results = json.loads(args.out.read_text()) if args.out.is_file() else dict(configs={}, rows={})
    if not args.table:
        try_zoo(args, results)
    print('\n'.join(table(results)))


if __name__ == '__main__':
    main()
