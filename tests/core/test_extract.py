"""From weights back to the adapter: what an adapter made is found again, and other weights are met as nearly as can be."""
import copy

import pytest
import torch
from torch import nn

from liera_mm import adapt, export, summary
from liera_mm.core.algebra import METHODS
from liera_mm.core.extract import Fit, extract
from liera_mm.core.factors import factor_shapes
from liera_mm.core.group import UPDATES

pytestmark = pytest.mark.usefixtures('one_thread')

LAYERS = {
    'linear': lambda: nn.Linear(24, 16),
    'depthwise': lambda: nn.Conv2d(6, 6, 5, groups=6),
    'conv': lambda: nn.Conv2d(6, 8, 3),
    'transposed': lambda: nn.ConvTranspose2d(8, 6, 2, groups=2),
}
every_layer = pytest.mark.parametrize('layer', LAYERS)
every_method_and_layer = pytest.mark.parametrize(
    ('method', 'layer'), [(m, k) for m in METHODS for k in LAYERS if k != 'linear' or not m.startswith('atom')])
every_update = pytest.mark.parametrize('update', UPDATES)


@pytest.fixture
def base(layer, seed):
    return nn.Sequential(LAYERS[layer]())


@pytest.fixture
def moved(base):
    """Its state dict, the weight moved by random numbers a tenth of its size."""
    return {**base.state_dict(), **move({'0.weight': base[0].weight.detach()}, .1)}


def move(weights, size):
    """Each tensor of a state dict moved by random numbers of its own scale."""
    return {name: tensor + size * tensor.std() * torch.randn_like(tensor) for name, tensor in weights.items()}


def assert_found_again(base, method, update, memory_format=torch.contiguous_format):
    trained = adapt(copy.deepcopy(base), rank=2, alpha=4, method=method, update=update)
    unit = 1 if trained[0].adapter.rms is None else trained[0].adapter.rms
    with torch.no_grad():
        for parameter in trained[0].adapter.parameters():
            parameter.add_(.05 * unit * torch.randn_like(parameter))
    target = export(trained)
    fresh = adapt(base, rank=2, alpha=4, method=method, update=update).to(memory_format=memory_format)
    fit, = extract(fresh, target)
    assert fit.name == '0.weight' and fit.residual < .01
    torch.testing.assert_close(fit.change, (target['0.weight'] - base[0].frozen_weight).double().norm().item())
    torch.testing.assert_close(fit.left, (target['0.weight'] - fresh[0].effective_weight()).double().norm().item(),
                               rtol=.1, atol=1e-6)


@every_method_and_layer
@every_update
def test_what_an_adapter_made_is_found_again(base, method, update):
    assert_found_again(base, method, update)


@pytest.mark.parametrize('layer', ['conv'])
@pytest.mark.parametrize('method', METHODS)
def test_channels_last(base, method):
    assert_found_again(base, method, 'taylor', torch.channels_last)


@pytest.mark.parametrize('layer', ['transposed'])
@pytest.mark.parametrize(('update', 'number'), [('taylor', 2), ('exp', 0), ('exp', 2), ('exp', 4)])
def test_dora_is_found_again_where_one_start_leads_to_another_minimum(layer, update, number):
    torch.manual_seed(number)
    assert_found_again(nn.Sequential(LAYERS[layer]()), 'dora', update)


@every_method_and_layer
@every_update
def test_nothing_to_find(base, method, update):
    model = adapt(copy.deepcopy(base), rank=2, method=method, update=update)
    fit, = extract(model, base.state_dict())
    assert fit.change == 0 and fit.residual == 0
    torch.testing.assert_close(model[0].effective_weight(), base[0].weight)


@pytest.mark.parametrize('layer', ['depthwise'])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(('update', 'unit', 'scale', 'dtype'), [
    ('exp', 1e-8, 'relative', torch.float32),
    ('exp', 1e3, 'plain', torch.bfloat16),
    ('taylor', 1e3, 'plain', torch.bfloat16),
], ids=['overflow', 'rounding', 'rounding of taylor'])
def test_never_further_than_before(base, method, update, unit, scale, dtype):
    """Where exp overflows on the way, or factors in the precision of the model are coarser than the change."""
    base.to(dtype)[0].weight.data *= unit
    target = {**base.state_dict(), **move({'0.weight': base[0].weight.detach()}, .1)}
    fit, = extract(adapt(base, rank=1, method=method, update=update, scale=scale), target)
    assert fit.residual <= 1


@pytest.mark.parametrize('layer', ['linear', 'conv'])
def test_additive_is_the_best_of_its_rank(base, moved):
    """Eckart and Young: what is left are the singular values behind the first ones."""
    fit = extract(adapt(copy.deepcopy(base), rank=2, update='additive'), moved)[0]
    a, b = factor_shapes(base[0].weight.shape, 1, 2)
    singular = torch.linalg.svdvals((moved['0.weight'] - base[0].weight).reshape(b[0], a[1]).double())
    assert fit.left == pytest.approx(singular[a[0]:].norm().item(), rel=1e-4)


@every_layer
@pytest.mark.parametrize('update', ['taylor', 'exp'])
def test_better_than_the_singular_vectors_of_delta(base, moved, update):
    """Without weights and steps, the large Δ of small weights would take the whole rank."""
    fits = [extract(adapt(copy.deepcopy(base), rank=1, update=update), moved, steps)[0] for steps in (1, 200)]
    assert fits[1].residual < fits[0].residual < 1


@pytest.mark.parametrize('layer', ['conv'])
@every_update
def test_all_of_a_dense_delta(base, update):
    target = {name: tensor.abs() * base.state_dict()[name].sign() for name, tensor in move(base.state_dict(), .1).items()}
    model = adapt(copy.deepcopy(base), method='dense', update=update)
    assert extract(model, target)[0].residual < 1e-5


@pytest.mark.parametrize('train', [False, True])
def test_other_tensors(net, train):
    """Norms, biases and buffers are taken over where they train, and reported where they are frozen."""
    target = move({name: t for name, t in net.state_dict().items() if t.is_floating_point()}, .05)
    target['stem.1.num_batches_tracked'] = torch.tensor(7)
    model = adapt(copy.deepcopy(net), rank=4, targets=['pointwise', 'linear'], train_norm=train, train_bias=train)
    fits = {fit.name: fit for fit in extract(model, target)}
    adapted = {f'{row.layer}.weight' for row in summary(model)}
    assert len(adapted) == 5 and adapted <= fits.keys()
    assert all(fits[name].residual < .9 for name in adapted)
    assert all(fit.residual == 1 for name, fit in fits.items() if name not in adapted)
    assert 'stem.0.weight' in fits and 'stages.0.gamma' in fits  # never trained
    assert ('head.bias' in fits, 'stem.1.weight' in fits) == (not train, not train)
    assert torch.equal(model.head.bias, target['head.bias']) == train
    assert torch.equal(model.stem[1].running_mean, target['stem.1.running_mean'])
    assert model.stem[1].num_batches_tracked == 7


def test_linear_weights_for_a_1x1_convolution():
    base = nn.Sequential(nn.Conv2d(6, 4, 1))
    target = {name: tensor.squeeze() for name, tensor in move(base.state_dict(), .1).items()}
    assert target['0.weight'].dim() == 2
    assert extract(adapt(base, rank=4, update='additive'), target)[0].residual < 1e-5


@pytest.mark.parametrize(('change', 'message'), [
    (lambda weights: weights.pop('head.weight'), 'the weights lack head.weight'),
    (lambda weights: weights.update({'head.weight': torch.ones(2, 5)}), r'shape of head.weight is \(2, 5\).* \(2, 4\)'),
    (lambda weights: weights['head.weight'].fill_(torch.nan), 'head.weight has values that are not finite in the weights'),
    (lambda weights: weights['stem.1.running_var'].fill_(torch.inf), 'stem.1.running_var has values that are not finite'),
], ids=['missing', 'shape', 'nan', 'infinite statistics'])
def test_weights_of_another_model(net, change, message):
    weights = copy.deepcopy(net.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        extract(adapt(net), weights)


def test_residual():
    assert Fit('', 2., .5).residual == .25 and Fit('', 0., 0.).residual == 0
