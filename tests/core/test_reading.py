"""Code that reads the weight of an adapted layer gets the effective one; code that writes into it, or replaces it, fails.

Or it is given the model after merge_and_unload(), and gets the same.
"""
import copy
import io
import operator
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import fuse_conv_bn
from mmengine.model import BaseModel, constant_init, kaiming_init
from mmengine.runner import Runner
from mmpretrain.models.backbones import MobileOne, RepLKNet, RepMLPNet, RepVGG, SwinTransformerV2
from torch import nn
from torch.ao.nn.quantized import dynamic
from torch.ao.quantization import default_dynamic_qconfig, fuse_modules, quantize_dynamic
from torch.nn.utils import parametrizations, prune

from liera_mm import adapt, export, merge, merge_and_unload, unmerge
from liera_mm.core.algebra import METHODS
from liera_mm.core.errors import SetupError
from liera_mm.core.group import UPDATES
from liera_mm.core.reading import EffectiveWeight

REMEDY = r'merge_and_unload\(model\)'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def layer(seed, perturb):
    """An adapted convolution after training."""
    return perturb(adapt(nn.Conv2d(4, 6, 3), rank=2))


def same_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[key], state[key]) for key in state)


def moved(model, x, perturb, call=nn.Module.__call__, **settings):
    """An adapted model after training, and its output, which is far from what it was."""
    before = call(model, x)
    expected = call(perturb(adapt(model, rank=2, **settings)), x).detach()
    assert (expected - before).abs().max() > .02 * expected.abs().max()
    return model, expected


# Reading


def swin_v2():
    model = SwinTransformerV2(
        arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[2] * 4, extra_norm_every_n_blocks=0), img_size=64,
        window_size=[4, 4, 4, 2])
    model.train(False)
    return model


READERS = {
    'attention': (lambda: nn.MultiheadAttention(8, 2).eval(), (2, 5, 8), lambda model, x: model(x, x, x)[0]),
    'transformer_layer': (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (2, 5, 8),
                          nn.Module.__call__),
    'swin_v2': (swin_v2, (1, 3, 64, 64), lambda model, x: model(x)[-1]),
}


@pytest.mark.parametrize('reader', READERS)
def test_modules_that_read_a_weight_without_calling_the_layer(seed, reader, perturb):
    make, shape, call = READERS[reader]
    plain, x = make(), torch.randn(shape)
    model, expected = moved(copy.deepcopy(plain), x, perturb, call)
    plain.load_state_dict(export(model), strict=False)  # SwinV2 keeps its tables out of state dicts
    torch.testing.assert_close(call(plain, x), expected)
    with torch.no_grad():  # where torch has kernels that never call the layers
        torch.testing.assert_close(call(model, x), expected)
    call(model, x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_what_is_read(seed, method, update, dtype, perturb):
    layer = perturb(adapt(nn.Conv2d(4, 6, 3), rank=2, method=method, update=update)).to(dtype)
    with torch.no_grad():
        assert type(layer.weight) is EffectiveWeight and torch.equal(layer.weight, layer.effective_weight())
        assert torch.equal(layer.weight, merge(layer).weight)
        assert type(layer.weight) is EffectiveWeight and torch.equal(layer.weight, layer._parameters['weight'])
    assert unmerge(layer).weight.dtype == dtype


def test_what_is_computed_of_it_is_plain(layer):
    weight, x = layer.weight, torch.randn(1, 4, 5, 5)
    for result in (F.conv2d(x, weight), weight * 2, -weight, weight.clone(), weight.double(), weight.sum(), weight == 0,
                   torch.cat([weight, weight]), torch.zeros_like(weight), weight.to_sparse(),
                   weight.flatten(1) @ x.flatten()[:36]):
        assert type(result) is torch.Tensor
    F.conv2d(x, weight).relu_()
    F.conv2d(x, weight).sum().backward()
    assert all(p.grad is not None for p in layer.adapter.parameters())


def test_copies_of_it_are_plain(layer):
    parameter = nn.Parameter(layer.weight)
    assert type(parameter) is nn.Parameter and parameter.is_leaf and parameter.requires_grad
    assert type(nn.Parameter(layer.weight.data, requires_grad=False)) is nn.Parameter
    with torch.no_grad():
        parameter.zero_()
        assert layer.weight.any()
        weight = layer.weight
        buffer = io.BytesIO()
        torch.save(weight, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(buffer, weights_only=True)):
            assert type(other) is torch.Tensor and torch.equal(other, weight)


@pytest.mark.parametrize('make', [lambda layer: layer, nn.Sequential], ids=['root', 'child'])
def test_get_parameter(layer, make):
    model = make(layer)
    for name, parameter in model.named_parameters():
        if not name.endswith('weight'):
            assert model.get_parameter(name) is parameter
    name = next(name for name, _ in model.named_parameters() if name.endswith('weight'))
    got = model.get_parameter(name)
    assert isinstance(got, nn.Parameter) and torch.equal(got, layer.effective_weight())
    with pytest.raises(SetupError, match=REMEDY):
        got.data.zero_()
    with torch.no_grad():
        assert torch.equal(merge(model).get_parameter(name), dict(model.named_parameters())[name])
    with pytest.raises(AttributeError):
        model.get_parameter(f'{name}s')


# Writing


def foreach(layer):
    with torch.no_grad():
        torch._foreach_mul_([layer.weight, layer.weight], 2)


def add_out(layer):
    with torch.no_grad():
        torch.add(layer.weight, 1, out=layer.weight)


WRITES = {
    'zeros_': lambda layer: nn.init.zeros_(layer.weight),
    'normal_': lambda layer: nn.init.normal_(layer.weight, std=.02),
    'xavier_uniform_': lambda layer: nn.init.xavier_uniform_(layer.weight),
    'kaiming_normal_': lambda layer: nn.init.kaiming_normal_(tensor=layer.weight),
    'orthogonal_': lambda layer: nn.init.orthogonal_(layer.weight),
    'trunc_normal_': lambda layer: nn.init.trunc_normal_(layer.weight),
    'kaiming_init': kaiming_init,
    'constant_init': lambda layer: constant_init(layer, 0),
    'reset_parameters': lambda layer: layer.reset_parameters(),
    'data.mul_': lambda layer: layer.weight.data.mul_(2),
    'data.fill_': lambda layer: layer.weight.data.fill_(0),
    'detach': lambda layer: layer.weight.detach().zero_(),
    'copy_': lambda layer: layer.weight.copy_(torch.ones(6, 4, 3, 3)),
    'data =': lambda layer: setattr(layer.weight, 'data', torch.ones(6, 4, 3, 3)),
    'grad =': lambda layer: setattr(layer.weight, 'grad', torch.ones(6, 4, 3, 3)),
    'requires_grad =': lambda layer: setattr(layer.weight, 'requires_grad', True),
    'requires_grad_': lambda layer: layer.weight.requires_grad_(),
    'item': lambda layer: operator.setitem(layer.weight, 0, 0),
    'item of data': lambda layer: operator.setitem(layer.weight.data, slice(None), 0),
    '*=': lambda layer: operator.imul(layer.weight.data, 2),
    'row': lambda layer: layer.weight.data[0].zero_(),
    'rows': lambda layer: [row.zero_() for row in layer.weight.data],
    'chunk': lambda layer: layer.weight.data.chunk(2)[1].zero_(),
    'view': lambda layer: layer.weight.data.view(-1).zero_(),
    'transposed': lambda layer: layer.weight.data.T.zero_(),
    'same device': lambda layer: layer.weight.data.to('cpu').zero_(),
    'set_': lambda layer: layer.weight.data.set_(torch.ones(6, 4, 3, 3)),
    'apply_': lambda layer: layer.weight.data.apply_(abs),
    'relu': lambda layer: F.relu(layer.weight.data, inplace=True),
    'out': add_out,
    'foreach': foreach,
}


@pytest.mark.filterwarnings('ignore:The use of `x.T`')
@pytest.mark.parametrize('no_grad', [False, True], ids=['grad', 'no_grad'])
@pytest.mark.parametrize('write', WRITES)
@pytest.mark.parametrize('prepare', [merge, unmerge])
def test_writing_into_it_fails(layer, write, no_grad, prepare):
    """Merged, what is written would be lost with the next unmerge()."""
    if write == 'requires_grad_' and (no_grad or prepare is merge):
        return  # of a leaf, as nn.Parameter calls it
    expected, state = prepare(layer)._parameters['weight'].clone(), copy.deepcopy(layer.state_dict())
    with torch.set_grad_enabled(not no_grad), pytest.raises(SetupError, match=REMEDY):
        WRITES[write](layer)
    assert same_state(layer, state) and torch.equal(layer._parameters['weight'], expected)


@pytest.mark.parametrize('change', [
    parametrizations.weight_norm,
    pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings('ignore::FutureWarning')),
    parametrizations.spectral_norm,
    nn.utils.spectral_norm,
    lambda layer: prune.identity(layer, 'weight'),
    lambda layer: prune.l1_unstructured(layer, 'weight', .5),
    lambda layer: prune.ln_structured(layer, 'weight', .5, 2, 0),
    lambda layer: prune.global_unstructured([(layer, 'weight')], prune.L1Unstructured, amount=.5),
    lambda layer: setattr(layer, 'weight', nn.Parameter(torch.ones_like(layer.weight))),
    lambda layer: delattr(layer, 'weight'),
    lambda layer: nn.utils.fuse_conv_bn_eval(layer.eval(), nn.BatchNorm2d(6).eval()),
    lambda layer: fuse_conv_bn(nn.Sequential(layer, nn.BatchNorm2d(6)).eval()),
], ids=['weight_norm', 'old_weight_norm', 'spectral_norm', 'old_spectral_norm', 'prune', 'l1_prune', 'ln_prune',
        'global_prune', 'assign', 'delete', 'fuse_conv_bn_eval', 'fuse_conv_bn'])
@pytest.mark.parametrize('prepare', [merge, unmerge])
def test_a_weight_cannot_be_replaced(layer, change, prepare):
    x = torch.randn(1, 4, 5, 5)
    prepare(layer)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    with pytest.raises(SetupError, match=REMEDY):
        change(layer)
    assert same_state(layer, state)
    assert torch.equal(layer(x), expected)
    change(merge_and_unload(layer))


# What is done to models before they are deployed


@pytest.fixture(params=['adapted', 'merged', 'unloaded'])
def prepare(request):
    return dict(adapted=lambda model: model, merged=merge, unloaded=merge_and_unload)[request.param]


DEPLOYED = {
    'RepVGG': lambda: RepVGG(
        dict(num_blocks=[1] * 4, width_factor=[.125] * 4, group_layer_map=None, se_cfg=None, stem_channels=8),
        out_indices=(3, )),
    'MobileOne': lambda: MobileOne(
        dict(num_blocks=[1] * 4, width_factor=[.125] * 4, num_conv_branches=[2] * 4, num_se_blocks=[0] * 4),
        out_indices=(3, )),
    'RepLKNet': lambda: RepLKNet(
        dict(large_kernel_sizes=[5] * 4, layers=[1] * 4, channels=[8] * 4, small_kernel=3, dw_ratio=1), out_indices=(3, )),
    'RepMLP': lambda: RepMLPNet(
        dict(channels=[8] * 4, depths=[1] * 4, sharesets_nums=[1, 2, 2, 2]), img_size=64, out_indices=(3, ),
        reparam_conv_kernels=(1, 3)),
}


@pytest.mark.parametrize('name', DEPLOYED)
def test_switch_to_deploy(seed, name, prepare, perturb):
    model, x = DEPLOYED[name](), torch.randn(1, 3, 64, 64)
    model.eval()  # which returns None
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, .5, 1.5)
            nn.init.uniform_(norm.running_mean, -.1, .1)
    model, expected = moved(model, x, perturb, call=lambda model, x: model(x)[-1])
    prepare(model).switch_to_deploy()
    torch.testing.assert_close(model(x)[-1], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class Classifier(BaseModel):
    """Which Runners initialise, unless it has been done."""

    def __init__(self):
        super().__init__(init_cfg=dict(type='Kaiming', layer='Conv2d'))
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, images, labels, mode):
        return dict(loss=F.cross_entropy(self.head(self.conv(images).mean((2, 3))), labels))


@pytest.mark.parametrize('initialised', [True, False])
def test_a_runner_of_a_model_that_was_adapted_by_hand(seed, tmp_path, initialised):
    """It would initialise the weights once more, which nobody wants who has adapted them."""
    model = Classifier()
    if initialised:
        model.init_weights()
    frozen = adapt(model, rank=2, targets=['conv']).conv.frozen_weight.clone()
    images = [dict(images=torch.randn(3, 8, 8), labels=torch.tensor(index % 3)) for index in range(4)]
    runner = Runner(
        model, tmp_path, dict(dataset=images, batch_size=2, sampler=dict(type='DefaultSampler'),
                              collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        experiment_name=tmp_path.name)
    if initialised:
        runner.train()
        assert not torch.equal(model.conv.weight, frozen)
    else:
        with pytest.raises(SetupError, match='Do this before adapt'):
            runner.train()
    assert torch.equal(model.conv.frozen_weight, frozen)


def test_fuse_conv_bn(net, image, prepare, perturb):
    model, expected = moved(net, image, perturb)
    model = prepare(model)
    if hasattr(model, 'liera'):
        for fuse in (fuse_conv_bn, lambda model: nn.utils.fuse_conv_bn_eval(*model.stem)):
            with pytest.raises(SetupError, match=REMEDY):
                fuse(model)
        assert torch.equal(unmerge(model)(image), expected)
    else:
        torch.testing.assert_close(fuse_conv_bn(model)(image), expected)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_the_weights_that_a_fusion_computes(net, image, perturb):
    model, _ = moved(net, image, perturb)
    conv, norm = model.stem
    fused = nn.utils.fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight,
                                          norm.bias)
    assert all(type(parameter) is nn.Parameter for parameter in fused)
    torch.testing.assert_close(F.conv2d(image, *fused, stride=2), model.stem(image))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_fuse_modules(net, image, prepare, perturb):
    """torch's quantisation goes by the very class of a layer."""
    model, expected = moved(net, image, perturb)
    model = prepare(model)
    fuse = partial(fuse_modules, model, ['stem.0', 'stem.1'])
    if hasattr(model, 'liera'):
        with pytest.raises((NotImplementedError, AssertionError), match='Cannot fuse modules|did not find fuser method'):
            fuse()
    else:
        torch.testing.assert_close(fuse()(image), expected)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_dynamic_quantisation(seed, prepare, perturb):
    """Layers that are adapted stay as they are, with their adapters."""
    x = torch.randn(4, 16)
    model, expected = moved(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), x, perturb, update='additive')
    model = prepare(model)
    quantised = quantize_dynamic(model, {nn.Linear})
    if hasattr(model, 'liera'):
        torch.testing.assert_close(quantised(x), expected)
    else:
        assert all('quantized' in type(quantised[i]).__module__ for i in (0, 2))
        assert (quantised(x) - expected).abs().max() < .05 * expected.abs().max()


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_quantised_layer_of_an_adapted_one(seed, prepare, perturb):
    """Where it is asked for by hand, torch refuses the class."""
    x = torch.randn(4, 16)
    layer, expected = moved(nn.Linear(16, 32), x, perturb, update='additive')
    layer = prepare(layer)
    layer.qconfig = default_dynamic_qconfig
    if hasattr(layer, 'liera'):
        with pytest.raises(AssertionError, match='only works for one of'):
            dynamic.Linear.from_float(layer)
    else:
        assert (dynamic.Linear.from_float(layer)(x) - expected).abs().max() < .05 * expected.abs().max()
