"""The fast forward pass of LieRAConvNeXt computes what mmpretrain's does, to rounding: outputs and gradients."""
import copy

import pytest
import torch
from mmengine.analysis import get_model_complexity_info

import liera_mm
from liera_mm.core.kernels import convnext, weight
from liera_mm.models import LieRAConvNeXt

VERSIONS = {
    'v1': dict(layer_scale_init_value=.5),
    'v1 without layer scale': dict(layer_scale_init_value=0.),
    'v2': dict(layer_scale_init_value=0., use_grn=True),
    'v2 with 1x1 convolutions': dict(layer_scale_init_value=.5, use_grn=True, linear_pw_conv=False),
}
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def build(liera=None, dtype=torch.float64, **kwargs):
    """A small backbone whose parameters are all far from where they start."""
    torch.manual_seed(0)
    arch = dict(depths=[1, 1, 2, 1], channels=[8, 16, 24, 32])
    settings = dict(arch=arch, out_indices=[0, 1, 2, 3], gap_before_final_norm=False, drop_path_rate=.3)
    model = LieRAConvNeXt(liera=liera, **{**settings, **VERSIONS['v2'], **kwargs}).to(dtype)
    with torch.no_grad():
        for module in model.modules():
            unit = getattr(module, 'rms', None)  # what a relative Δ is divided by
            for parameter in module.parameters(recurse=False):
                parameter.add_((.1 if unit is None else .1 * unit) * torch.randn_like(parameter))
    return model.train()


def run(model, x, fast):
    """Outputs, and gradients of whatever trains, of a loss that weighs every output differently."""
    model.fast = fast
    model.zero_grad()
    torch.manual_seed(1)  # for stochastic depth
    outputs = model(x)
    loss = sum((out.double() * torch.linspace(0, 1, out.numel(), device=x.device).view(out.shape)).sum() for out in outputs)
    if loss.requires_grad:
        loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def assert_same(model, x, tolerance):
    (theirs, their_grads), (ours, our_grads) = run(model, x, False), run(model, x, True)
    assert [out.shape for out in ours] == [out.shape for out in theirs]
    assert max(map(difference, ours, theirs)) < tolerance
    assert our_grads.keys() == their_grads.keys()
    worst = max(our_grads, key=lambda name: difference(our_grads[name], their_grads[name]), default=None)
    assert worst is None or difference(our_grads[worst], their_grads[worst]) < 5 * tolerance, worst


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize('version', VERSIONS.values(), ids=VERSIONS)
@pytest.mark.parametrize('trained', ['adapters', 'everything', 'nothing'])
def test_outputs_and_gradients(version, trained, dtype, tolerance):
    model = build(dict(rank=2) if trained == 'adapters' else None, dtype, **version)
    if trained == 'everything':
        model.requires_grad_(True)
    assert_same(model, torch.randn(2, 3, 40, 70, dtype=dtype), tolerance)


@pytest.mark.parametrize('update', ['additive', 'taylor', 'exp'])
@pytest.mark.parametrize('method', ['lora', 'pissa', 'dora', 'dense'])
def test_every_method(method, update):
    liera = dict(method=method, update=update, rank=2, train_norm=True, train_bias=True)
    assert_same(build(liera), torch.randn(2, 3, 32, 32, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize('update', ['additive', 'taylor', 'exp'])
@pytest.mark.parametrize('method', ['lora', 'pissa', 'dora', 'dense'])
def test_starts_bit_for_bit_as_the_frozen_network(method, update):
    frozen, x = build(None, torch.float32).eval(), torch.randn(2, 3, 40, 70)
    adapted = LieRAConvNeXt(
        liera=dict(method=method, update=update, rank=2), arch=dict(depths=frozen.depths, channels=frozen.channels),
        out_indices=[0, 1, 2, 3], gap_before_final_norm=False, **VERSIONS['v2']).eval()
    missing, unexpected = adapted.load_state_dict(frozen.state_dict(), strict=False)
    assert not unexpected and all('.adapter.' in name for name in missing)
    assert frozen.fast and adapted.fast
    assert all(map(torch.equal, adapted(x), frozen(x)))


def test_of_some_layers_only():
    liera = dict(rank=2, targets=['depthwise', 'stages.2.1.*'], overrides=[dict(targets=['stages.2.1.*'], update='exp')])
    assert_same(build(liera), torch.randn(1, 3, 32, 32, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (64, 35)])
def test_image_sizes_that_do_not_divide(height, width):
    assert_same(build(dict(rank=2)), torch.randn(2, 3, height, width, dtype=torch.float64), 1e-13)


def test_gradient_by_the_image():
    model, x = build(dict(rank=2)), torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    grads = []
    for fast in (False, True):
        x.grad = None
        run(model, x, fast)
        grads.append(x.grad)
    assert difference(*grads) < 1e-13


def test_classification():
    model = build(dict(rank=2), out_indices=-1, gap_before_final_norm=True)
    assert_same(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), 1e-13)


def test_evaluation_merged_and_not():
    model, x = build(dict(rank=2)).eval(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_same(model, x, 1e-13)
        unmerged = model(x)
        assert max(map(difference, liera_mm.merge(model)(x), unmerged)) < 1e-13


def test_gradient_checkpointing_changes_nothing():
    model, x = build(dict(rank=2), with_cp=True), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    _, again = run(model, x, True)
    for block in (block for stage in model.stages for block in stage):
        block.with_cp = False
    _, once = run(model, x, True)
    assert all(torch.equal(again[name], once[name]) for name in once)


def test_under_autocast_on_the_cpu():
    # Without stochastic depth, whose draws differ between dtypes
    model, x = build(dict(rank=2), torch.float32, drop_path_rate=0.), torch.randn(2, 3, 64, 64)
    expected = run(model, x, False)[0]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = run(model, x, True)[0]
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    assert max(map(difference, outputs, expected)) < 2e-2


@pytest.mark.parametrize('change, fast', [({}, True), (dict(fast=False), False), (dict(act_cfg=dict(type='ReLU')), False),
                                          (dict(act_cfg=dict(type='GELU', approximate='tanh')), False)])
def test_is_used_where_it_is_wanted_and_possible(change, fast):
    assert build(dict(rank=2), **change).fast is fast


def test_state_dict_has_no_other_names():
    assert build(dict(rank=2)).state_dict().keys() == build(dict(rank=2), fast=False).state_dict().keys()


def test_deepcopy():
    model = build(dict(rank=2))
    twin, x = copy.deepcopy(model), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert all(map(torch.equal, run(model, x, True)[0], run(twin, x, True)[0]))


@pytest.mark.parametrize('version, update', [('v1', 'exp'), ('v2', 'taylor')])
def test_with_the_kernels_interpreted(version, update, monkeypatch):
    """All of it with the Triton kernels, without a GPU."""
    triton_ops = pytest.importorskip('liera_mm.core.kernels.triton_ops', reason='Triton is not installed')
    if torch.cuda.is_available():
        pytest.skip('the kernels are compiled here')
    model = build(dict(rank=2, update=update, train_norm=True, train_bias=True), drop_path_rate=0., out_indices=[0, 1],
                  arch=dict(depths=[1, 1], channels=[8, 16]), **VERSIONS[version])
    x = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    expected, expected_grads = run(model, x, False)
    for module in (convnext, weight):
        monkeypatch.setattr(module, 'ops_for', lambda *tensors: triton_ops)
    outputs, grads = run(model.float(), x.float(), True)
    assert max(map(difference, outputs, expected)) < 1e-5
    assert all(difference(grads[name], right) < 1e-4 for name, right in expected_grads.items())


@cuda
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize('version', VERSIONS.values(), ids=VERSIONS)
@pytest.mark.parametrize('trained', ['adapters', 'everything'])
def test_on_the_gpu(version, trained, dtype, tolerance):
    """In half precision, both under autocast, the fast pass is as near to float64 as the stock one, or nearer."""
    model = build(dict(rank=2) if trained == 'adapters' else None, drop_path_rate=0., **version)
    if trained == 'everything':
        model.requires_grad_(True)
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)
    expected, expected_grads = run(model, x, False)
    model, x = model.float().cuda(), x.float().cuda()
    with torch.autocast('cuda', dtype=dtype, enabled=dtype != torch.float32):
        outputs, grads = run(model, x, True)
        stock, stock_grads = run(model, x, False)
    for ours, theirs, right in zip(outputs, stock, expected):
        assert difference(ours.cpu(), right) < max(tolerance, 1.5 * difference(theirs.cpu(), right))
    for name, right in expected_grads.items():
        allowed = max(5 * tolerance, 1.5 * difference(stock_grads[name].cpu(), right))
        assert difference(grads[name].cpu(), right) < allowed, name


def test_empty_batch_and_flops_are_those_of_the_stock_network():
    model = build(dict(rank=2), dtype=torch.float32)
    outputs = model(torch.zeros(0, 3, 64, 64))
    sum(output.sum() for output in outputs).backward()
    assert all(len(output) == 0 for output in outputs)
    flops = []
    for model.fast in (True, False):
        flops.append(get_model_complexity_info(model, (3, 64, 64), show_table=False, show_arch=False)['flops'])
    assert flops[0] == flops[1] > 0
