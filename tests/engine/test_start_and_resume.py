"""An adapted network starts as the pretrained one and resumes as it was saved, with every method and update.

On a small classifier, since the life of the weights in MMEngine's Runner is the same for all models.
"""
import contextlib
import copy
import itertools
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from pictures import IMAGES

from liera_mm.core.algebra import METHODS
from liera_mm.core.group import UPDATES
from liera_mm.engine.cli import load_config

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

CONFIG = Path(__file__).parents[2] / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
BACKBONE = load_config(str(CONFIG)).model.backbone.to_dict()

# Every method, and every update more than once; every pair starts as the network was in tests/core/test_adapt.py
every_setting = pytest.mark.parametrize(
    'setting', [dict(rank=2, method=method, update=update) for method, update in zip(METHODS, itertools.cycle(UPDATES))],
    ids=lambda setting: f'{setting["method"]}-{setting["update"]}')


class Watch(Hook):
    """Notes what the backbone computes at the start and after each epoch, and the loss of each iteration."""
    priority = 'LOWEST'

    def __init__(self, until=None):
        self.until, self.outputs, self.losses = until, [], []

    def before_train(self, runner):
        self.outputs.append(features(runner.model.backbone))
        if self.until == 'start':
            raise Stopped

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())

    def after_train_epoch(self, runner):
        self.outputs.append(features(runner.model.backbone))
        if self.until == 'epoch_1':
            raise Stopped


class Stopped(Exception):
    pass


@torch.no_grad()
def features(backbone):
    """What a backbone gives for some images, at each of its stages."""
    return backbone(IMAGES[:2])


def assert_equal(ours, theirs):
    """Bit for bit."""
    assert len(ours) == len(theirs) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.fixture(scope='module')
def train(on_the_cpu, tmp_path_factory):
    """A function that trains an adapted classifier for two epochs of three steps, and gives its work dir and a Watch."""
    count = itertools.count()

    def run(setting, init_cfg=BACKBONE['init_cfg'], until=None, lr=.01, **options):
        work_dir, watch = tmp_path_factory.mktemp('work_dir'), Watch(until)
        runner = Runner(
            dict(type='PictureClassifier', backbone=dict(BACKBONE, liera=setting, init_cfg=init_cfg)),
            str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='Pictures', images=12), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate')),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=lr)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='LieRAHook')],
            randomness=dict(seed=0),
            log_level='ERROR',
            experiment_name=f'start_{next(count)}',  # MMEngine would share the visualizer of equal names
            **options)
        runner.register_hook(watch)
        with contextlib.suppress(Stopped):
            runner.train()
        return work_dir, watch

    return run


@pytest.fixture(scope='module')
def frozen():
    """The pretrained backbone without adapters."""
    backbone = MODELS.build(dict(BACKBONE, liera=None))
    backbone.init_weights()
    return backbone


@every_setting
def test_starts_as_the_weights_of_init_cfg(train, frozen, setting):
    _, watch = train(setting, until='start')
    assert_equal(watch.outputs[0], features(frozen))


@every_setting
@pytest.mark.parametrize('init_cfg', [None, BACKBONE['init_cfg']], ids=['alone', 'after-init_cfg'])
def test_starts_as_the_weights_of_load_from(train, frozen, setting, init_cfg, tmp_path):
    """They are others than those of init_cfg, by which a start that was computed too early would show."""
    other = copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + .1 * torch.randn_like(parameter))
    torch.save({f'backbone.{name}': tensor for name, tensor in other.state_dict().items()}, tmp_path / 'other.pth')
    _, watch = train(setting, init_cfg, until='start', load_from=str(tmp_path / 'other.pth'))
    assert_equal(watch.outputs[0], features(other))
    assert not torch.equal(watch.outputs[0][0], features(frozen)[0])


@every_setting
def test_resuming_continues_the_curve(train, frozen, setting):
    work_dir, straight = train(setting)
    _, resumed = train(setting, resume=True, load_from=str(work_dir / 'epoch_1.pth'))
    assert_equal(resumed.outputs[0], straight.outputs[1])
    assert not torch.equal(straight.outputs[1][0], features(frozen)[0])
    assert len(straight.losses) == 6 and len(set(straight.losses)) == 6
    assert resumed.losses == pytest.approx(straight.losses[3:], rel=0, abs=1e-6)
    for ours, theirs in zip(resumed.outputs[1], straight.outputs[2]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@every_setting
def test_resumes_as_the_pretrained_weights_before_anything_was_learned(train, frozen, setting):
    work_dir, _ = train(setting, until='epoch_1', lr=0.)
    _, watch = train(setting, until='start', resume=True, load_from=str(work_dir / 'epoch_1.pth'))
    assert_equal(watch.outputs[0], features(frozen))
