"""A tiny data set, and Runners of the digits configs on it."""
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.runner import Runner

from liera_mm.engine.cli import load_config

ROOT = Path(__file__).parents[2]
DIGITS_CONFIG = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'


@pytest.fixture(scope='module')
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.device.utils.DEVICE', 'cpu')
        # Half of the time of so short a training went into printing its config nicely
        for place in ('yapf.yapflib.yapf_api', 'mmengine.config.config'):  # MMEngine 0.10.7 has it in the latter
            patch.setattr(f'{place}.FormatCode', lambda text, **_: (text, True), raising=False)
        yield


@pytest.fixture(scope='session')
def digits(make_once):
    """Folder of four images to train on and two to validate on."""
    options = ['--train', '4', '--val', '2', '--size', '64', '--workers', '1']
    return make_once('digits', lambda out: subprocess.run(
        [sys.executable, ROOT / 'tools/dataset_converters/make_digits_coco.py', out, *options],
        check=True, capture_output=True))


@pytest.fixture(scope='session')
def make_runner(digits, tmp_path_factory):
    """A function that makes a Runner, for one epoch of two iterations; options are keys of the config."""
    count = itertools.count()

    def make(config=DIGITS_CONFIG, **options):
        cfg = load_config(str(config), dict(data_root=str(digits)))
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.update(num_workers=0, persistent_workers=False)
            next(step for step in loader.dataset.pipeline if step.type == 'Resize').scale = (64, 64)
        cfg.train_dataloader.batch_size = 2
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
        cfg.default_hooks.logger.interval = 1
        cfg.param_scheduler = None
        cfg.merge_from_dict(options)
        cfg.work_dir = str(tmp_path_factory.mktemp('work_dir'))
        # MMEngine would share what goes by one name
        cfg.experiment_name = cfg.visualizer.name = f'test_{next(count)}'
        return Runner.from_cfg(cfg)

    return make
