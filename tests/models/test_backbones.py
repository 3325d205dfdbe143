"""LieRAConvNeXt, and LieRABackbone around backbones of MMDetection and mmpretrain."""
import copy
import pickle

import mmdet.registry
import mmengine.registry
import mmpretrain.registry
import pytest
import torch
from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor
from mmdet.models.backbones import ResNet, SwinTransformer
from mmengine.registry import DefaultScope
from mmpretrain.models.backbones import ConvNeXt
from torch import nn

import liera_mm
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.errors import SetupError

pytestmark = pytest.mark.usefixtures('one_thread')

ARCH = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])
V1 = dict(arch=ARCH, layer_scale_init_value=.1, out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
V2 = dict(V1, layer_scale_init_value=0., use_grn=True)
RESNET = dict(type='mmdet.ResNet', depth=50, base_channels=4, norm_eval=True)
SWIN = dict(type='mmdet.SwinTransformer', embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4)

# Name: the backbone's class, its config with an empty place for `liera`, the same without us
CASES = {
    'convnext-v1': (ConvNeXt, dict(type='LieRAConvNeXt', **V1), dict(type='mmpretrain.ConvNeXt', **V1)),
    'convnext-v2': (ConvNeXt, dict(type='LieRAConvNeXt', **V2), dict(type='mmpretrain.ConvNeXt', **V2)),
    'convnext-v2-1x1': (ConvNeXt, dict(type='LieRAConvNeXt', linear_pw_conv=False, **V2),
                        dict(type='mmpretrain.ConvNeXt', linear_pw_conv=False, **V2)),
    **{
        f'around-{name}': (cls, dict(type='LieRABackbone', backbone=backbone), backbone)
        for name, cls, backbone in (
            ('convnext-v1', ConvNeXt, dict(type='mmpretrain.ConvNeXt', **V1)),
            ('convnext-v2', ConvNeXt, dict(type='mmpretrain.ConvNeXt', **V2)),
            ('resnet', ResNet, RESNET),
            ('swin', SwinTransformer, SWIN),
        )
    },
}
REGISTRIES = dict(mmengine=mmengine.registry.MODELS, mmdet=mmdet.registry.MODELS, mmpretrain=mmpretrain.registry.MODELS)
LIERA = dict(rank=2, alpha=4)


def build(cfg, scope='mmdet'):
    with DefaultScope.overwrite_default_scope(scope):
        return REGISTRIES[scope].build(copy.deepcopy(cfg))


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def adapted(case):
    """An adapted backbone whose weights are not at their neutral values."""
    model = build(dict(case[1], liera=LIERA)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.add_(.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def picture():
    return torch.randn(2, 3, 64, 64)


def assert_equal_outputs(ours, theirs):
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize('scope', REGISTRIES)
def test_starts_as_the_original(case, scope, picture):
    cls, ours, plain = case
    ours, plain = build(dict(ours, liera=LIERA), scope), build(plain, scope)
    for model in (ours, plain):
        model.eval()  # mmpretrain's returns None
    ours.fast = False  # equal only to rounding: test_convnext.py
    assert isinstance(ours, cls) and cls.__name__ in type(ours).__name__
    state = ours.state_dict()
    base = {name: tensor for name, tensor in state.items() if '.adapter.' not in name}
    assert len(base) < len(state)
    assert list(base) == list(plain.state_dict())
    plain.load_state_dict(base)
    assert_equal_outputs(ours(picture), plain(picture))


def test_unprefixed_type_is_of_the_default_scope():
    assert isinstance(build(dict(type='LieRABackbone', backbone=dict(RESNET, type='ResNet'), liera=LIERA)), ResNet)


def test_adapts_every_kernel_and_freezes_the_rest(case, adapted):
    kernels = [name for name, layer in adapted.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert [row.layer for row in liera_mm.summary(adapted)] == kernels
    assert all(p.requires_grad == ('.adapter.' in name) for name, p in adapted.named_parameters())


def test_training_moves_the_output(adapted, perturb, picture):
    before = adapted(picture)
    perturb(adapted)
    after = adapted(picture)
    assert all(not torch.equal(a, b) for a, b in zip(before, after))
    assert_equal_outputs(liera_mm.merge(adapted)(picture), after)


@pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
def test_copies(adapted, perturb, picture, clone):
    perturb(adapted)
    before = adapted(picture)
    twin = clone(adapted)
    assert type(twin) is type(adapted)
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in adapted.named_parameters()]
    assert_equal_outputs(twin(picture), before)
    perturb(twin)  # must not reach the original
    assert not torch.equal(twin(picture)[3], before[3])
    assert_equal_outputs(adapted(picture), before)


def test_train_and_eval_return_the_model(adapted):
    assert adapted.train() is adapted and adapted.training
    assert adapted.eval() is adapted and not adapted.training


@pytest.mark.parametrize('targets', [('conv', 'depthwise', 'pointwise', 'linear'), ('re:(stages.2|layer3)\\..*', )],
                         ids=['all', 'late'])
def test_activation_checkpointing_gives_the_same_gradients(case, picture, targets, perturb):
    _, cfg, _ = case
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        inner = {'backbone': dict(cfg['backbone'], with_cp=with_cp)} if 'backbone' in cfg else dict(with_cp=with_cp)
        model = perturb(build({**cfg, **inner, 'liera': dict(LIERA, targets=targets)}).train())
        sum(output.square().mean() for output in model(picture)).backward()
        assert any(getattr(m, 'with_cp', False) for m in model.modules()) == with_cp
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    expected, ours = gradients
    assert all(gradient.any() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name])


def test_without_liera_all_is_frozen(case, picture):
    _, cfg, plain = case
    model = build(cfg).eval()
    assert not any(p.requires_grad for p in model.parameters())
    assert not list(adapted_layers(model))
    assert list(model.state_dict()) == list(build(plain).state_dict())
    assert not model.train()(picture)[3].requires_grad


@mmengine.registry.MODELS.register_module()
class Uninitialised(nn.Module):
    """As TridentNet's backbone, of which pretrained weights alone are the weights."""

    def __init__(self, fill=None):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.layer.weight = nn.Parameter(torch.Tensor(4, 3, 3, 3) if fill is None else torch.full((4, 3, 3, 3), fill))
        self.norm = nn.BatchNorm2d(4)


@pytest.mark.parametrize('fill', [None, float('nan')])
@pytest.mark.parametrize('deterministic', [False, True])
def test_weights_that_are_whatever_was_in_memory(fill, deterministic):
    """Whether a layer is adapted does not depend on that, nor does the mode change in which torch is."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        model = mmengine.registry.MODELS.build(
            dict(type='LieRABackbone', backbone=dict(type='Uninitialised', fill=fill), liera=dict(rank=2)))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [name for name, _ in adapted_layers(model)] == ['layer'] and not model.trained_in_place
    assert model.layer.weight.isfinite().all() and model.layer.weight.std() > .05


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('name', ['convnext-v2', 'around-convnext-v2'])
def test_layerwise_learning_rates(name, decay_type):
    detector = nn.Module()
    detector.backbone = build(dict(CASES[name][1], liera=LIERA))
    detector.head = nn.Linear(1, 1)
    constructor = LearningRateDecayOptimizerConstructor(
        dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1., weight_decay=.05)),
        dict(decay_rate=.5, decay_type=decay_type, num_layers=6))
    groups = constructor(detector).optimizer.param_groups
    rates = {name: group['lr'] for group in groups for name in group['param_names']}
    assert set(rates) == {name for name, p in detector.named_parameters() if p.requires_grad}
    depths = [{rate for name, rate in rates.items() if name.startswith(part)} for part in
              (*(f'backbone.stages.{i}.' for i in range(4)), 'head.')]
    assert all(len(rates) == 1 for rates in depths)
    assert sorted(depths, key=min) == depths
    assert min(depths[0]) < min(depths[1]) < min(depths[2]) < min(depths[3]) <= min(depths[4]) == 1
    decays = {name: group['weight_decay'] for group in groups for name in group['param_names']}
    assert {decay for name, decay in decays.items() if '.adapter.' in name} == {.05}


@pytest.mark.parametrize('name', ['convnext-v2', 'around-resnet'])
@pytest.mark.parametrize('liera, message', [
    (dict(rank=0), 'rank must be a whole number of at least 1, not 0'),
    (dict(method='loha'), "unknown method 'loha'.*known: lora"),
    (dict(update='tailor'), "unknown update 'tailor'; did you mean 'taylor'"),
    (dict(targets=['convv']), "'convv' matches no layer; did you mean 'conv'"),
    (dict(ranks=3), "unknown setting 'ranks'; did you mean 'rank'"),
])
def test_bad_settings(name, liera, message):
    with pytest.raises(SetupError, match=message):
        build(dict(CASES[name][1], liera=liera))


# Plain again


def assert_plain(ours, theirs):
    """The same modules of the same classes with the same attributes, of which none is of this package."""
    for (name, module), (other_name, other) in zip(ours.named_modules(), theirs.named_modules()):
        assert name == other_name and type(module) is type(other), name
        assert not type(module).__module__.startswith('liera_mm')
        assert vars(module).keys() == vars(other).keys(), name
        assert module._parameters.keys() == other._parameters.keys() and module._buffers.keys() == other._buffers.keys()
    assert len([*ours.modules()]) == len([*theirs.modules()])


@pytest.mark.parametrize('liera', [LIERA, dict(LIERA, update='exp', method='dora', train_norm=True), None],
                         ids=['taylor', 'exp', 'frozen'])
@pytest.mark.parametrize('merged', [False, True], ids=['unmerged', 'merged'])
def test_merge_and_unload(case, picture, perturb, liera, merged):
    model = perturb(build(dict(case[1], liera=liera))).eval()
    expected, plain = model(picture), liera_mm.export(model)
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad and '.adapter.' not in key]
    if merged:
        liera_mm.merge(model)
    assert liera_mm.merge_and_unload(model) is model
    stock = build(case[2])
    stock.eval()
    assert_plain(model, stock)
    state = model.state_dict()
    assert list(state) == list(stock.state_dict()) == list(plain)
    assert all(torch.equal(state[key], plain[key]) for key in plain)
    for a, b in zip(model(picture), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == frozen
    stock.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    liera_mm.adapt(model, rank=1)


def test_merge_and_unload_of_a_detector(perturb):
    model = nn.Sequential(build(dict(CASES['convnext-v2'][1], liera=LIERA)), build(dict(type='DeviceMaskPreprocessor')))
    liera_mm.load_adapter(model[0], liera_mm.adapter_state_dict(perturb(model)[0]), 'cats')
    assert_plain(liera_mm.merge_and_unload(model), nn.Sequential(build(CASES['convnext-v2'][2]),
                                                                 build(dict(type='DetDataPreprocessor'))))
