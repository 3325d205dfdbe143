#!/usr/bin/env python
"""Kill trainings and resume them: tools/analysis_tools/kill_test.py [--kills N].

Half of the kills (SIGKILL) come at a random moment of the training, half at a random moment of saving a checkpoint. After
each, `tools/train.py --resume` has to finish, and end with the weights, optimizer, schedule and random numbers of a training
that was never killed, bit for bit. It trains a small detector on the CPU, for seconds.
"""
import argparse
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List, Optional, Tuple

import torch

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine import checkpoint as engine_checkpoint
from liera_mm.engine.safe_loading import latest_checkpoint, read_checkpoint

# isort: split
import mmdet.apis  # noqa: F401  loaded once here, not in every training
from yapf.yapflib import yapf_api

CONFIG = 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
EPOCHS = 3
OPTIONS = [
    f'train_cfg.max_epochs={EPOCHS}', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2',
    'train_dataloader.dataset.pipeline.2.scale=(64,64)', 'val_dataloader.dataset.pipeline.1.scale=(64,64)',
    'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.save_best=coco/bbox_mAP',
    'model.backbone.drop_path_rate=.1',
    *(f'{split}_dataloader.{option}' for split in ('train', 'val')
      for option in ('num_workers=0', 'persistent_workers=False'))
]
SAVING = .05  # seconds, about as long as a save takes
COMPARED = ('state_dict', 'optimizer', 'param_schedulers', 'random_states')


def start(work_dir: Path, data: Path, resume: bool) -> Tuple[int, int]:
    """Start tools/train.py in a fork of this process; returns its id, and a file that gets a byte as each save begins."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    try:
        work_dir.mkdir(exist_ok=True)
        log = os.open(work_dir / 'log', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        leave_out_base = engine_checkpoint.leave_out_base

        def tell(*args) -> None:
            os.write(writer, b'.')
            leave_out_base(*args)

        engine_checkpoint.leave_out_base = tell
        yapf_api.FormatCode = lambda text, **_: (text, True)  # MMEngine prints its config nicely, for half of the time
        sys.argv = ['train.py', CONFIG, *['--resume'] * resume, '--work-dir', str(work_dir), '--cfg-options', *OPTIONS,
                    f'data_root={data}']
        runpy.run_path('tools/train.py', run_name='__main__')
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(1)


def finish(child: int, reader: int) -> bool:
    """Wait for a training; whether it ended well."""
    os.close(reader)
    return os.waitpid(child, 0)[1] == 0


def kill(child: int, reader: int, after: float, save: Optional[int]) -> int:
    """Kill a training some seconds after it, or its n-th save, has begun; returns how many saves had begun."""
    saves = len(os.read(reader, 1)) if save else 0
    while save and 0 < saves < save:
        saves += len(os.read(reader, 1)) or -saves  # nothing: it has ended
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while os.read(reader, 1):
        saves += 1
    os.close(reader)
    return saves


def differences(work_dir: Path, reference: Path) -> List[str]:
    """What the last checkpoints of two trainings do not have in common, bit for bit."""
    ours, theirs = (read_checkpoint(folder / f'epoch_{EPOCHS}.pth') for folder in (work_dir, reference))
    return [key for key in COMPARED if not same(ours[key], theirs[key])]


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description='Kill trainings and resume them')
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, reference = Path(folder, 'data'), Path(folder, 'reference')
        subprocess.run([sys.executable, 'tools/dataset_converters/make_digits_coco.py', str(data), '--train', '4', '--val',
                        '2', '--size', '64', '--workers', '1'], check=True, capture_output=True)
        begin = time.time()
        child, reader = start(reference, data, resume=False)
        times = []
        while os.read(reader, 1):
            times.append(time.time() - begin)
        if not finish(child, reader):
            sys.exit((reference / 'log').read_text())
        duration = time.time() - begin
        print(f'a training takes {duration:.1f} s and saves {len(times)} times')
        before, torn, lost, different = 0, 0, 0, 0
        for trial in range(args.kills):
            work_dir = Path(folder, str(trial))
            save = rng.randint(1, len(times)) if trial % 2 else None
            after = rng.uniform(0, SAVING if save else duration)
            saves = kill(*start(work_dir, data, resume=False), after, save)
            found = latest_checkpoint(str(work_dir))
            before += found is None
            torn += any(work_dir.glob('*.partial'))
            problem = ''
            if saves > 1 and found is None:
                problem = 'its checkpoints are gone'
            elif not finish(*start(work_dir, data, resume=True)):
                problem = 'it does not resume'
            lost += bool(problem)
            if not problem:
                keys = differences(work_dir, reference)
                different += bool(keys)
                problem = f'it ends with another {", ".join(keys)}' if keys else ''
            where = f'save {save} + {1000 * after:.0f} ms' if save else f'{after:.1f} s'
            print(f'kill {trial + 1} at {where}: {problem or "resumed"}', flush=True)
            if problem:
                print((work_dir / 'log').read_text()[-3000:])
            subprocess.run(['rm', '-r', str(work_dir)], check=True)
    print(f'{args.kills} kills, {before} of them before there was a checkpoint, {torn} within the writing of one: '
          f'{lost} lost runs, {different} silent differences')
    sys.exit(bool(lost or different))


if __name__ == '__main__':
    main()
