"""Several adapters on one base: switching between them, switching them off, and back, bit for bit."""
import contextlib
import copy

import pytest
import torch

from liera_mm import (
    adapt,
    adapter_state_dict,
    adapters_off,
    export,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.adapters import active_adapter
from liera_mm.core.algebra import METHODS
from liera_mm.core.errors import SetupError
from liera_mm.core.extract import extract
from liera_mm.core.group import UPDATES

pytestmark = pytest.mark.usefixtures('one_thread')

NAMES = ['cats', 'dogs', 'birds']
SETTINGS = dict(plain=dict(rank=2), norms=dict(rank=2, train_norm=True, train_bias=True))


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture
def tasks(net, settings, perturb, image, tmp_path):
    """File and output of three models that were trained on the same base; their batch norms have seen images."""
    tasks = {}
    for name in NAMES:
        model = perturb(adapt(copy.deepcopy(net), **settings)).train()
        model(image)
        save_adapter(model.eval(), tmp_path / name)
        tasks[name] = (tmp_path / name, model(image).detach())
    return tasks


@pytest.fixture
def shared(net, settings, tasks):
    """One model with all three."""
    model = adapt(copy.deepcopy(net), **settings)
    for name, (path, _) in tasks.items():
        load_adapter(model, path, name)
    return model


def test_each_is_what_it_was_alone(shared, tasks, image):
    assert active_adapter(shared) == 'birds'
    for name in [*NAMES, *reversed(NAMES), 'cats', 'birds', 'birds']:
        assert set_adapter(shared, name) is shared
        assert torch.equal(shared(image), tasks[name][1])


def test_the_adapter_before_any_was_loaded_is_still_there(net, settings, tasks, image):
    expected = net(image)
    model = adapt(net, **settings)
    load_adapter(model, tasks['cats'][0], 'cats')
    assert not torch.equal(model(image), expected)
    assert torch.equal(set_adapter(model, 'default')(image), expected)


def test_keys_parameters_and_the_base_stay(shared):
    keys, parameters = list(shared.state_dict()), list(shared.parameters())
    memory = [parameter.data_ptr() for parameter in parameters if not parameter.requires_grad]
    for name in NAMES:
        set_adapter(shared, name)
        assert list(shared.state_dict()) == keys
        assert all(a is b for a, b in zip(shared.parameters(), parameters))
        assert [parameter.data_ptr() for parameter in parameters if not parameter.requires_grad] == memory


def test_files_of_each(shared, tasks, tmp_path):
    for name in NAMES:
        save_adapter(set_adapter(shared, name), tmp_path / 'again')
        assert (tmp_path / 'again').read_bytes() == tasks[name][0].read_bytes()


def test_one_can_be_trained_without_the_others(shared, tasks, perturb, image):
    perturb(set_adapter(shared, 'dogs'))
    moved = shared(image)
    assert not torch.equal(moved, tasks['dogs'][1])
    for name in ('cats', 'birds'):
        assert torch.equal(set_adapter(shared, name)(image), tasks[name][1])
    assert torch.equal(set_adapter(shared, 'dogs')(image), moved)


def test_loading_again_replaces(shared, tasks, image):
    load_adapter(shared, tasks['cats'][0], 'birds')  # the active one
    assert torch.equal(shared(image), tasks['cats'][1])
    load_adapter(shared, tasks['dogs'][0], 'cats')  # one of the others
    assert torch.equal(shared(image), tasks['dogs'][1])
    assert torch.equal(set_adapter(shared, 'birds')(image), tasks['cats'][1])


def test_a_refused_file_changes_nothing(shared, tasks, image, tmp_path):
    (tmp_path / 'bad').write_bytes(b'bad')
    with pytest.raises(ValueError, match='no adapter file'):
        load_adapter(shared, tmp_path / 'bad', 'fish')
    assert active_adapter(shared) == 'birds' and torch.equal(shared(image), tasks['birds'][1])
    with pytest.raises(ValueError, match="no adapter 'fish' is loaded; there are birds, cats, default, dogs"):
        set_adapter(shared, 'fish')


def test_merged_models_stay_merged(shared, tasks, image):
    merge(shared)
    for name in NAMES:
        set_adapter(shared, name)
        assert all(layer.merged for _, layer in adapted_layers(shared))
        torch.testing.assert_close(shared(image), tasks[name][1])
    unmerge(shared)
    assert torch.equal(shared(image), tasks[NAMES[-1]][1])


@pytest.mark.parametrize('method', METHODS)
def test_there_and_back_between_forward_and_backward(net, perturb, image, method):
    """As a reference is computed, with another adapter or none; a check of versions would take it for a change."""
    model = perturb(adapt(net, rank=2, method=method))
    perturb(load_adapter(model, adapter_state_dict(model), 'cats'))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(image).square().sum(), trained)
    loss = model(image).square().sum()
    set_adapter(model, 'default')(image)
    unmerge(merge(set_adapter(model, 'cats')))
    with adapters_off(model):
        model(image)
    assert all(map(torch.equal, torch.autograd.grad(loss, trained), expected))


def test_the_model_may_move_between(shared, tasks, image):
    shared.double()
    for name in NAMES:
        torch.testing.assert_close(set_adapter(shared, name)(image.double()).float(), tasks[name][1])
    assert {tensor.dtype for tensor in adapter_state_dict(shared).values()} <= {torch.float64, torch.int64}


def test_copies_have_their_own(shared, tasks, perturb, image):
    perturb(set_adapter(copy.deepcopy(shared), 'cats'))
    assert torch.equal(set_adapter(shared, 'cats')(image), tasks['cats'][1])


# Off


@pytest.mark.parametrize('merged', [False, True], ids=['unmerged', 'merged'])
@pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])
def test_off(net, perturb, image, method, update, merged):
    expected = net(image)
    model = perturb(adapt(net, rank=2, method=method, update=update))
    if merged:
        merge(model)
    adapted, state = model(image), copy.deepcopy(model.state_dict())
    with adapters_off(model) as same:
        assert same is model and torch.equal(model(image), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        with adapters_off(model):
            assert torch.equal(model(image), expected)
        assert torch.equal(model(image), expected)
    assert torch.equal(model(image), adapted)
    assert all(layer.merged == merged for _, layer in adapted_layers(model))


CALLS = {  # and whether the layers are merged after it
    'merge': (lambda model, path: merge(model), True),
    'unmerge': (lambda model, path: unmerge(model), False),
    'load_adapter': (lambda model, path: load_adapter(model, path, 'dogs'), False),
    'load_adapter of that name': (lambda model, path: load_adapter(model, path), False),
    'load_state_dict': (lambda model, path: model.load_state_dict(model.state_dict()), False),
    'assign': (lambda model, path: model.load_state_dict(model.state_dict(), assign=True), False),
    'set_adapter': (lambda model, path: set_adapter(model, 'cats'), None),
    'moving': (lambda model, path: set_adapter(model.double().float(), 'cats'), None),
}


@pytest.mark.parametrize('nested', [False, True], ids=['', 'nested'])
@pytest.mark.parametrize('merged', [False, True], ids=['unmerged', 'merged'])
@pytest.mark.parametrize('call', CALLS)
def test_what_is_called_while_off_comes_after(net, perturb, image, tmp_path, call, merged, nested):
    """They stay off until the end; from then on the model is as if it had been called outside."""
    model = perturb(adapt(net, rank=2))
    save_adapter(model, tmp_path / 'file')
    perturb(load_adapter(model, tmp_path / 'file', 'cats'))
    set_adapter(model, 'default')
    if merged:
        merge(model)
    call, then_merged = CALLS[call]
    outside = copy.deepcopy(model)
    call(outside, tmp_path / 'file')
    with adapters_off(model):
        expected = model(image)
        with adapters_off(model) if nested else contextlib.nullcontext():
            call(model, tmp_path / 'file')
            assert torch.equal(model(image), expected)
        assert torch.equal(model(image), expected)
        assert torch.equal(copy.deepcopy(model)(image), expected)
    assert all(layer.merged == (merged if then_merged is None else then_merged) for _, layer in adapted_layers(model))
    assert torch.equal(model(image), outside(image)) and not torch.equal(model(image), expected)
    assert active_adapter(model) == active_adapter(outside)
    assert torch.equal(unmerge(model)(image), unmerge(outside)(image))
    with adapters_off(model):
        assert torch.equal(model(image), expected)


def test_a_copy_made_while_off(net, perturb, image):
    """It computes with the frozen weights, until it is asked for others."""
    expected = net(image)
    model = perturb(adapt(net, rank=2))
    with adapters_off(model):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(image), expected)
    assert torch.equal(unmerge(copied)(image), model(image))


@pytest.mark.parametrize('call', [merge_and_unload, lambda model: extract(model, export(model))], ids=['unload', 'extract'])
def test_what_cannot_be_done_while_off(net, perturb, image, call):
    model = perturb(adapt(net, rank=2))
    expected = model(image)
    with adapters_off(model), pytest.raises(SetupError, match='adapters are off.*\n.*after the with-block'):
        call(model)
    assert torch.equal(model(image), expected)
    call(model)
    torch.testing.assert_close(model(image), expected, rtol=.01, atol=.01)
    assert not any('merge_later' in vars(module) for module in merge_and_unload(model).modules())


@pytest.mark.parametrize('settings', [SETTINGS['plain']])
def test_switching_while_off(shared, tasks, net, image):
    expected = net(image)
    net.stem[1].load_state_dict(shared.stem[1].state_dict())
    with adapters_off(shared):
        for name in NAMES:
            set_adapter(shared, name)
            net.stem[1].load_state_dict(shared.stem[1].state_dict())  # its statistics belong to the adapter
            assert torch.equal(shared(image), net(image)) and not torch.equal(shared(image), expected)
    assert torch.equal(shared(image), tasks[NAMES[-1]][1])


def test_off_after_an_error(shared, tasks, image, settings):
    if 'train_norm' in settings:
        with pytest.raises(ValueError, match='norms or biases of this model were trained in place'), adapters_off(shared):
            pass
    else:
        with pytest.raises(ZeroDivisionError), adapters_off(shared):
            1 / 0  # noqa: B018
    assert torch.equal(shared(image), tasks['birds'][1])


def test_a_model_that_is_not_adapted(net):
    with pytest.raises(ValueError, match='not adapted'):
        set_adapter(net, 'default')
    with pytest.raises(ValueError, match='not adapted'), adapters_off(net):
        pass
