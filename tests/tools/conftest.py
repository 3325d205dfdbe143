"""Tiny data sets, and the tools as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='session')
def run_tool():
    """A function that runs a tool on the CPU in a process of its own, and gives what it printed."""

    def run(name, *args, fails=False):
        command = [sys.executable, ROOT / 'tools' / name, *map(str, args)]
        env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert bool(result.returncode) == fails, result.stdout[-2000:] + result.stderr[-4000:]
        return result.stdout + result.stderr

    return run


# Stock MMDetection has compiled operators. Their stand-in is loaded under another name, and nothing else of this package
# can be imported.
STOCK = '''
import importlib.util, sys
spec = importlib.util.spec_from_file_location('stand_in', {stand_in!r})
sys.modules['stand_in'] = stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)
stand_in.install()
sys.modules['liera_mm'] = None

import torch
torch.set_num_threads(1)
'''


@pytest.fixture(scope='session')
def run_stock():
    """A function that runs Python code in a process that has MMDetection, but not this package."""

    def run(code, *args, cwd):
        code = STOCK.format(stand_in=str(ROOT / 'liera_mm/compat/__init__.py')) + code
        command = [sys.executable, '-c', code, *map(str, args)]
        env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
        result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        assert not result.returncode, result.stdout[-2000:] + result.stderr[-4000:]

    return run


@pytest.fixture(scope='session')
def tiny_digits(make_once, run_tool):
    """Folder of six images to train on and three to validate on."""
    return make_once('tiny_digits', lambda out: run_tool(
        'dataset_converters/make_digits_coco.py', out, '--train', 6, '--val', 3, '--size', 160, '--workers', 1))


@pytest.fixture(scope='session')
def tiny_coco(make_once, run_tool):
    """Folder of four images to train on and two to validate on, whose digits bear the names of COCO."""
    return make_once('tiny_coco', lambda out: run_tool(
        'dataset_converters/make_digits_coco.py', out, '--train', 4, '--val', 2, '--size', 64, '--workers', 1,
        '--coco-names'))


@pytest.fixture(scope='session')
def tiny_options(tiny_digits):
    """Options that let tools/train.py and tools/test.py run a digits config on it in seconds."""
    return [
        '--cfg-options', f'data_root={tiny_digits}', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
        'train_dataloader.batch_size=2',
        'model.test_cfg.rcnn.score_thr=0.', 'model.test_cfg.rcnn.max_per_img=100',
        'optim_wrapper.optimizer.lr=5e-3', 'param_scheduler.0.start_factor=1.',
        'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=2',
        *(f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
          for option in ('num_workers=0', 'persistent_workers=False')),
    ]
