"""Merged parameter groups: fewer of them, and nothing else is different: weights, schedules, checkpoints, what resumes."""
import contextlib
import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner
from pictures import IMAGES  # noqa: F401  (registers the classifier)
from torch import nn

from liera_mm.engine import LieRAHook
from liera_mm.engine.cli import load_config
from liera_mm.engine.param_groups import MergedGroups

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

CONFIG = Path(__file__).parents[2] / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
BACKBONE = load_config(str(CONFIG)).model.backbone.to_dict()
OPTIMIZERS = dict(
    adamw=dict(type='AdamW', lr=.1, weight_decay=.1),
    sgd=dict(type='SGD', lr=.1, momentum=.9, weight_decay=.1),
    capturable=dict(type='AdamW', lr=torch.tensor(.1), weight_decay=.1, foreach=False))
PARAMWISE = dict(
    defaults=dict(norm_decay_mult=0., bias_decay_mult=0.),
    custom=dict(norm_decay_mult=0., custom_keys={'0.weight': dict(lr_mult=.1), '3': dict(lr_mult=.5, decay_mult=2.)}))
SCHEDULES = dict(
    none=[],
    warmup=[dict(type='LinearLR', start_factor=.1, by_epoch=False, end=3),
            dict(type='MultiStepLR', by_epoch=False, milestones=[4, 6], gamma=.1)],
    cosine=[dict(type='CosineAnnealingLR', T_max=8, eta_min_ratio=.1, by_epoch=False)],
    restarts=[dict(type='CosineRestartLR', periods=[3, 5], restart_weights=[1, .5], eta_min=1e-3, by_epoch=False)],
    momentum=[dict(type='StepMomentum', step_size=2, gamma=.5, by_epoch=False)],
    plateau=[dict(type='ReduceOnPlateauLR', monitor='loss', patience=1, min_value=1e-3)],
    one_cycle=[dict(type='OneCycleLR', eta_max=.2, total_steps=12, by_epoch=False)])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def make(optimizer='adamw', paramwise='defaults', schedule='warmup'):
    """A network, the wrapper of its optimizer, and schedulers."""
    model = network()
    wrapper = build_optim_wrapper(model, dict(optimizer=OPTIMIZERS[optimizer], paramwise_cfg=PARAMWISE[paramwise]))
    schedulers = [PARAM_SCHEDULERS.build(dict(cfg, optimizer=wrapper)) for cfg in copy.deepcopy(SCHEDULES[schedule])]
    return model, wrapper, schedulers


def train(model, wrapper, schedulers, steps=range(8)):
    for step in steps:
        loss = model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean()
        wrapper.update_params(loss)
        for scheduler in schedulers:
            scheduler.step(dict(loss=loss.item())) if hasattr(scheduler, 'min_values') else scheduler.step()


def plain(state):
    """A state dict by the parameters' positions, whatever they are numbered."""
    if 'param_groups' not in state:
        return state
    numbers = [number for group in state['param_groups'] for number in group['params']]
    groups = [{**group, 'params': [numbers.index(n) for n in group['params']]} for group in state['param_groups']]
    return {**state, 'param_groups': groups, 'state': {numbers.index(n): value for n, value in state['state'].items()}}


def assert_same(ours, theirs):
    """Bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same(a, b)
    else:
        assert ours == theirs or callable(theirs)


def settings(group):
    return {key: value for key, value in group.items() if key not in ('params', 'param_names')}


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('paramwise, few', [('defaults', 2), ('custom', 4)])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_training_and_checkpoints_are_the_same(optimizer, paramwise, few, schedule):
    model, wrapper, schedulers = make(optimizer, paramwise, schedule)
    twin, twin_wrapper, twin_schedulers = make(optimizer, paramwise, schedule)
    groups = MergedGroups(wrapper.optimizer, schedulers)
    assert len(twin_wrapper.optimizer.param_groups) == 10 and len(wrapper.optimizer.param_groups) == few
    train(model, wrapper, schedulers)
    train(twin, twin_wrapper, twin_schedulers)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(plain(wrapper.state_dict()), plain(twin_wrapper.state_dict()))
    assert_same(groups.split_schedulers([s.state_dict() for s in schedulers]), [s.state_dict() for s in twin_schedulers])
    assert wrapper.get_lr()['lr'][0] == twin_wrapper.get_lr()['lr'][0]  # what is logged
    groups.remove()
    assert_same([settings(g) for g in wrapper.param_groups], [settings(g) for g in twin_wrapper.param_groups])
    assert_same([s.state_dict() for s in schedulers], [s.state_dict() for s in twin_schedulers])
    train(model, wrapper, schedulers, range(1, 3))
    train(twin, twin_wrapper, twin_schedulers, range(1, 3))
    assert_same(model.state_dict(), twin.state_dict())


def test_every_parameter_is_in_one_group_with_its_settings():
    model, wrapper, schedulers = make(paramwise='custom')
    before = {id(p): settings(group) for group in wrapper.optimizer.param_groups for p in group['params']}
    MergedGroups(wrapper.optimizer, schedulers)
    after = {id(p): settings(group) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert sum(len(group['params']) for group in wrapper.optimizer.param_groups) == len(after) == len(before) == 10
    assert_same(after, before)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('saved', [False, True])
@pytest.mark.parametrize('resumed', [False, True])
def test_resumes_with_and_without_merging(schedule, saved, resumed):
    straight = make(schedule=schedule)
    train(*straight)
    first = make(schedule=schedule)
    groups = MergedGroups(first[1].optimizer, first[2]) if saved else None
    train(*first, range(4))
    states = [scheduler.state_dict() for scheduler in first[2]]
    states = groups.split_schedulers(states) if saved else states
    file = copy.deepcopy([first[0].state_dict(), first[1].state_dict(), states])
    model, wrapper, schedulers = make(schedule=schedule)
    model.load_state_dict(file[0])
    wrapper.load_state_dict(file[1])
    for scheduler, state in zip(schedulers, file[2]):
        scheduler.load_state_dict(state)
    if resumed:
        MergedGroups(wrapper.optimizer, schedulers)
        assert len(wrapper.optimizer.param_groups) == 2
    train(model, wrapper, schedulers, range(4, 8))
    assert_same(model.state_dict(), straight[0].state_dict())


def test_groups_that_a_checkpoint_tells_apart_stay_apart():
    """Also if it is loaded in the middle, as by a hook that goes back to the last good one."""
    _, other, _ = make()
    other.optimizer.param_groups[2]['lr'] = .123
    model, wrapper, schedulers = make()
    groups = MergedGroups(wrapper.optimizer, schedulers)
    train(model, wrapper, schedulers, range(2))
    wrapper.load_state_dict(copy.deepcopy(other.state_dict()))
    assert [len(group['params']) for group in wrapper.optimizer.param_groups] == [3, 6, 1]
    assert wrapper.optimizer.param_groups[2]['lr'] == .123
    assert_same(plain(wrapper.state_dict()), plain(other.state_dict()))
    assert [len(scheduler.base_values) for scheduler in schedulers] == [4, 4]  # and the base settings
    assert len(groups.split_schedulers([schedulers[0].state_dict()])[0]['base_values']) == 11


def test_a_scheduler_tells_groups_apart():
    model, wrapper, _ = make()
    limits = [.01] * 9 + [.02]
    scheduler = PARAM_SCHEDULERS.build(
        dict(type='ReduceOnPlateauLR', monitor='loss', min_value=limits, optimizer=wrapper))
    groups = MergedGroups(wrapper.optimizer, [scheduler])
    assert [len(group['params']) for group in wrapper.optimizer.param_groups] == [3, 6, 1]
    assert scheduler.min_values == [.01, .01, .02, .02]
    assert groups.split_schedulers([scheduler.state_dict()])[0]['min_values'] == [*limits, .02]


def test_names_of_parameters_and_groups_that_come_later():
    model = network()
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    optimizer = torch.optim.SGD([dict(params=[p], param_names=[name], weight_decay=float(p.dim() > 1)) for name, p in named])
    groups = MergedGroups(optimizer)
    assert optimizer.param_groups[0]['param_names'] == [name for name, p in named if p.dim() > 1]
    late = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group(dict(params=[late], param_names=['late'], weight_decay=7.))
    state = optimizer.state_dict()
    assert [group['param_names'] for group in state['param_groups']] == [[name] for name, _ in named] + [['late']]
    optimizer.load_state_dict(state)
    groups.remove()
    assert all(group['params'][0] is p for group, p in zip(optimizer.param_groups, [p for _, p in named] + [late]))


def test_optimizers_that_keep_groups_of_their_own_are_left_alone():
    model, wrapper, schedulers = make()
    wrapper.optimizer.consolidate_state_dict = lambda to=0: None  # as ZeroRedundancyOptimizer has
    groups = MergedGroups(wrapper.optimizer, schedulers)
    states = [scheduler.state_dict() for scheduler in schedulers]
    assert len(wrapper.optimizer.param_groups) == 10
    assert_same(groups.split_schedulers(states), states)
    groups.remove()
    MergedGroups(SimpleNamespace(param_groups=[dict(params=[1]), dict(params=[2])]), schedulers).remove()
    assert [len(scheduler.base_values) for scheduler in schedulers] == [11, 11]


# In a Runner


class Watch(Hook):
    """Notes the groups, their learning rates and the loss of each iteration."""
    priority = 'LOWEST'

    def __init__(self):
        self.groups, self.rates, self.losses = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        groups = runner.optim_wrapper.optimizer.param_groups
        self.groups.append(len(groups))
        self.rates.append({id(p): group['lr'] for group in groups for p in group['params']})
        self.losses.append(outputs['loss'].item())


@pytest.fixture(scope='module')
def run(on_the_cpu, tmp_path_factory):
    """A function that trains a classifier for two epochs of three steps, and gives its work dir and a Watch."""
    count = itertools.count()

    def train(**options):
        work_dir, watch = tmp_path_factory.mktemp('work_dir'), Watch()
        runner = Runner(
            dict(type='PictureClassifier', backbone=dict(BACKBONE, liera=dict(rank=2))),
            str(work_dir),
            train_dataloader=dict(
                dataset=dict(type='Pictures', images=12), batch_size=4, sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate')),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=.1, weight_decay=.1), clip_grad=dict(max_norm=1e9),
                paramwise_cfg=dict(norm_decay_mult=0., custom_keys={'head': dict(lr_mult=.1)})),
            param_scheduler=[dict(type='LinearLR', start_factor=.1, by_epoch=False, end=2),
                             dict(type='CosineAnnealingLR', T_max=2, eta_min_ratio=.1, convert_to_iter_based=True)],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            custom_hooks=[dict(type='LieRAHook')],
            randomness=dict(seed=0),
            log_level='ERROR',
            experiment_name=f'groups_{next(count)}',
            **options)
        runner.register_hook(watch)
        runner.train()
        return work_dir, watch

    return train


@contextlib.contextmanager
def without_merging():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LieRAHook, '_merge_groups', lambda *_: None)
        yield


def test_a_runner_resumes_with_and_without_merging(run):
    work_dir, merged = run()
    with without_merging():
        other_dir, apart = run()
    assert merged.groups == [merged.groups[0]] * 6 and merged.groups[0] <= 3 and apart.groups[0] > 20
    assert [sorted(rates.values()) for rates in merged.rates] == [sorted(rates.values()) for rates in apart.rates]
    # clip_grad sums the norms in another order
    assert merged.losses == pytest.approx(apart.losses, rel=1e-4)
    ours, theirs = (torch.load(path / 'epoch_1.pth', weights_only=False) for path in (work_dir, other_dir))
    assert [settings(g) for g in ours['optimizer']['param_groups']] == [
        settings(g) for g in theirs['optimizer']['param_groups']]
    assert_same(ours['param_schedulers'], theirs['param_schedulers'])
    for path in (work_dir, other_dir):
        checkpoint = str(path / 'epoch_1.pth')
        _, resumed = run(resume=True, load_from=checkpoint)
        with without_merging():
            _, resumed_apart = run(resume=True, load_from=checkpoint)
        for watch in (resumed, resumed_apart):
            assert watch.losses == pytest.approx(merged.losses[3:], rel=1e-3)
            assert [sorted(r.values()) for r in watch.rates] == [sorted(r.values()) for r in merged.rates[3:]]


def test_several_optimizers_each_with_schedulers_of_its_own():
    parts = {name: make(schedule=schedule) for name, schedule in [('a', 'cosine'), ('b', 'warmup'), ('c', 'none')]}
    runner = SimpleNamespace(optim_wrapper=OptimWrapperDict(**{name: part[1] for name, part in parts.items()}),
                             param_schedulers=dict(a=parts['a'][2], b=parts['b'][2]))
    hook = LieRAHook()
    hook._merge_groups(runner)
    assert all(len(part[1].optimizer.param_groups) == 2 for part in parts.values())
    states = {name: [scheduler.state_dict() for scheduler in part[2]] for name, part in parts.items() if part[2]}
    checkpoint = dict(param_schedulers=states)
    hook.before_save_checkpoint(runner, checkpoint)
    for name, schedule in [('a', 'cosine'), ('b', 'warmup')]:
        assert_same(checkpoint['param_schedulers'][name], [s.state_dict() for s in make(schedule=schedule)[2]])


def test_checkpoints_without_schedulers():
    _, wrapper, _ = make(schedule='none')
    hook = LieRAHook()
    assert isinstance(wrapper, OptimWrapper)
    hook._merge_groups(SimpleNamespace(optim_wrapper=wrapper, param_schedulers=None))
    checkpoint = dict()
    hook.before_save_checkpoint(None, checkpoint)
    assert 'param_schedulers' not in checkpoint
