"""Sums of adapters: exact in the algebra, a product in the group, of any rank; saved, loaded, switched."""
import copy

import numpy as np
import pytest
import torch
from torch import nn

from liera_mm import adapt, adapter_state_dict, combine, export, load_adapter, merge, save_adapter, set_adapter, summary
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.adapters import active_adapter
from liera_mm.core.algebra import METHODS
from liera_mm.core.group import UPDATES

pytestmark = pytest.mark.usefixtures('one_thread')

WEIGHTS = {'cats': .75, 'dogs': -.5, 'birds': 1.25}


@pytest.fixture
def make(net):
    """A function that adapts a network in double precision, with three adapters that differ in every trained tensor."""

    def make(double=True, **settings):
        model = adapt(copy.deepcopy(net).double() if double else copy.deepcopy(net), **settings)
        for name in WEIGHTS:
            load_adapter(model, adapter_state_dict(set_adapter(model, 'default')), name)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(.05 * torch.randn_like(parameter))
        return model

    return make


def deltas(model, name):
    set_adapter(model, name)
    return {key: layer.adapter().detach() for key, layer in adapted_layers(model)}


@pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])
def test_the_sum_is_exact(make, method, update):
    model = make(rank=2, method=method, update=update)
    for _, layer in adapted_layers(set_adapter(model, 'dogs')):
        if layer.adapter.rms is not None:
            layer.adapter.rms *= 1.01  # as of a base in another precision
    each = {name: deltas(model, name) for name in WEIGHTS}
    assert combine(model, WEIGHTS, 'all') is model and active_adapter(model) == 'all'
    for key, delta in deltas(model, 'all').items():
        torch.testing.assert_close(delta, sum(w * each[name][key] for name, w in WEIGHTS.items()), rtol=1e-12, atol=1e-13)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize('method', METHODS)
def test_under_exp_it_is_the_product_in_the_group(make, method):
    model = make(rank=2, method=method, update='exp')
    base = {key: layer.frozen_weight.detach().clone() for key, layer in adapted_layers(model)}
    moved = {}
    for name in WEIGHTS:
        set_adapter(model, name)
        moved[name] = {key: layer.effective_weight().detach() for key, layer in adapted_layers(model)}
    combine(model, WEIGHTS, 'all')
    for key, layer in adapted_layers(model):
        product = base[key]
        for name, weight in WEIGHTS.items():
            product = product * (moved[name][key] / base[key])**weight
        torch.testing.assert_close(layer.effective_weight().detach(), product, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])
def test_one_adapter_with_weight_1_is_itself(make, image, method, update):
    model = make(double=False, rank=2, method=method, update=update)
    expected = set_adapter(model, 'dogs')(image)
    combine(model, {'dogs': 1}, 'same')
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_numpy(make):
    model = make(rank=2)
    expected = deltas(combine(model, {'cats': .5, 'dogs': 2}, 'all'), 'all')
    ours = deltas(combine(model, {'cats': np.float32(.5), 'dogs': np.int64(2)}, 'all'), 'all')
    assert all(torch.equal(ours[key], delta) for key, delta in expected.items())


@pytest.mark.parametrize('method', METHODS)
def test_nothing_of_each_is_the_base(make, net, image, method):
    model = make(double=False, rank=2, method=method, update='exp')
    combine(model, {'cats': 0., 'dogs': 0}, 'none')
    torch.testing.assert_close(model(image), net(image), rtol=1e-5, atol=1e-5)


def test_ranks_and_settings_add_up(make):
    settings = dict(rank=2, alpha=6, overrides=[
        dict(targets=['depthwise'], method='dense'), dict(targets=['linear'], rank=1), dict(targets=['stem.*'], alpha=5)])
    model = make(**settings)
    before = {row.layer: row.rank for row in summary(model)}
    scales = {name: layer.adapter.scale for name, layer in adapted_layers(model)}
    combine(combine(model, {'cats': .5, 'dogs': .5}, 'two'), {'two': .5, 'birds': .5}, 'three')
    for name, times in (('two', 2), ('three', 3), ('cats', 1), ('three', 3), ('default', 1)):
        set_adapter(model, name)
        assert {row.layer: row.rank for row in summary(model)} == {k: rank and rank * times for k, rank in before.items()}
        assert {key: layer.adapter.scale for key, layer in adapted_layers(model)} == pytest.approx(scales)
        assert (model.liera['rank'], model.liera['alpha']) == (2 * times, 6 * times)
        assert model.liera['overrides'] == [dict(targets=['depthwise'], method='dense'),
                                            dict(targets=['linear'], rank=times), dict(targets=['stem.*'], alpha=5 * times)]


def test_settings_of_dense_ones_stay(make):
    model = make(rank=2, method='dense')
    settings = dict(model.liera)
    combine(model, WEIGHTS, 'all')
    assert model.liera == settings


@pytest.mark.parametrize('method', METHODS)
def test_its_file(make, net, image, tmp_path, method):
    """Loads into a model that was adapted with its settings, and beside adapters of another rank."""
    model = make(double=False, rank=2, method=method, update='exp', overrides=[dict(targets=['linear'], rank=1)])
    others = {name: set_adapter(model, name)(image) for name in WEIGHTS}
    combine(model, WEIGHTS, 'all')
    expected = model(image)
    save_adapter(model, tmp_path / 'all')
    fresh = adapt(copy.deepcopy(net), **model.liera)
    assert torch.equal(load_adapter(fresh, tmp_path / 'all')(image), expected)
    for name in WEIGHTS:
        assert torch.equal(set_adapter(model, name)(image), others[name])
    save_adapter(set_adapter(model, 'all'), tmp_path / 'again')
    assert (tmp_path / 'again').read_bytes() == (tmp_path / 'all').read_bytes()


@pytest.mark.parametrize('name', ['fish', 'cats', 'all'])
@pytest.mark.parametrize('method', METHODS)
def test_files_of_the_parts_load_beside_it(make, image, tmp_path, method, name):
    model = make(double=False, rank=2, method=method)
    save_adapter(set_adapter(model, 'dogs'), tmp_path / 'dogs')
    combine(model, {'dogs': .5, 'birds': .5}, 'all')
    outputs = {key: set_adapter(model, key)(image) for key in ('cats', 'dogs', 'birds', 'all')}
    assert torch.equal(load_adapter(model, tmp_path / 'dogs', name)(image), outputs['dogs'])
    assert active_adapter(model) == name and model.liera['rank'] == 2
    for key in outputs.keys() - {name}:
        assert torch.equal(set_adapter(model, key)(image), outputs[key])


def test_switching_between_ranks(make, image):
    model = make(double=False, rank=2)
    outputs = {name: set_adapter(model, name)(image) for name in WEIGHTS}
    combine(model, WEIGHTS, 'all')
    outputs['all'] = model(image)
    parameters, plain = list(model.parameters()), export(model)
    for name in ['cats', 'all', 'dogs', 'birds', 'all', 'all', 'cats']:
        set_adapter(model, name)
        assert torch.equal(model(image), outputs[name])
        assert all(a is b for a, b in zip(model.parameters(), parameters))
    merge(model)
    torch.testing.assert_close(set_adapter(model, 'all')(image), outputs['all'])
    assert all(torch.equal(tensor, plain[key]) for key, tensor in export(model).items())


def test_it_can_be_trained_like_any_other(make, image):
    model = make(double=False, rank=2)
    expected = {name: set_adapter(model, name)(image) for name in WEIGHTS}
    set_adapter(model, 'cats')
    model(image).sum().backward()
    combine(model, WEIGHTS, 'all')
    before = model(image)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None or p.grad.shape == p.shape for p in trained)
    optimizer = torch.optim.SGD(trained, lr=.1)
    optimizer.zero_grad()
    model(image).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(image), before)
    for name in WEIGHTS:
        assert torch.equal(set_adapter(model, name)(image), expected[name])


def test_replacing_one_of_its_own_parts(make):
    model = make(rank=2)
    each = {name: deltas(model, name) for name in WEIGHTS}
    for name in ('cats', 'dogs'):  # one that is not active, and the active one
        set_adapter(model, 'dogs')
        combine(model, {'cats': .5, 'dogs': .5}, name)
        for key, delta in deltas(model, name).items():
            torch.testing.assert_close(delta, (each['cats'][key] + each['dogs'][key]) / 2, rtol=1e-12, atol=1e-13)
        model = make(rank=2)
        each = {name: deltas(model, name) for name in WEIGHTS}


def test_merged_models_stay_merged(make, image):
    model, other = make(double=False, rank=2), make(double=False, rank=2)
    for name in WEIGHTS:
        load_adapter(other, adapter_state_dict(set_adapter(model, name)), name)
    combine(merge(other), WEIGHTS, 'all')
    assert all(layer.merged for _, layer in adapted_layers(other))
    torch.testing.assert_close(other(image), combine(model, WEIGHTS, 'all')(image))


# What is not in the perturbations


def test_norms_and_biases_are_weighted_sums(make):
    model = make(rank=2, train_norm=True, train_bias=True)
    parts = {name: {k: t.clone() for k, t in adapter_state_dict(set_adapter(model, name)).items()} for name in WEIGHTS}
    weights = {'cats': .75, 'dogs': -.25, 'birds': .5}
    combine(model, weights, 'all')
    others = [key for key in adapter_state_dict(model) if '.adapter.' not in key and 'tracked' not in key]
    assert others
    for key in others:
        expected = sum(w * parts[name][key] for name, w in weights.items())
        torch.testing.assert_close(adapter_state_dict(model)[key], expected)


def test_where_weights_must_sum_to_1(make, image):
    model = make(rank=2, train_norm=True)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'the weights sum to 2, which has to be 1: \S+ differs between the adapters'):
        combine(model, {'cats': 1, 'dogs': 1.}, 'all')
    assert active_adapter(model) == 'birds' and all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_statistics(net, perturb, image):
    model = adapt(net, rank=2)
    for name, scale in (('a', 1), ('b', 3)):
        load_adapter(model, adapter_state_dict(model), name)
        perturb(model).train()(image * scale)
    norm = model.stem[1]
    parts = {name: copy.deepcopy(set_adapter(model, name).stem[1].state_dict()) for name in 'ab'}
    combine(model, {'a': .25, 'b': .75}, 'both')
    torch.testing.assert_close(norm.running_var, .25 * parts['a']['running_var'] + .75 * parts['b']['running_var'])
    assert norm.num_batches_tracked == 2
    with pytest.raises(ValueError, match='stem.1.running_var would be negative'):
        combine(model, {'a': 101., 'b': -100.}, 'both')


# What is refused


@pytest.mark.parametrize(('weights', 'match'), [
    ({}, "weights must be a dict of adapters and their weights, as {'cats': .5, 'dogs': .5}, not {}"),
    (['cats', 'dogs'], 'weights must be a dict'),
    ({'cats': .5, 'fish': .5}, "no adapter 'fish' is loaded; there are birds, cats, default, dogs"),
    ({'cats': float('nan')}, "the weight of 'cats' must be a finite number, not nan"),
    ({'cats': True}, "the weight of 'cats' must be a finite number, not True"),
    ({'cats': '1'}, "the weight of 'cats' must be a finite number, not '1'"),
])
def test_wrong_weights(make, image, weights, match):
    model = make(double=False, rank=2)
    expected = model(image)
    with pytest.raises(ValueError, match=match):
        combine(model, weights, 'all')
    assert active_adapter(model) == 'birds' and torch.equal(model(image), expected)


def test_a_model_that_is_not_adapted(net):
    with pytest.raises(ValueError, match='not adapted'):
        combine(net, {'default': 1.}, 'all')


def test_a_magnitude_that_changes_sign(make):
    model = make(rank=2, method='dora')
    with torch.no_grad():
        set_adapter(model, 'cats').head.adapter.magnitude[0] = -1
    with pytest.raises(ValueError, match='head: a magnitude is not positive'):
        combine(set_adapter(model, 'dogs'), {'cats': .5, 'dogs': .5}, 'all')
    assert active_adapter(model) == 'dogs'


def test_a_layer_under_two_names(perturb):
    shared = nn.Linear(4, 4)
    model = perturb(adapt(nn.Sequential(shared, shared), rank=1))
    combine(model, {'default': 2.}, 'twice')
    assert summary(model)[0].rank == 1 and len(summary(model)) == 1
    before = shared.adapter()
    set_adapter(model, 'default')
    torch.testing.assert_close(before, 2 * shared.adapter())
