"""What LieRAHook watches while a detector trains: each test has a hook or a layer that breaks it."""
import logging
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from torch import nn

import liera_mm
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.errors import SetupError
from liera_mm.engine import invariants
from liera_mm.engine.watches import GradientWatch

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

FROZEN = 'backbone.stages.1.0.depthwise_conv.weight'
TRAINED = 'backbone.stages.1.0.depthwise_conv.adapter.B'
OVERFLOWS = 'neck.lateral_convs.1.conv.weight'
DIGITS = Path(__file__).parents[2] / 'configs/digits'


class Sabotage(Hook):
    """Calls a function with the runner, once, at one of the points of a training."""
    priority = 'VERY_LOW'

    def __init__(self, point, function):
        setattr(self, point, self.call)
        self.function = function

    def call(self, runner, *args, **kwargs):
        if self.function:
            self.function(runner)
        self.function = None


def parameter(runner, name):
    return dict(runner.model.named_parameters())[name]


def train(make_runner, point, function, **options):
    """The runner of a training with a sabotage that it survives."""
    runner = make_runner(**options)
    runner.register_hook(Sabotage(point, function))
    runner.train()
    return runner


def stops(message, make_runner, point, function, **options):
    """Check that a training with a sabotage ends in an error of two lines, and saves nothing."""
    runner = make_runner(**options)
    runner.register_hook(Sabotage(point, function))
    with pytest.raises(SetupError, match=message) as error:
        runner.train()
    assert len(str(error.value).splitlines()) == 2
    assert not [*Path(runner.work_dir).glob('*.pth')]


# Frozen tensors

@pytest.mark.parametrize('method, name', [
    ('lora', FROZEN),
    ('lora', 'backbone.stages.0.0.grn.gamma'),
    ('pissa', 'backbone.stages.1.0.depthwise_conv.adapter.A0'),
])
def test_frozen_tensor_changes(make_runner, method, name):

    def change(runner):
        runner.model.state_dict()[name].mul_(1.001)

    stops(rf'1 of \d+ frozen tensors have changed while training: {name}', make_runner, 'after_train_iter', change,
          **{'model.backbone.liera.method': method})


def test_frozen_tensor_is_decayed(make_runner):
    """A step on it that needs no gradient."""

    def decay(runner):
        step = runner.optim_wrapper.step

        def step_and_decay(**kwargs):
            step(**kwargs)
            with torch.no_grad():
                parameter(runner, FROZEN).mul_(1 - 1e-4)

        runner.optim_wrapper.step = step_and_decay

    stops(f'1 of .* frozen tensors have changed while training: {FROZEN}', make_runner, 'before_train', decay)


def test_merged_weights_have_not_changed(make_runner):
    model = make_runner().model
    before = invariants.frozen_digests(model)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.adapter.B.add_(.1)
    liera_mm.merge(model)
    assert invariants.frozen_digests(model) == before
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    units = {f'{name}.adapter.rms' for name, _ in adapted_layers(model)}  # what adapters keep fixed
    assert before.keys() == units | {name for name, _ in model.backbone.named_parameters('backbone')} - trained


# Gradients

def test_frozen_tensor_is_unfrozen(make_runner):
    """As by a hook of layer-wise unfreezing; it is in the optimizer already, or comes with a group of its own."""

    def unfreeze(runner):
        parameter(runner, FROZEN).requires_grad_(True)
        runner.optim_wrapper.optimizer.add_param_group(dict(params=[parameter(runner, FROZEN)]))

    stops(f'1 frozen tensors have a gradient, and would train and decay: {FROZEN}', make_runner, 'before_train', unfreeze)


def test_frozen_tensor_in_the_optimizer_stays_as_it_is(make_runner):
    """MMEngine puts all parameters in if there is no paramwise_cfg."""
    kept = {}

    def keep(runner):
        kept[FROZEN] = parameter(runner, FROZEN).clone()

    runner = train(make_runner, 'before_train', keep, **{'optim_wrapper.paramwise_cfg': None})
    assert any(p is parameter(runner, FROZEN) for group in runner.optim_wrapper.param_groups for p in group['params'])
    assert torch.equal(parameter(runner, FROZEN), kept[FROZEN])


def detach(runner):
    """Let a layer of the backbone compute with a detached Δ."""
    layer = runner.model.backbone.stages[1][0].depthwise_conv
    factors = layer.adapter.factors
    layer.adapter.factors = lambda: tuple(factor.detach() for factor in factors())


@pytest.mark.parametrize('options', [
    {},
    {'optim_wrapper.accumulative_counts': 2},
    {'custom_hooks': [dict(type='LieRAHook'), dict(type='EMAHook')]},
], ids=['plain', 'accumulated', 'averaged'])
def test_trained_tensor_without_a_gradient(make_runner, options):
    stops('2 trained tensors of the backbone had no gradient in the first step: '
          'backbone.stages.1.0.depthwise_conv.adapter.A, backbone.stages.1.0.depthwise_conv.adapter.B', make_runner,
          'before_train', detach, **options)


def log_of(runner):
    log, = Path(runner.log_dir).glob('*.log')
    return log.read_text()


UNUSED = {'model.backbone.out_indices': [0, 1, 2], 'model.neck.in_channels': [24, 48, 96]}


def test_part_of_the_backbone_that_the_detector_does_not_use(make_runner):
    """Here the last stage; with train_norm its norms too. It stays as it is, and checkpoints go on."""
    runner = make_runner(**UNUSED, **{'model.backbone.liera.train_norm': True})
    weight = runner.model.backbone.stages[3][0].depthwise_conv.frozen_weight
    runner.train()
    assert 'LieRA  the detector does not use parts of the backbone: ' in log_of(runner)
    assert not any(layer.adapter.B.any() for _, layer in adapted_layers(runner.model.backbone.stages[3]))
    assert all(layer.adapter.B.any() for _, layer in adapted_layers(runner.model.backbone.stages[2]))
    assert not weight.requires_grad and not any(layer.merged for _, layer in adapted_layers(runner.model))
    resumed = make_runner(**UNUSED, **{'model.backbone.liera.train_norm': True}, resume=True,
                          load_from=str(Path(runner.work_dir, 'epoch_1.pth')))
    resumed.load_or_resume()


def test_part_that_is_named_but_not_used(make_runner):
    stops(r'\d+ layers that targets name had no gradient in the first step: backbone.stages.3', make_runner, 'before_train',
          lambda runner: None, **UNUSED, **{'model.backbone.liera.targets': ['stages.*']})


def test_part_that_is_not_used_among_several_processes(make_runner):
    def replicate(runner):
        runner.model.find_unused_parameters = False

    stops('of parts of the backbone that the detector does not use: .*stages.3', make_runner, 'before_run', replicate,
          **UNUSED)


def spoil(runner):
    layer = runner.model.backbone.stages[1][0].depthwise_conv
    layer.adapter.B.register_hook(lambda grad: grad * float('nan'))


@pytest.mark.parametrize('options', [
    {},
    {'optim_wrapper.clip_grad': dict(max_norm=1.)},
    {'optim_wrapper.accumulative_counts': 2},
], ids=['plain', 'clipped', 'accumulated'])
def test_gradient_that_is_not_finite(make_runner, options):
    runner = make_runner(**options)
    runner.register_hook(Sabotage('before_train', spoil))
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    with pytest.raises(SetupError, match=f'^The gradient of {TRAINED} is not finite, nor that of 0 other') as error:
        runner.train()
    assert len(str(error.value).splitlines()) == 2
    if 'optim_wrapper.accumulative_counts' not in options:
        trained = {name for name, p in runner.model.named_parameters() if p.requires_grad and name.startswith('backbone')}
        now = dict(runner.model.named_parameters())
        assert all(torch.equal(now[name], before[name]) for name in trained if name.endswith('.B'))
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert not [*Path(runner.work_dir).glob('*.pth')]


def test_gradient_that_is_known_to_be_broken_only_after_the_step():
    """As on a GPU, for which the host does not wait: the step is made with zeros, and what follows is refused."""
    model = nn.Linear(2, 2)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=.1))
    watch = GradientWatch(model, wrapper)
    step = torch.optim.SGD.step

    class Late:
        def query(self):
            return False

        def synchronize(self):
            pass

    def later(*args):
        names, finite, _ = watch.noted
        watch.noted = names, finite, Late()

    handle = wrapper.optimizer.register_step_pre_hook(later)
    wrapper.optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)
    before = model.weight.clone()
    model(torch.full((1, 2), float('nan'))).sum().backward()
    wrapper.step()
    assert torch.equal(model.weight, before)
    with pytest.raises(SetupError, match='The gradient of '):
        watch.check()
    watch.remove()
    assert wrapper.step.__func__ is OptimWrapper.step and torch.optim.SGD.step is step


def test_gradients_under_a_scaler_are_its_own_affair():
    wrapper = OptimWrapper(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=.1))
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    assert not GradientWatch(nn.Linear(2, 2), wrapper).handles


def test_part_of_the_head_without_a_gradient(make_runner):
    """Some detectors have parameters that they don't use."""
    runner = make_runner()
    runner.model.rpn_head.unused = nn.Linear(2, 2)
    runner.train()
    text = log_of(runner)
    assert '2 trained tensors had no gradient in the first step: rpn_head.unused.bias, rpn_head.unused.weight' in text


def test_gradients_are_looked_at_in_the_first_step_only(make_runner):
    train(make_runner, 'after_train_iter', detach)


def test_step_that_is_skipped_is_not_the_first():
    """As by a GradScaler that has found infinite gradients."""
    model = nn.Linear(2, 2)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=.1))
    logger = logging.getLogger('skipped')
    invariants.watch_first_step(model, wrapper, logger)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.)
    for value in (float('inf'), 1.):
        before = model.weight.clone()
        scaler.scale((model(torch.ones(1, 2)) * value).sum()).backward()
        scaler.step(wrapper.optimizer)
        scaler.update()
        wrapper.optimizer.zero_grad()
        assert torch.equal(model.weight, before) == (value != 1)


# Losses

def set_values(name, value):

    @torch.no_grad()
    def function(runner):
        parameter(runner, name).fill_(value)

    return function


@pytest.mark.parametrize('point, name, value, update, where', [
    ('after_train_iter', TRAINED, float('nan'), 'taylor', f'{TRAINED} has values that are not finite'),
    ('before_train', TRAINED, 1e3, 'exp',
     'the effective weight of backbone.stages.1.0.depthwise_conv is not finite, with .Δ. up to '),
    ('after_train_iter', OVERFLOWS, 1e38, 'taylor',
     'all weights are finite, but the output of neck.lateral_convs.1.conv is not; the largest .Δ. is 0.* in backbone.'),
    ('before_train', 'rpn_head.rpn_cls.bias', float('inf'), 'taylor',
     'rpn_head.rpn_cls.bias has values that are not finite'),
])
def test_loss_that_is_not_finite(make_runner, point, name, value, update, where):
    stops(rf'The loss is not finite \(loss_rpn_cls.*\): {where}', make_runner, point, set_values(name, value),
          **{'model.backbone.liera.update': update})


def test_nothing_has_moved_by_a_loss_that_is_not_finite(make_runner):
    """So that who catches the error has the weights that gave the loss."""
    runner = make_runner()
    runner.register_hook(Sabotage('before_train', set_values(TRAINED, float('nan'))))
    with pytest.raises(SetupError):
        runner.train()
    broken = [name for name, p in runner.model.named_parameters() if not p.isfinite().all()]
    assert broken == [TRAINED]


def test_no_layer_is_adapted(make_runner):
    stops('The loss is not finite .*: all weights are finite, but the output of neck.lateral_convs.1.conv is not\n',
          make_runner, 'before_train', set_values(OVERFLOWS, 1e38),
          config=DIGITS / 'mask-rcnn_convnextv2-mini_frozen_digits.py')


def test_nothing_stays_on_the_model(make_runner):
    runner = train(make_runner, 'before_train', lambda runner: None)
    assert not runner.model._forward_hooks
