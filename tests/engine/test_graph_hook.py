"""CUDAGraphHook in MMEngine's Runner, with a stand-in for the graphs: a training is the same with it and without."""
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from recorded import Recorded

from liera_mm.core.errors import SetupError
from liera_mm.models.graphs import Graphs

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')


class Watch(Hook):
    """Keeps the losses, and what was captured of each module."""
    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.losses = []
        forwards = {name: each.forward for name, each in runner.model.named_modules()}
        self.forwards = {name: each for name, each in forwards.items() if isinstance(each, Graphs)}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())


def train(make_runner, hooks, **options):
    runner = make_runner(custom_hooks=[dict(type='LieRAHook'), *hooks], **options)
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    return runner, watch


def test_training_is_the_same(make_runner):
    """With averaged weights, accumulated gradients, validation, and another epoch after that."""
    options = {'train_cfg.max_epochs': 2, 'optim_wrapper.accumulative_counts': 2}
    graphs = dict(type='CUDAGraphHook', modules=['backbone', 'neck', 'rpn_head'], capture=Recorded)
    (runner, ours), (twin, theirs) = (
        train(make_runner, [dict(type='EMAHook'), *hooks], **options) for hooks in ([graphs], []))
    assert ours.forwards.keys() == {'backbone', 'neck', 'rpn_head'} and not theirs.forwards
    assert all(each.captured == 1 for each in ours.forwards.values())
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(runner.model.state_dict(), twin.model.state_dict(), rtol=1e-3, atol=1e-5)
    assert not any('forward' in vars(module) for module in runner.model.modules())


def test_without_a_gpu_the_log_says_so(make_runner):
    runner, watch = train(make_runner, [dict(type='CUDAGraphHook')])
    log = Path(runner.log_dir, f'{runner.timestamp}.log').read_text()
    assert not watch.forwards and 'LieRA  no CUDA graphs: the model is not on a CUDA device' in log


def test_unknown_module(make_runner):
    with pytest.raises(SetupError, match='(?s)no module \'backbon\'.*backbone'):
        train(make_runner, [dict(type='CUDAGraphHook', modules=['backbon'])])
