"""Configs without this package: whatever it registers has a stock parent, is dropped, or is refused."""
import copy

import pytest
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, MODELS, TASK_UTILS
from torch import nn

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine import FullyShardStrategy
from liera_mm.engine.plain import REGISTRIES, plain_config, stock_type
from liera_mm.models import DeviceMaskPreprocessor, DeviceRandomSampler, LieRABackbone, LieRAConvNeXt

SWIN = dict(type='SwinTransformer', embed_dims=24)
LAZY = '''
from mmdet.models import MaskRCNN
from mmdet.models.backbones import ResNet
from mmengine.hooks import EMAHook

import liera_mm
from liera_mm import LieRABackbone, LieRAHook
from liera_mm.models import DeviceMaskPreprocessor

model = dict(
    type=MaskRCNN,
    data_preprocessor=dict(type=DeviceMaskPreprocessor),
    backbone=dict(type=LieRABackbone, backbone=dict(type=ResNet, depth=18), liera=dict(rank=2)))
default_hooks = dict(liera=dict(type=liera_mm.LieRAHook))
custom_hooks = [dict(type=LieRAHook), dict(type=EMAHook)]
default_scope = 'mmdet'
'''


def plain(scope='mmdet', **cfg):
    cfg = Config(dict(default_scope=scope, **cfg))
    before = copy.deepcopy(cfg.to_dict())
    result = plain_config(cfg)
    assert cfg.to_dict() == before
    assert result.text == ''
    return result


def registered():
    """Everything that this package registers, by name."""
    return {name: thing for registry in REGISTRIES for name, thing in registry.module_dict.items()
            if thing.__module__.startswith('liera_mm.')}


@pytest.mark.parametrize('name', registered())
def test_everything_registered_has_a_stock_parent_or_goes(name):
    thing = registered()[name]
    stock = stock_type(thing)
    if stock is None:
        assert hasattr(thing, 'wraps') or issubclass(thing, Hook)
    else:
        found = {base.__name__ for base in thing.__mro__ if not base.__module__.startswith('liera_mm')}
        assert stock[1] in found and stock[0] in ('mmengine', 'mmdet', 'mmpretrain')


@pytest.mark.parametrize('name', ['{}', 'mmdet.{}', 'mmengine.{}', 'mmpretrain.{}', 'liera_mm.{}', 'liera_mm.models.{}',
                                  None])
@pytest.mark.parametrize(('ours', 'stock'), [
    (LieRABackbone, None),
    (LieRAConvNeXt, 'mmpretrain.ConvNeXt'),
    (DeviceMaskPreprocessor, 'DetDataPreprocessor'),
    (DeviceRandomSampler, 'RandomSampler'),
])
def test_every_way_to_name_a_type(ours, stock, name):
    if name == 'liera_mm.{}' and not hasattr(liera_mm, ours.__name__):
        name = 'liera_mm.models.{}'
    node = dict(type=name.format(ours.__name__) if name else ours)
    if stock is None:
        node.update(backbone=SWIN, liera=dict(rank=2))
    for cfg in (plain(model=dict(part=node)), plain(model=[dict(deep=(node, ))])):
        model = cfg.to_dict()['model']
        assert (model['part'] if 'part' in model else model[0]['deep'][0]) == (dict(type=stock) if stock else SWIN)


def test_scopes():
    node = dict(type='DeviceMaskPreprocessor')
    assert plain(model=node).model.type == 'DetDataPreprocessor' and plain(model=node).custom_imports.imports == []
    for scope in ('mmpretrain', None):
        cfg = plain(scope, model=node)
        assert cfg.model.type == 'mmdet.DetDataPreprocessor' and cfg.custom_imports.imports == ['mmdet.models']
    node = dict(type='LieRAConvNeXt')
    assert plain(model=node).custom_imports.imports == ['mmpretrain.models']
    assert plain('mmpretrain', model=node).model.type == 'ConvNeXt'
    around = dict(type='LieRABackbone', backbone=dict(type='mmpretrain.ConvNeXt', arch='tiny'))
    assert plain(model=around).model == dict(type='mmpretrain.ConvNeXt', arch='tiny')
    assert plain(model=around).custom_imports.imports == ['mmpretrain.models']


def test_only_what_ours_alone_takes_goes():
    cfg = plain(model=dict(backbone=dict(
        type='LieRABackbone', liera=dict(rank=3), backbone=dict(
            type='LieRAConvNeXt', liera=None, fast=False, arch='tiny', with_cp=True, linear_pw_conv=False))))
    assert cfg.model.backbone == dict(type='mmpretrain.ConvNeXt', arch='tiny', with_cp=True, linear_pw_conv=False)
    node = dict(type='DeviceMaskPreprocessor', non_blocking=True, mean=[1.], pad_mask=True)
    assert plain(model=node).model == dict(node, type='DetDataPreprocessor')


NAMES = ['LieRAHook', 'mmdet.LieRAHook', liera_mm.LieRAHook, 'liera_mm.engine.hook.LieRAHook']


@pytest.mark.parametrize('ours', NAMES, ids=str)
def test_hooks_go_wherever_they_are(ours):
    hook, other = dict(type=ours), dict(type='EMAHook')
    cfg = plain(default_hooks=dict(a=hook, b=other, c=None), custom_hooks=(other, hook), more=[[hook], dict(x=hook)])
    assert cfg.default_hooks == dict(b=other, c=None)
    assert cfg.custom_hooks == (other, ) and cfg.more == [[], {}]


def test_shards():
    """MMEngine's DDPStrategy, of which ours is one, fails without a launcher."""
    for ours in ('FullyShardStrategy', FullyShardStrategy):
        cfg = plain(runner_type='FlexibleRunner', strategy=dict(type=ours)).to_dict()
        assert 'strategy' not in cfg and 'runner_type' not in cfg
    cfg = dict(runner_type='FlexibleRunner', strategy=dict(type='DDPStrategy'))
    assert plain(**cfg).strategy == cfg['strategy'] and plain(**cfg).runner_type == 'FlexibleRunner'


@pytest.mark.parametrize(('before', 'after'), [
    (dict(type='Pretrained', checkpoint='a'), None),
    (dict(type='mmengine.model.PretrainedInit', checkpoint='a', prefix='b'), None),
    (dict(checkpoint='a'), None),
    (dict(type='Xavier', layer='Conv2d'), dict(type='Xavier', layer='Conv2d')),
    ([dict(type='Xavier', layer='Conv2d'), dict(type='Pretrained', checkpoint='a')], [dict(type='Xavier', layer='Conv2d')]),
    (None, None),
])
def test_pretrained_weights_are_in_the_checkpoint(before, after):
    cfg = plain(model=dict(detector=dict(neck=[dict(init_cfg=before)]), teacher='liera://x', init_cfg=before))
    assert cfg.model == dict(detector=dict(neck=[dict(init_cfg=after)]), init_cfg=after)


@pytest.mark.parametrize(('before', 'after'), [
    (['liera_mm', 'json', 'liera_mm.engine'], ['json']), ('liera_mm', []), ('json', ['json']), ([], []),
])
def test_imports(before, after):
    imports = dict(imports=before, allow_failed_imports=True)
    assert plain(custom_imports=imports).custom_imports.imports == after
    assert plain(custom_imports=None).custom_imports.imports == []


def test_pure_python_configs(tmp_path):
    (tmp_path / 'lazy.py').write_text(LAZY)
    plain_config(Config.fromfile(tmp_path / 'lazy.py')).dump(tmp_path / 'plain.py')
    cfg = Config.fromfile(tmp_path / 'plain.py')
    assert cfg.model == dict(
        type='mmdet.models.MaskRCNN',
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=dict(type='mmdet.models.backbones.ResNet', depth=18))
    assert cfg.default_hooks == {} and cfg.custom_hooks == [dict(type='mmengine.hooks.EMAHook')]
    assert 'liera' not in cfg.pretty_text.lower()


def test_a_class_in_a_module_that_a_function_hides():
    """As MMEngine writes it of a pure Python-style config, and cannot read it."""
    loss = dict(type='mmdet.models.losses.smooth_l1_loss.L1Loss')
    assert plain(model=dict(type='MaskRCNN', loss=loss)).model.loss == dict(type='L1Loss')
    assert plain('mmpretrain', model=dict(type='MaskRCNN', loss=loss)).model.loss == dict(type='mmdet.L1Loss')


# What other parts of this package, or later versions of it, may register


@pytest.fixture
def register():
    """A function that registers a class as one of this package; they are gone afterwards."""
    added = []

    def add(registry, cls):
        cls.__module__ = 'liera_mm.later'
        registry.register_module(module=cls)
        added.append((registry, cls.__name__))

    yield add
    for registry, name in added:
        del registry._module_dict[name]


def test_later_classes_map_through_what_they_derive_from(register):

    class LaterPreprocessor(DeviceMaskPreprocessor):

        def __init__(self, own=1, **kwargs):
            super().__init__(**kwargs)

    class LaterHook(EMAHook):
        pass

    register(MODELS, LaterPreprocessor)
    register(HOOKS, LaterHook)
    cfg = plain(model=dict(type='LaterPreprocessor', own=2, mean=[1.]), custom_hooks=[dict(type='LaterHook', momentum=.1)])
    assert cfg.model == dict(type='DetDataPreprocessor', mean=[1.])
    assert cfg.custom_hooks == [dict(type='EMAHook', momentum=.1)]


def test_what_stands_for_nothing_is_refused(register):

    class LaterHead(nn.Module):
        pass

    class LaterAssigner:
        pass

    register(MODELS, LaterHead)
    register(TASK_UTILS, LaterAssigner)
    for name in ('LaterHead', 'LaterAssigner', 'mmdet.LaterAssigner'):
        with pytest.raises(SetupError) as error:
            plain(model=dict(head=[dict(type=name)]))
        problem, remedy = str(error.value).splitlines()
        assert problem == (f'model.head.0.type is {name.replace("mmdet.", "")} of liera_mm, which stands for nothing that '
                           'OpenMMLab has')


def test_names_of_others_stay():
    model = dict(type='FullyShardStrategyOfMine', backbone=dict(type='my.LieRABackbone'))
    cfg = dict(model=model, data_root='liera_mm/data/')
    assert plain(**cfg).model == cfg['model'] and plain(**cfg).data_root == 'liera_mm/data/'
    assert issubclass(DeviceMaskPreprocessor, DetDataPreprocessor)
