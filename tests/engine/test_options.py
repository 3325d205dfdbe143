"""What --cfg-options say, and which config they make: what a config could have works, what cannot be meant is refused."""
import argparse
import re
import sys
from pathlib import Path

import pytest

from liera_mm.core.errors import SetupError
from liera_mm.engine import cli
from liera_mm.engine.options import OptionsAction, add_cfg_options

DIGITS = str(Path(__file__).parents[2] / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py')
HOOK = dict(type='LieRAHook')


def options(*texts):
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    return parser.parse_args(['--cfg-options', *texts]).cfg_options


def load(*texts):
    return cli.load_config(DIGITS, options(*texts))


# Values

@pytest.mark.parametrize('text, value', [
    ("[dict(type='LieRAHook')]", [HOOK]),
    ('[dict(type=LieRAHook)]', [HOOK]),
    ("[{'type': 'LieRAHook'}, dict(type='EMAHook', momentum=2e-4, begin_epoch=-1)]",
     [HOOK, dict(type='EMAHook', momentum=2e-4, begin_epoch=-1)]),
    ('dict(a=dict(b=None, c=true, d=False))', dict(a=dict(b=None, c=True, d=False))),
    ("{'*.depthwise_conv': (1, [2])}", {'*.depthwise_conv': (1, [2])}),
    ('{}', {}), ('dict()', {}),
    ("['traffic light', 'bus']", ['traffic light', 'bus']),
    ("('traffic light')", ('traffic light', )),
    ("['1', '2']", ['1', '2']),
    ('traffic light', 'traffic light'),
    ('"traffic light"', 'traffic light'),
    ('/a folder/of mine', '/a folder/of mine'),
    ('/my data (1)', '/my data (1)'),
    ('photos [old]/of mine', 'photos [old]/of mine'),
    ('"(1) of mine"', '(1) of mine'),
    ("'cats, dogs'", 'cats, dogs'),
    ("'cats','dogs'", ['cats', 'dogs']),
    ("'[1, 2]'", [1, 2]),
])
def test_values_as_in_a_config(text, value):
    read = options(f'key={text}')['key']
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize('text', [
    '1', '1e-3', 'true', 'False', 'None', 'text', '"1"', '1,2', '1,', '[1,2]', '(1,2)', '(1)', '[(1,2),[a,b],c]', '[]', '()',
    '[stages.*,depthwise]', 'stages.*,', 're:a|b', 'a=b', '', '[a b]', 'coco/bbox_mAP', '-1', '1_000'])
def test_other_values_are_those_of_mmengine(text):
    read, expected = options(f'key={text}')['key'], OptionsAction._parse_iterable(text)
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize('text', ["[dict(type='LieRAHook'", 'dict(1)', 'dict(**a)', 'dict(a=f(1))', '[dict(a=1)', '{a'])
def test_values_that_cannot_be_read(text):
    with pytest.raises(SetupError, match='key=.* cannot be read'):
        options(f'key={text}')


def test_brackets_that_do_not_match():
    with pytest.raises(SetupError, match='its brackets do not match'):
        options('key=[(1,2]')


@pytest.mark.parametrize('text', ['train_cfg', '=3', '='])
def test_no_key_and_value(text):
    with pytest.raises(SetupError, match='which is no KEY=VALUE'):
        options(text)


def test_spaces_around_the_sign():
    assert options('train_cfg.max_epochs = 3') == {'train_cfg.max_epochs': 3}


# Configs

@pytest.mark.parametrize('texts, key, value', [
    (["custom_hooks=[dict(type='LieRAHook'), dict(type='EMAHook')]"], 'custom_hooks', [HOOK, dict(type='EMAHook')]),
    (["custom_hooks.0=dict(priority='LOW')"], 'custom_hooks', [dict(HOOK, priority='LOW')]),
    (["custom_hooks.0=dict(_delete_=True, type='LieRAHook')"], 'custom_hooks', [HOOK]),
    (['default_hooks=dict(logger=dict(interval=7))'], 'default_hooks.logger.interval', 7),
    (['default_hooks=None'], 'default_hooks', None),
    (["param_scheduler=dict(type='MultiStepLR', milestones=[8, 11])"], 'param_scheduler',
     dict(type='MultiStepLR', milestones=[8, 11])),
    (["optim_wrapper.optimizer=dict(_delete_=True, type='SGD', lr=.01)"], 'optim_wrapper.optimizer',
     dict(type='SGD', lr=.01)),
    (["optim_wrapper.paramwise_cfg=dict(custom_keys={'backbone.stages': dict(lr_mult=.1)})"],
     'optim_wrapper.paramwise_cfg.custom_keys', {'backbone.stages': dict(lr_mult=.1)}),
    (["model.backbone.liera.overrides=[dict(targets=['depthwise'], method='dense')]"], 'model.backbone.liera.overrides',
     [dict(targets=['depthwise'], method='dense')]),
    (['train_dataloader.dataset.pipeline.2.scale.0=64'], 'train_dataloader.dataset.pipeline.2.scale', (64, 160)),
    (['val_evaluator.metric.0=proposal'], 'val_evaluator.metric', ['proposal', 'segm']),
    (['load_from=a b.pth'], 'load_from', 'a b.pth'),
])
def test_options_as_they_are_meant(texts, key, value):
    cfg = load(*texts)
    cli.check_hook(cfg)
    for name in key.split('.'):
        cfg = cfg[int(name) if name.isdigit() else name]
    assert cfg == value and isinstance(cfg, type(value))


@pytest.mark.parametrize('auto', ['False', 'True'])
def test_later_options_count(auto, digits):
    """Also where the options are merged again, after auto_classes."""
    cfg = load(f'data_root={digits}', f'auto_classes={auto}', 'val_dataloader.num_workers=0', 'val_dataloader=None',
               'train_cfg.val_interval=3', "train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3)")
    assert cfg.val_dataloader is None and cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=3)


@pytest.mark.parametrize('text, problem', [
    ('custom_hooks.1.type=EMAHook', 'custom_hooks is '),
    ('optim_wrapper.optimizer.lr.x=3', 'optim_wrapper.optimizer.lr is 0.002'),
    ('train_dataloader.dataset.pipeline.99=x', 'train_dataloader.dataset.pipeline is '),
    ('optim_wraper.optimizer.lr=1', 'has no optim_wraper'),
    ('custom_hooks=LieRAHook', "has custom_hooks='LieRAHook'"),
    ('custom_hooks=[LieRAHook]', "has custom_hooks.0='LieRAHook'"),
    ("custom_hooks=dict(type='LieRAHook')", "has custom_hooks={'type': 'LieRAHook'}"),
    ('default_hooks=[]', 'has default_hooks=\\[\\]'),
    ('default_hooks.logger=LoggerHook', "has default_hooks.logger='LoggerHook'"),
    ('default_hooks.type=LieRAHook', "has default_hooks=dict\\(type='LieRAHook'\\), a hook without a name"),
    ('train_dataloader.dataset=CocoDataset', "has train_dataloader.dataset='CocoDataset'"),
    ('train_dataloader.dataset.pipeline=Resize', "pipeline='Resize'"),
    ('train_dataloader.dataset.metainfo=digits', "metainfo='digits'"),
    ('val_evaluator=CocoMetric', "has val_evaluator='CocoMetric'"),
    ('custom_imports=json', "has custom_imports='json', where dict\\(imports=\\[...\\]\\) belongs"),
    ('param_scheduler=3', 'has param_scheduler=3'),
    ('randomness=3', 'has randomness=3'),
    ('load_from=[]', 'has load_from=\\[\\], which is no path'),
    ('model.neck.init_cfg=FILE', "has model.neck.init_cfg='FILE'"),
    ('model.init_cfg.type=Pretrained', 'model.init_cfg of the config has no checkpoint'),
])
def test_what_cannot_be_meant(text, problem):
    with pytest.raises(SetupError, match=problem) as error:
        load(text)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize('text, remedy', [
    ('max_epochs=2', 'Set what has its value: train_cfg.max_epochs, .*param_scheduler.1.T_max'),
    ('train_pipeline.2.scale=(64,64)', 'Set what has its value: train_dataloader.dataset.pipeline.2.scale'),
    ('vis_backends.0.type=X', 'Set what has its value: visualizer.vis_backends.0.type'),
    ('lr=1e-3', 'Did you mean optim_wrapper.optimizer.lr[?]'),
    ('optimizer.lr=1e-3', 'Did you mean optim_wrapper.optimizer[?]'),
    ('rank=2', 'Did you mean model.backbone.liera.rank[?]'),
    ('backbone.liera.rank=2', 'Did you mean model.backbone[?]'),
    ('seed=3', 'Did you mean randomness.seed[?]'),
    ('resume_from=FILE', 'Did you mean resume=True load_from[?]'),
    ('data.samples_per_gpu=2', 'Did you mean train_dataloader[?]'),
])
def test_options_that_nothing_reads(text, remedy, tmp_path):
    """Variables of the config files, of which nothing but their value is in a config, and names without what they are in."""
    cli.load_config(DIGITS).dump(tmp_path / 'config.py')
    for path in DIGITS, str(tmp_path / 'config.py'):
        with pytest.raises(SetupError, match='changes nothing') as error:
            cli.load_config(path, options(text))
        assert re.search(remedy, str(error.value))


def test_a_variable_that_is_used_by_name():
    with pytest.raises(SetupError, match='Set what has its value: model.backbone.init_cfg.checkpoint, model.neck.init_cfg'):
        load('pretrained=FILE')


def test_keys_of_the_users_own_are_none_misspelt(tmp_path):
    assert load('my_option=3', 'resume=True').my_option == 3
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {DIGITS!r}\nmy_option = 2  # as my_option of my_hook\ninterval = 6')
    assert cli.load_config(str(path), options('my_option=3', 'interval=7')).interval == 7


def test_a_variable_may_be_given_with_what_is_made_of_it():
    cfg = load('max_epochs=2', 'train_cfg.max_epochs=2', 'sync_bn=torch', 'find_unused_parameters=True')
    assert cfg.train_cfg.max_epochs == cfg.max_epochs == 2


@pytest.mark.parametrize('text', ['custom_hooks=None', 'custom_hooks.0.type=LieRAHok', 'custom_hooks=[]'])
def test_hooks_without_ours(text):
    with pytest.raises(SetupError, match='no LieRAHook'):
        cli.check_hook(load(text))


@pytest.mark.parametrize('option, key', [
    ('model.backbone.init_cfg.checkpoint=FILE', 'init_cfg.checkpoint'), ('model.backbone.depth=101', 'depth'),
    ('model.backbone.init_cfg=None', 'init_cfg'), ('model.backbone.norm_cfg.requires_grad=False', 'norm_cfg.requires_grad')])
def test_options_for_a_backbone_reach_it_in_a_LieRABackbone(tmp_path, option, key):
    """Those of scripts that were written for the config as it was."""
    path = tmp_path / 'config.py'
    path.write_text(f"""
_base_ = {DIGITS!r}
model = dict(backbone=dict(_delete_=True, type='LieRABackbone', liera=dict(rank=2), backbone=dict(
    type='ResNet', depth=50, norm_cfg=dict(type='BN'), init_cfg=dict(type='Pretrained', checkpoint='there.pth'))))""")
    cfg = cli.load_config(str(path), options(option))
    assert cfg.model.backbone.keys() == {'type', 'backbone', 'liera'}
    value = cfg.model.backbone.backbone
    for name in key.split('.'):
        value = value[name]
    assert value == options(option)[option.partition('=')[0]]
    assert cfg.model.backbone.backbone.init_cfg is None or cfg.model.backbone.backbone.init_cfg.type == 'Pretrained'


@pytest.mark.parametrize('in_config', [False, True])
def test_hooks_that_are_taken_out(tmp_path, in_config):
    path = tmp_path / 'config.py'
    path.write_text(f'_base_ = {str(DIGITS)!r}\n' + 'default_hooks = dict(visualization=None)' * in_config)
    given = ['default_hooks.logger=None'] + ['default_hooks.visualization=None'] * (not in_config)
    hooks = cli.load_config(str(path), options(*given)).default_hooks
    assert 'visualization' not in hooks and hooks['logger'] is None  # which the Runner takes out


@pytest.mark.parametrize('option', ['custom_imports.imports=module_of_mine', 'custom_imports.imports=[module_of_mine]',
                                    "custom_imports=dict(imports=['module_of_mine'])"])
def test_imports_of_options(tmp_path, monkeypatch, option):
    """MMEngine imports those of config files alone."""
    (tmp_path / 'module_of_mine.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'module_of_mine', raising=False)
    assert load(option).custom_imports.imports == ['liera_mm', 'module_of_mine']
    assert 'module_of_mine' in sys.modules


def test_imports_of_options_that_are_not_there():
    with pytest.raises(SetupError, match='nowhere, of --cfg-options custom_imports, cannot be imported'):
        load('custom_imports.imports=[nowhere]')
