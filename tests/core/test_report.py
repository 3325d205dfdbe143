"""What the reports say about perturbations whose rank, size and errors are known."""
import math

import pytest
import torch
from torch import nn

from liera_mm import adapt, layer_reports, merge, range_report, summary
from liera_mm.core.algebra import METHODS
from liera_mm.core.group import UPDATES
from liera_mm.core.report import numerical_rank
from liera_mm.core.targets import KINDS

pytestmark = pytest.mark.usefixtures('one_thread')

every_setting = pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])


def set_delta(layer, delta):
    """Give a layer of method dense a Δ by hand."""
    with torch.no_grad():
        layer.adapter.delta.copy_(torch.as_tensor(delta).expand_as(layer.adapter.delta))


# The whole model

@pytest.mark.parametrize('merged', [False, True], ids=['unmerged', 'merged'])
def test_range_report(merged):
    model = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    for layer, zeros in zip(model, (2, 1, 0, 1)):
        with torch.no_grad():
            layer.weight.fill_(1).view(-1)[:zeros] = 0
    overrides = [{'targets': ['1'], 'update': 'exp'}, {'targets': ['3'], 'update': 'additive'}]
    adapt(model, method='dense', scale='plain', overrides=overrides)
    set_delta(model[0], [[-.999, 1.], [-1., -2.], [0., 0.], [0., 0.], [-1.5, 3.]])
    set_delta(model[1], -4.)
    set_delta(model[3], 3.5)
    if merged:
        merge(model)
    report = range_report(model)
    assert (report.max_delta, report.max_delta_layer) == (4, '1')
    assert report.sign_change_share == 3 / 14  # of layers 0 and 2
    assert report.zero_weights == 3  # of layers 0 and 1, before Δ = -1 made one more


def test_range_report_at_start(net):
    report = range_report(adapt(net))
    assert report.max_delta == 0
    assert report.sign_change_share == 0
    assert report.zero_weights == 0


@pytest.mark.parametrize('position', [0, 1, 2])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_range_report_names_the_layer_that_is_not_finite(position, value):
    model = adapt(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]), method='dense', scale='plain')
    for layer in model:
        set_delta(layer, 5.)
    set_delta(model[position], [[1., value], [2., 3.]])
    report = range_report(model)
    assert report.max_delta_layer == str(position)
    assert math.isnan(report.max_delta) if math.isnan(value) else report.max_delta == math.inf


def test_range_report_without_layers(net):
    assert range_report(adapt(net, targets=[], train_norm=True)) == (0, '', 0, 0)


def test_range_report_without_taylor_layers():
    model = adapt(nn.Linear(2, 2), method='dense', update='additive')
    set_delta(model, -3.)
    assert range_report(model).sign_change_share == 0


# The numerical rank

@pytest.mark.parametrize('shape', [(30, 50), (50, 30)])
@pytest.mark.parametrize('rank', [0, 1, 7, 30])
def test_rank_of_a_product(shape, rank):
    matrix = torch.randn(shape[0], rank, dtype=torch.float64) @ torch.randn(rank, shape[1], dtype=torch.float64)
    assert numerical_rank(matrix) == rank


@pytest.mark.parametrize(('smallest', 'rank'), [(1e-5, 3), (2e-6, 3), (5e-7, 2), (1e-8, 2), (0., 2)])
@pytest.mark.parametrize('scale', [1e-6, 1., 1e6])
def test_rank_counts_singular_values_above_a_millionth_of_the_largest(smallest, rank, scale):
    left, right = (torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q for size in (40, 60))
    assert numerical_rank(scale * left @ torch.tensor([1., .1, smallest], dtype=torch.float64).diag() @ right.T) == rank


# A layer: matrix view n x m, its rank with rank-2 factors

LAYERS = {
    'linear': (lambda: nn.Linear(20, 24), (24, 20), 2),
    'pointwise': (lambda: nn.Conv2d(20, 24, 1), (24, 20), 2),
    'conv': (lambda: nn.Conv2d(8, 10, 3), (30, 24), 6),
    'grouped': (lambda: nn.Conv2d(8, 12, 3, groups=2), (18, 24), 6),
    'transposed': (lambda: nn.ConvTranspose2d(10, 8, 3), (30, 24), 6),
    'depthwise': (lambda: nn.Conv2d(8, 8, 5, groups=8), (5, 40), 5),
    'volume': (lambda: nn.Conv3d(6, 4, (2, 3, 4)), (24, 24), 8),
}


# Methods that are about another matrix than LoRA's: that, and the rank that Δ has with rank 2 for a weight of n x m x kernel
OTHER_VIEWS = {
    'tucker': lambda n, m, *kernel: ((n, m * math.prod(kernel)), min(2, n, math.prod(min(2, k) for k in (m, *kernel)))),
    'atom': lambda n, m, *kernel: ((n * m, math.prod(kernel)), 2),
    'atom-pissa': lambda n, m, *kernel: ((n * m, math.prod(kernel)), min(4, n * m, math.prod(kernel))),
}


@pytest.mark.parametrize(('kind', 'method', 'update'), [
    (k, m, u) for k in LAYERS for m in METHODS for u in UPDATES if k not in ('linear', 'pointwise') or m[:4] != 'atom'])
def test_rank_of_the_change(perturb, kind, method, update):
    """LoRA's is that of its factors, r k; that of PiSSA and MiLoRA twice that; others reach all of min(n, m)."""
    make, matrix, factor_rank = LAYERS[kind]
    model = nn.Sequential(make())
    report, = layer_reports(perturb(adapt(model, rank=2, method=method, update=update)))
    if method in OTHER_VIEWS:
        matrix, delta_rank = OTHER_VIEWS[method](*model[0].weight.shape)
        full = min(matrix)
    else:
        full = min(matrix)
        twice = min(2 * factor_rank, full)
        delta_rank = dict(lora=factor_rank, dora=factor_rank, pissa=twice, milora=twice, dense=full)[method]
    assert (report.matrix, report.delta_rank) == (matrix, delta_rank)
    assert report.core == (model[0].adapter.core if method == 'tucker' else None)
    assert report.rank == (delta_rank if update == 'additive' and method != 'dora' else full)


@every_setting
def test_change_of_the_weight(net, perturb, method, update):
    reports = layer_reports(perturb(adapt(net, rank=2, method=method, update=update)))
    for report in reports:
        layer = net.get_submodule(report.layer)
        change = (layer.effective_weight() - layer.frozen_weight).norm() / layer.frozen_weight.norm()
        assert report.relative_change == pytest.approx(change.item(), rel=1e-4)


@pytest.mark.parametrize('update', UPDATES)
def test_change_of_a_weight_of_zeros(update):
    model = nn.Sequential(nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    set_delta(adapt(model, method='dense', update=update, scale='plain', targets=['0'])[0], 1.)
    assert layer_reports(model)[0].relative_change is None


@pytest.mark.parametrize('size', [1e-3, 1e-6])
def test_rounding_of_a_small_change_is_no_rank(size):
    """The float32 weight W + Δ is off by more than the small singular values of Δ."""
    model = adapt(nn.Sequential(nn.Linear(64, 64)), rank=2, update='additive')
    with torch.no_grad():
        model[0].adapter.B.normal_().mul_(size)
    assert layer_reports(model)[0].rank == 2


@every_setting
def test_at_start_nothing_has_changed(net, method, update):
    for report in layer_reports(adapt(net, rank=2, method=method, update=update)):
        assert report.rank == report.relative_change == 0
        assert report.delta_quantiles == (0, 0, 0, 0)
        assert report.taylor_error == report.relative_taylor_error == (None if update == 'additive' else 0)
        assert report.sign_change_share == (0 if update == 'taylor' else None)


@every_setting
def test_reports_are_those_of_the_summary(net, perturb, method, update):
    net.own = nn.Module()  # a layer of no kind that torch or mmcv has
    net.own.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    perturb(adapt(net, rank=2, method=method, update=update, targets=[*KINDS, 'own']))
    reports = layer_reports(net)
    assert reports[-1].layer == 'own' and reports[-1].kind == 'conv'
    assert [(row.layer, row.kind, row.method, row.update, row.scale, row.parameters) for row in reports] == [
        (row.layer, row.kind, row.method, row.update, row.scale, row.trainable) for row in summary(net)]
    for report in reports:
        assert report.weights == math.prod(report.matrix) == net.get_submodule(report.layer).weight.numel()
    assert layer_reports(merge(net)) == reports


def test_quantiles():
    model = adapt(nn.Sequential(nn.Linear(100, 10)), method='dense', scale='plain')
    set_delta(model[0], (torch.randperm(1000).double().add(1) * torch.randn(1000).sign()).view(10, 100))
    assert layer_reports(model)[0].delta_quantiles == (500, 900, 990, 1000)


@pytest.mark.parametrize('update', ['taylor', 'exp'])
@pytest.mark.parametrize('delta', [1e-6, .25, -3.])
def test_error_of_the_taylor_form(update, delta):
    model = adapt(nn.Sequential(nn.Linear(4, 9)), method='dense', update=update, scale='plain')
    set_delta(model[0], delta)
    report, = layer_reports(model)
    exact = model[0].adapter.delta[0, 0].item()
    error = exact**2 / 2 if abs(exact) < 1e-3 else math.exp(exact) - 1 - exact
    assert report.taylor_error == pytest.approx(6 * error, rel=1e-5)
    assert report.relative_taylor_error == pytest.approx(error / abs(exact), rel=1e-5)


@pytest.mark.parametrize(('update', 'share'), [('taylor', .25), ('exp', None), ('additive', None)])
def test_sign_changes(update, share):
    model = adapt(nn.Sequential(nn.Linear(4, 1)), method='dense', update=update, scale='plain')
    set_delta(model[0], [-.99, -1., 1., 0.])
    assert layer_reports(model)[0].sign_change_share == share


@every_setting
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_values_that_are_not_finite(perturb, method, update, value):
    model = perturb(adapt(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), rank=2, method=method, update=update))
    with torch.no_grad():
        next(model[0].adapter.parameters()).view(-1)[0] = value
    broken, sound = layer_reports(model)
    assert broken.rank is broken.relative_change is None and not math.isfinite(broken.delta_quantiles[-1])
    assert sound.rank is not None and math.isfinite(sound.delta_quantiles[-1])
