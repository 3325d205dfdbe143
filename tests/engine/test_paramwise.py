"""paramwise_cfg on adapted models: adapters have the settings of their layers, all else has those of the stock model."""
import copy

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine import invariants

METHODS = ['lora', 'dora', 'tucker', 'atom', 'dense']


class Detector(nn.Module):
    """A backbone with a plain, a depthwise and a grouped convolution and a norm, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
                                      nn.Conv2d(8, 8, 3, groups=2))
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))


def optimizer_of(model, paramwise_cfg, **options):
    return build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=1., weight_decay=1.), paramwise_cfg=paramwise_cfg, **options))


def settings(model, paramwise_cfg, **options):
    """Learning rate and weight decay of each trained tensor, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group['lr'], group['weight_decay'])
            for group in optimizer_of(model, paramwise_cfg, **options).optimizer.param_groups for p in group['params']
            if p.requires_grad}  # MMEngine 0.10.0 lists others too


def adapted(method='lora', **liera):
    model = Detector()
    liera_mm.adapt(model.backbone, rank=2, method=method, **liera)
    return model


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('cfg', [
    dict(dwconv_decay_mult=0.),
    dict(dwconv_decay_mult=.5, norm_decay_mult=.1, bias_decay_mult=.2, bias_lr_mult=3.),
    dict(dwconv_decay_mult=.5, flat_decay_mult=.1),
    dict(dwconv_decay_mult=.5, custom_keys={'backbone.1': dict(lr_mult=.1)}),
    dict(custom_keys={'backbone': dict(lr_mult=.1)}),
    dict(custom_keys={'backbone': dict(lr_mult=.1), 'backbone.1': dict(decay_mult=0.), 'ckbone.1.w': dict(lr_mult=.3)}),
    dict(custom_keys={'weight': dict(lr_mult=.1), 'bias': dict(decay_mult=0.)}),
    dict(custom_keys={'nothing': dict(lr_mult=.1)}, dwconv_decay_mult=0.),
], ids=str)
def test_adapters_are_trained_as_their_layers(method, cfg):
    """As the weights themselves are in the model without adapters; that of a norm is one-dimensional, and others are not."""
    expected = settings(Detector(), copy.deepcopy(cfg))
    model = adapted(method, train_norm=True, train_bias=True)
    for name, found in settings(model, copy.deepcopy(cfg)).items():
        if name.endswith('adapter.magnitude') and 'flat_decay_mult' in cfg and 'backbone.1.' not in name:
            assert found == (1., .1)
        else:
            assert found == expected[f'{name.partition(".adapter.")[0]}.weight' if '.adapter.' in name else name], name


@pytest.mark.parametrize('keys, expected', [
    (dict(adapter=.5, backbone=.1), dict(A=.5, B=.5)),
    ({'adapter.B': .5, 'backbone': .1}, dict(A=.1, B=.5)),
    ({'adapter.B': .5, 'adapter': .2, 'backbone.0.weight': .1}, dict(A=.2, B=.5)),
    ({'backbone.0.adapter': .5, 'adapter': .2}, dict(A=.5, B=.5)),
])
def test_keys_of_adapters_come_first(keys, expected):
    found = settings(adapted(), dict(custom_keys={key: dict(lr_mult=rate) for key, rate in keys.items()}))
    assert {name: found[f'backbone.0.adapter.{name}'][0] for name in expected} == expected
    assert found['head.1.weight'] == (1., 1.)


@pytest.mark.parametrize('nested, keys', [
    ({'adapter': {'A': dict(lr_mult=.5)}}, {'adapter.A': dict(lr_mult=.5)}),
    ({'adapter': {'lr_mult': .2, 'B': dict(lr_mult=.5, decay_mult=0.)}},
     {'adapter': dict(lr_mult=.2), 'adapter.B': dict(lr_mult=.5, decay_mult=0.)}),
    ({'backbone': {'0': {'adapter': {'A': dict(lr_mult=0.)}, 'decay_mult': .3}}},
     {'backbone.0.adapter.A': dict(lr_mult=0.), 'backbone.0': dict(decay_mult=.3)}),
    ({'head': {'1': {'weight': dict(lr_mult=.5)}}, 'head.1': dict(lr_mult=.1)},
     {'head.1.weight': dict(lr_mult=.5), 'head.1': dict(lr_mult=.1)}),
    ({'adapter': {'A': dict(lr_mult=.5)}, 'adapter.A': dict(decay_mult=.3, lr_mult=.1)},
     {'adapter.A': dict(lr_mult=.5, decay_mult=.3)}),
], ids=str)
def test_keys_with_dots_from_a_command_line(nested, keys):
    """``--cfg-options ...custom_keys.adapter.A.lr_mult=.5`` makes dicts in dicts, which MMEngine takes for no settings."""
    assert settings(adapted(), dict(custom_keys=nested)) == settings(adapted(), dict(custom_keys=keys))
    assert settings(adapted(), dict(custom_keys=keys)) != settings(adapted(), dict(custom_keys={}))


@pytest.mark.parametrize('key, meant', [
    ('bakbone', 'backbone'), ('backbone.1.wieght', 'backbone.1.weight'), ('adaptor', None), ('adapters', 'adapter'),
    ('backbone.7', None), ('norm', None), ('backbone.1.adapter.AB', 'backbone.1.adapter.A'), ('ckbone.1.w', '')])
def test_keys_of_nothing(key, meant, caplog):
    """Configs for several backbones have some; a misspelt one leaves a training as it would be without it."""
    logger = MMLogger.get_instance('keys')
    with caplog.at_level('WARNING', logger.name):
        logger.addHandler(caplog.handler)
        if meant:
            with pytest.raises(SetupError, match=f'custom_keys of paramwise_cfg has {key!r}') as error:
                settings(adapted(), dict(custom_keys={key: dict(lr_mult=.1)}))
            assert f'Did you mean {meant!r}?' in str(error.value)
            return
        settings(adapted(), dict(custom_keys={key: dict(lr_mult=.1)}))
    assert (f'in the name of no parameter: {key}' in caplog.text) == (meant is None)


def test_keys_for_several_models():
    keys = dict(backbones=dict(lr_mult=.3), backbone=dict(lr_mult=.1))
    assert settings(adapted(), dict(custom_keys=keys))['backbone.0.adapter.A'] == (.1, 1.)


def test_a_layer_in_two_places():
    model = Detector()
    model.backbone.append(model.backbone[3])
    liera_mm.adapt(model.backbone, rank=2)
    found = settings(model, dict(bypass_duplicate=True, dwconv_decay_mult=0.))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_constructor_forgets_nothing():
    """It is asked for the settings of one layer after another."""
    cfg = dict(custom_keys={'backbone.1': dict(lr_mult=.1)})
    settings(adapted(), cfg)
    assert cfg == dict(custom_keys={'backbone.1': dict(lr_mult=.1)})


@pytest.mark.parametrize('backbone', [
    dict(type='ConvNeXt', arch='atto'), dict(type='ResNet', depth=50, base_channels=8),
    dict(type='VisionTransformer', arch='deit-tiny', img_size=64)], ids=['ConvNeXt', 'ResNet', 'VisionTransformer'])
def test_layer_decay_of_mmpretrain(backbone):
    cfg = dict(type='ImageClassifier', backbone=backbone)
    wrapped = dict(cfg, backbone=dict(type='LieRABackbone', backbone=backbone, liera=dict(rank=2)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        stock, ours = MODELS.build(cfg), MODELS.build(wrapped)
        rates, found = (settings(model, dict(layer_decay_rate=.5), constructor='LearningRateDecayOptimWrapperConstructor')
                        for model in (stock, ours))
    assert len(set(found.values())) > 3
    assert all(found[name] == rates[f'{name.partition(".adapter.")[0]}.weight'] for name in found)


def test_keys_with_dots_for_layer_decay():
    """Constructors of other packages find their settings by themselves."""
    cfg = dict(type='ImageClassifier', backbone=dict(type='ConvNeXt', arch='atto'))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg)
        found, expected, without = (
            settings(model, dict(custom_keys=keys), constructor='LearningRateDecayOptimWrapperConstructor')
            for keys in ({'stages': {'0': dict(decay_mult=0.)}}, {'stages.0': dict(decay_mult=0.)}, {}))
    assert found == expected != without


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
def test_layer_decay_of_mmdet(decay_type):
    backbone = dict(type='mmpretrain.ConvNeXt', arch='atto', out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
    cfg = dict(decay_rate=.5, decay_type=decay_type, num_layers=6)
    rates, found = [], []
    with DefaultScope.overwrite_default_scope('mmdet'):
        for part, result in ((backbone, rates), (dict(type='LieRABackbone', backbone=backbone, liera=dict(rank=2)), found)):
            model = nn.Module()
            model.backbone = MODELS.build(part)
            result.append(settings(model, cfg, constructor='LearningRateDecayOptimizerConstructor'))
    assert len(set(found[0].values())) > 3
    assert all(found[0][name] == rates[0][f'{name.partition(".adapter.")[0]}.weight'] for name in found[0])


def test_a_rate_of_zero():
    model = adapted()
    with pytest.raises(SetupError, match='6 tensors of adapters would never move, for their learning rate is 0'):
        invariants.check_optimizer(model, optimizer_of(model, dict(custom_keys={'backbone': dict(lr_mult=0.)})))
    cfg = dict(custom_keys={'backbone': dict(lr_mult=0.), 'adapter': dict(lr_mult=1.)})
    invariants.check_optimizer(model, optimizer_of(model, cfg))


def test_a_warmup_from_zero():
    model = adapted()
    wrapper = optimizer_of(model, None)
    torch.optim.lr_scheduler.LambdaLR(wrapper.optimizer, lambda step: step / 10)
    assert wrapper.optimizer.param_groups[0]['lr'] == 0
    invariants.check_optimizer(model, wrapper)

