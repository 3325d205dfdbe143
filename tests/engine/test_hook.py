"""LieRAHook in MMEngine's Runner: refusals before training, merging for validation, checkpoints, and its reports."""
import contextlib
import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.engine.hooks import MeanTeacherHook
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, OPTIM_WRAPPERS, DefaultScope

import liera_mm
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.checkpoint import digest
from liera_mm.core.errors import SetupError
from liera_mm.engine.safe_loading import read_checkpoint
from liera_mm.models.pretrained import decode_record

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

DIGITS = Path(__file__).parents[2] / 'configs/digits'
HOOKS = [dict(type='LieRAHook')]


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def different(a, b):
    """Names of tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def frozen_names(model):
    """Frozen weights and buffers of the backbone."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name for name in model.state_dict() if name.startswith('backbone.') and name not in trained}


def load(path):
    """A checkpoint, and the record of its backbone."""
    checkpoint = read_checkpoint(path, 'cpu')
    return checkpoint, decode_record(checkpoint['state_dict'].pop('backbone.liera_record'))


def assert_same_as_stored(state, path):
    """A model's state is that of a checkpoint, and the weights that the checkpoint leaves out are the ones it names."""
    checkpoint, record = load(path)
    left_out = {f'backbone.{name}' for name in record['fingerprint']}
    assert left_out and state.keys() == checkpoint['state_dict'].keys() | left_out
    assert not different({name: state[name] for name in checkpoint['state_dict']}, checkpoint['state_dict'])
    assert all(digest(state[f'backbone.{name}']) == value for name, value in record['fingerprint'].items())


class Spy(Hook):
    """Runs after LieRAHook at every point, and keeps what it saw."""
    priority = 'LOWEST'

    def __init__(self):
        self.states, self.metrics, self.merged = [], [], dict(train=[], val=[], after=[])

    @staticmethod
    def count(runner):
        """How many adapted layers are merged, and whether they then hold the effective weight."""
        layers = [layer for _, layer in adapted_layers(runner.model)]
        for layer in layers:
            twin = copy.deepcopy(layer)
            twin.unmerge()
            assert torch.equal(layer.weight, twin.effective_weight() if layer.merged else twin.weight)
        return sum(layer.merged for layer in layers)

    def before_train(self, runner):
        self.states.append(clone(runner.model))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.merged['train'].append(self.count(runner))

    def before_val(self, runner):
        self.states.append(clone(runner.model))

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.merged['val'].append(self.count(runner))
        assert not different(clone(runner.model), self.states[-1])  # the state dict always has the frozen weights

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(metrics)

    def after_val(self, runner):
        self.merged['after'].append(self.count(runner))
        self.states.append(clone(runner.model))

    before_test, after_test_iter, after_test_epoch, after_test = before_val, after_val_iter, after_val_epoch, after_val


@pytest.fixture(scope='module')
def trained(on_the_cpu, make_runner):
    """A training of two epochs, with a validation after each."""
    runner, spy = make_runner(**{'train_cfg.max_epochs': 2}), Spy()
    runner.register_hook(spy)
    runner.train()
    log_dir = Path(runner.log_dir)
    return SimpleNamespace(
        spy=spy,
        model=runner.model,
        checkpoint=Path(runner.work_dir, 'epoch_2.pth'),
        log=next(log_dir.glob('*.log')).read_text(),
        scalars=[json.loads(line) for line in (log_dir / 'vis_data/scalars.json').read_text().splitlines()])


# A training

def test_only_adapters_neck_and_heads_train(trained):
    before, after = trained.spy.states[0], clone(trained.model)
    changed = different(before, after)
    assert len(frozen_names(trained.model)) > 100
    assert not changed & frozen_names(trained.model)
    assert changed >= {name for name, p in trained.model.named_parameters() if p.requires_grad}


def test_merged_in_validation_only(trained):
    layers = len(liera_mm.summary(trained.model))
    assert trained.spy.merged == dict(train=[0] * 4, val=[layers] * 4, after=[0] * 2)
    _, *states = trained.spy.states
    assert not different(states[0], states[1]) and not different(states[2], states[3])
    assert different(states[1], states[2])


def test_checkpoint_leaves_out_the_frozen_weights(trained):
    assert_same_as_stored(clone(trained.model), trained.checkpoint)
    checkpoint, record = load(trained.checkpoint)
    base = {name for name in frozen_names(trained.model) if '.adapter.' not in name}  # what an adapter keeps goes with it
    assert {f'backbone.{name}' for name in record['fingerprint']} == base
    assert checkpoint['meta']['liera'] == dict(backbone=record)
    assert record['liera'] == json.loads(json.dumps(trained.model.backbone.liera))
    assert record['source'] == dict(
        option='init_cfg', checkpoint='liera://mask-rcnn_convnextv2-mini_glyphs', prefix='backbone.')
    assert record['version'] == liera_mm.__version__
    assert trained.log.count('LieRA  checkpoints leave out 124 frozen tensors of backbone, which are those of liera://') == 1


def test_reports(trained):
    assert trained.log.count(str(liera_mm.summary(trained.model))) == trained.log.count('adapted layers with') == 1
    reports = re.findall(r'LieRA  largest \|Δ\|: (\S+) in (\S+)  Δ <= -1: (\S+)%  zero weights: (\d+)', trained.log)
    assert len(reports) == 2
    report = liera_mm.range_report(trained.model)
    assert reports[1] == (f'{report.max_delta:.4g}', report.max_delta_layer, '0.000', '0') != reports[0]
    scalars = [line for line in trained.scalars if 'liera/max_delta' in line]
    assert [line['step'] for line in scalars] == [1, 2]
    assert scalars[1]['liera/max_delta'] == report.max_delta > 0


# Refusals before training

def refused(run, message):
    """Check that a run ends in an error of two lines, which the tools print without a traceback."""
    with pytest.raises(SetupError, match=message) as error:
        run()
    assert len(str(error.value).splitlines()) == 2


def test_frozen_weight_that_would_train(make_runner):
    runner = make_runner()
    runner.model.backbone.stages[0][1].norm.weight.requires_grad_(True)
    refused(runner.train, r"Trains, but should be frozen: \['stages.0.1.norm.weight'\]")


def test_adapter_that_would_not_train(make_runner):
    """As by a hook that freezes; ConvNeXt's own frozen_stages does no harm."""
    runner = make_runner(**{'model.backbone.frozen_stages': 1})
    runner.model.backbone.stages[0].requires_grad_(False)
    refused(runner.train,
            r"but is frozen: \['stages.0.0.depthwise_conv.adapter.A', .*'stages.0.1.pointwise_conv2.adapter.B'")


def semi_supervised(make_runner):
    """A Runner, about to train, of SoftTeacher: its student trains, its teacher is frozen whole and follows."""
    runner = make_runner()
    detector = copy.deepcopy(runner.cfg.model)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(dict(
            type='SoftTeacher', detector=detector, data_preprocessor=dict(
                type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor),
            semi_train_cfg=dict(freeze_teacher=True), semi_test_cfg=dict(predict_on='teacher')))
    model.init_weights()
    runner.model, runner.optim_wrapper = model, OptimWrapper(torch.optim.SGD(model.parameters(), lr=.1))
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    return runner, next(hook for hook in runner.hooks if type(hook).__name__ == 'LieRAHook')


def test_a_teacher_that_is_frozen_by_design(make_runner, perturb):
    runner, hook = semi_supervised(make_runner)
    hook.before_train(runner)
    student, teacher = runner.model.student, runner.model.teacher
    perturb(student)
    MeanTeacherHook(momentum=.5).momentum_update(runner.model, .5)
    assert not torch.equal(teacher.backbone.stages[0][0].depthwise_conv.adapter.B,
                           torch.zeros_like(teacher.backbone.stages[0][0].depthwise_conv.adapter.B))
    hook.after_train_epoch(runner)
    hook.before_val_iter(runner, 0)
    assert all(layer.merged for _, layer in adapted_layers(teacher))
    hook.after_val_epoch(runner)
    with torch.no_grad():
        student.backbone.stages[0][0].depthwise_conv.frozen_weight.mul_(1.1)
    refused(functools.partial(hook.after_train_epoch, runner), 'frozen tensors have changed .*: student.backbone')
    hook.after_train(runner)


def test_a_student_that_is_frozen_by_mistake(make_runner):
    runner, hook = semi_supervised(make_runner)
    runner.model.student.backbone.requires_grad_(False)
    refused(functools.partial(hook.before_train, runner), 'student.backbone would not train what its liera config says')


def test_optimizer_of_another_model(make_runner):
    runner = make_runner()
    other = copy.deepcopy(runner.model)
    runner.optim_wrapper = OptimWrapper(torch.optim.SGD(other.parameters(), lr=.1))
    refused(runner.train, r'the optimizer lacks \d+ trainable tensors: backbone.downsample_layers.0.0.adapter.A')


def test_no_adapted_backbone(make_runner):
    refused(make_runner(DIGITS / 'mask-rcnn_convnextv2-mini_full_digits.py', custom_hooks=HOOKS).train,
            'LieRAHook found no adapted backbone in the model')


@pytest.mark.parametrize('config', ['liera', 'frozen'])
def test_weights_that_were_never_loaded(make_runner, config):
    runner = make_runner(DIGITS / f'mask-rcnn_convnextv2-mini_{config}_digits.py', **{'model.backbone.init_cfg': None})
    refused(runner.train, 'backbone has frozen weights that were never loaded: .*among them downsample_layers.0.0.weight')


def test_weights_may_come_from_a_whole_checkpoint(make_runner, trained):
    runner, spy = make_runner(**{'model.backbone.init_cfg': None, 'load_from': str(trained.checkpoint)}), Spy()
    runner.register_hook(spy)
    runner.train()
    assert not different(spy.states[0], clone(trained.model))


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_categories_of_another_data_set(make_runner, trained, split):
    names = ('zero', 'one', *'23456789')
    runner = make_runner(**{f'{split}_dataloader.dataset.metainfo.classes': names, 'load_from': str(trained.checkpoint)})
    refused(runner.test if split == 'test' else runner.train,
            rf'(?s){"train" if split == "train" else "val"}2017.json lacks 2 classes of the config, such as zero, one; it '
            r'has 0, 1, 2.*metainfo')


# What it has to get along with

@OPTIM_WRAPPERS.register_module()
class CpuAutocast(OptimWrapper):
    """MMEngine's AmpOptimWrapper insists on a GPU."""

    @contextlib.contextmanager
    def optim_context(self, model):
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


@pytest.mark.parametrize('options', [
    {'model.backbone.liera.update': 'additive'},
    {'model.backbone.liera.update': 'exp'},
    {'model.backbone.liera.method': 'dense'},
    {'model.backbone.liera.method': 'pissa'},
    {'model.backbone.liera.method': 'dora'},
    {'model.backbone.with_cp': True},
    {'model.backbone.drop_path_rate': .2},
    {'optim_wrapper.accumulative_counts': 2},
    {'optim_wrapper.type': 'CpuAutocast'},
    {'model.rpn_head.type': 'DeviceRPNHead', 'model.roi_head.type': 'DeviceRoIHead',
     'model.roi_head.bbox_roi_extractor.type': 'DeviceRoIExtractor', 'optim_wrapper.type': 'CpuAutocast',
     'model.roi_head.mask_roi_extractor.type': 'DeviceRoIExtractor',
     'model.data_preprocessor.type': 'DeviceMaskPreprocessor'},
    {'optim_wrapper': dict(_delete_=True, type='AmpOptimWrapper', loss_scale=128., optimizer=dict(type='SGD', lr=.01))},
], ids=lambda options: '-'.join(map(str, [*options][0].split('.')[-1:] + [*options.values()]))[:40])
def test_variants_train(make_runner, monkeypatch, options):
    if 'optim_wrapper' in options:
        if not torch.cuda.is_available():
            pytest.skip('AmpOptimWrapper needs a GPU')
        monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cuda')
    runner, spy = make_runner(**options), Spy()
    runner.register_hook(spy)
    runner.train()
    changed = different(spy.states[0], clone(runner.model))
    assert not changed & frozen_names(runner.model)
    for name, _ in adapted_layers(runner.model):
        assert any(key.startswith(f'{name}.adapter.') for key in changed), name
    assert all(tensor.isfinite().all() for tensor in clone(runner.model).values())
    assert len(spy.merged['val']) == 2 and all(spy.merged['val'])


def test_gradient_accumulation(make_runner):
    steps = []

    class Watch(Hook):

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            steps.append(clone(runner.model))

    runner = make_runner(**{'optim_wrapper.accumulative_counts': 2, 'train_dataloader.batch_size': 1})
    runner.register_hook(Watch())
    runner.train()
    assert [bool(different(a, b)) for a, b in zip(steps, steps[1:])] == [True, False, True]


def test_moving_average_and_best_checkpoint(make_runner):
    runner = make_runner(**{'custom_hooks': [*HOOKS, dict(type='EMAHook', momentum=.1)],
                            'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'})
    ema = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook')
    seen = SimpleNamespace()

    class Watch(Hook):
        priority = 'LOWEST'

        def before_val(self, runner):
            seen.source, seen.average = clone(runner.model), clone(ema.ema_model.module)

        def before_val_iter(self, runner, batch_idx, data_batch=None):
            seen.validated, seen.merged = clone(runner.model), Spy.count(runner)

        def after_val(self, runner):
            seen.restored, seen.restored_average = clone(runner.model), clone(ema.ema_model.module)

    runner.register_hook(Watch())
    runner.train()
    averaged = different(seen.source, seen.average)
    assert averaged and not averaged & frozen_names(runner.model)
    assert seen.merged and not different(seen.validated, seen.average)
    assert not different(seen.restored, seen.source) and not different(seen.restored_average, seen.average)
    for path in (next(Path(runner.work_dir).glob('best_*.pth')), Path(runner.work_dir, 'epoch_1.pth')):
        assert_same_as_stored(seen.average, path)
        ema = {name[len('module.'):]: tensor for name, tensor in load(path)[0]['ema_state_dict'].items()
               if name.startswith('module.') and not name.endswith('liera_record')}
        assert not different(ema, {name: seen.source[name] for name in ema})
    best = next(Path(runner.work_dir).glob('best_*.pth'))
    for hooks in (HOOKS, [*HOOKS, dict(type='EMAHook', momentum=.1)]):
        tested = make_runner(custom_hooks=hooks, load_from=str(best))
        assert tested.test()['coco/bbox_mAP'] == read_checkpoint(best)['message_hub']['runtime_info']['best_score']
        assert not different(clone(tested.model), seen.average)


@pytest.mark.parametrize('options', [
    {},
    {'model.backbone.liera.method': 'pissa'},
    {'model.backbone.liera.method': 'dora'},
    {'model.backbone.drop_path_rate': .2},
    {'custom_hooks': [*HOOKS, dict(type='EMAHook', momentum=.1)]},
], ids=['lora', 'pissa', 'dora', 'drop_path', 'moving_average'])
def test_resuming_continues(make_runner, options):
    """Bit for bit, though it doesn't repeat the validation between the epochs."""
    options = {'train_cfg.max_epochs': 2, **options}
    straight = make_runner(**options)
    straight.train()
    resumed = make_runner(**options, resume=True, load_from=f'{straight.work_dir}/epoch_1.pth')
    resumed.train()
    assert not different(clone(resumed.model), clone(straight.model))
    ours, theirs = (read_checkpoint(f'{runner.work_dir}/epoch_2.pth') for runner in (resumed, straight))
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        torch.testing.assert_close(ours.get(key), theirs.get(key), rtol=0, atol=0)
    (ours, ), (theirs, ) = ours['random_states'], theirs['random_states']
    for device in ('torch', 'cuda'):
        torch.testing.assert_close(ours.pop(device, None), theirs.pop(device, None))
    assert ours == theirs


def test_resuming_the_moving_average_of_a_compiled_model(make_runner, tmp_path):
    options = {'custom_hooks': [*HOOKS, dict(type='EMAHook', momentum=.1)]}
    runners = [make_runner(**options)]
    runners[0].train()
    for part, compiled in ((r'backbone\.', 'backbone._orig_mod.'), (r'^(module\.|(?!steps))', r'\1_orig_mod.')):
        checkpoint = read_checkpoint(f'{runners[0].work_dir}/epoch_1.pth')
        for key in ('state_dict', 'ema_state_dict'):
            checkpoint[key] = {re.sub(part, compiled, name): tensor for name, tensor in checkpoint[key].items()}
        torch.save(checkpoint, tmp_path / 'compiled.pth')
        runners.append(make_runner(**options, resume=True, load_from=str(tmp_path / 'compiled.pth')))
        runners[-1].train()  # no epoch is left
    models = [[clone(runner.model), clone(next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')))]
              for runner in runners]
    for model, average in models[1:]:
        assert not different(model, models[0][0]) and not different(average, models[0][1])


@pytest.mark.parametrize('batch', [1, 2, 4])
def test_the_time_that_is_left_counts_the_iterations_of_the_resumed_training(make_runner, trained, batch):
    resumed = make_runner(**{'train_cfg.max_epochs': 3, 'train_dataloader.batch_size': batch}, resume=True,
                          load_from=str(trained.checkpoint))
    resumed.train()
    assert resumed.iter == resumed.max_iters == 4 + 4 / batch
    assert resumed.message_hub.get_info('eta') == 0


# Checkpoints to test or resume from

def save_part(trained, tmp_path, keep, rename=str):
    checkpoint = read_checkpoint(trained.checkpoint, 'cpu')
    checkpoint['state_dict'] = {rename(name): t for name, t in checkpoint['state_dict'].items() if keep(name)}
    torch.save(checkpoint, tmp_path / 'part.pth')
    return str(tmp_path / 'part.pth')


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', 'backbone._orig_mod.'])
def test_testing_gives_the_metrics_of_training(make_runner, trained, tmp_path, prefix):
    """Also from a checkpoint whose keys are those of a distributed training, or of torch.compile."""
    def rename(name):
        return name.replace('backbone.', prefix) if prefix.startswith('backbone') else prefix + name

    runner, spy = make_runner(load_from=save_part(trained, tmp_path, lambda name: True, rename)), Spy()
    runner.register_hook(spy)
    assert runner.test() == trained.spy.metrics[1]
    assert trained.spy.metrics[1] != trained.spy.metrics[0]
    layers = len(liera_mm.summary(trained.model))
    assert spy.merged == dict(train=[], val=[layers] * 2, after=[0])


@pytest.mark.parametrize('run', ['test', 'val', 'resume'])
@pytest.mark.parametrize('lacking, message', [
    ('.adapter.', r'lacks 102 tensors of this model \(102 of adapters\)'),
    ('liera_record', r'lacks 124 tensors of this model \(0 of adapters\), among them backbone.downsample_layers.0.0.bias'),
    ('rpn_cls', r'lacks 2 tensors of this model \(0 of adapters\), among them rpn_head.rpn_cls.bias'),
])
def test_checkpoint_of_a_part_is_refused(make_runner, trained, tmp_path, run, lacking, message):
    runner = make_runner(load_from=save_part(trained, tmp_path, lambda name: lacking not in name), resume=run == 'resume')
    refused(runner.train if run == 'resume' else getattr(runner, run), message)


def test_an_optimizer_with_other_groups_does_not_resume(make_runner, trained):
    """As under another version of MMEngine; torch's own error would name neither file nor remedy."""
    runner = make_runner(**{'optim_wrapper.paramwise_cfg': None}, resume=True, load_from=str(trained.checkpoint))
    refused(runner.train, r'optimizer has \d+ tensors in \d+ groups, this one \d+ in 1\.\n.*MMEngine of the checkpoint')


@pytest.mark.parametrize('optimizer, other', [
    (dict(type='SGD', lr=.01, momentum=.9, weight_decay=.05), 'no SGD: it has no dampening'),
    (dict(type='RMSprop', lr=.01, weight_decay=.05), 'no RMSprop: it has no alpha'),
    (dict(type='Adam', lr=.01, weight_decay=.05), None)], ids=lambda value: value and value['type'] if isinstance(
        value, dict) else '')
def test_another_optimizer_does_not_resume(make_runner, trained, optimizer, other):
    """Its first step would end in a KeyError; one with the same settings goes on."""
    options = {'optim_wrapper.optimizer': dict(optimizer, _delete_=True), 'train_cfg.max_epochs': 2}
    runner = make_runner(**options, resume=True, load_from=str(trained.checkpoint))
    if other:
        refused(runner.train, f'{other}.*\n.*load_from')
    else:
        runner.train()


@pytest.mark.parametrize('lacks', ['meta', 'message_hub'])
def test_a_published_checkpoint_does_not_resume(make_runner, trained, tmp_path, lacks):
    """It has what testing takes, and training from load_from."""
    checkpoint = torch.load(trained.checkpoint, weights_only=False)
    del checkpoint[lacks]
    torch.save(checkpoint, tmp_path / 'published.pth')
    runner = make_runner(resume=True, load_from=str(tmp_path / 'published.pth'))
    refused(runner.train, f'has no {lacks}, and cannot be resumed from')


@pytest.mark.parametrize('changed', [{'update': 'additive'}, {'alpha': 32}])
def test_checkpoint_of_other_settings_is_refused(make_runner, trained, changed):
    """They give the same tensors another meaning: the metrics would be wrong without a word."""
    options = {f'model.backbone.liera.{name}': value for name, value in changed.items()}
    refused(make_runner(**options, load_from=str(trained.checkpoint)).test, next(iter(changed)))
