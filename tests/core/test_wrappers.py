"""Compiled, replicated, sharded and averaged models: every public function reaches the model inside, by its own names."""
import contextlib
import copy

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel
from mmengine.utils import digit_version
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import liera_mm
from liera_mm.core.adapters import active_adapter
from liera_mm.core.algebra import METHODS
from liera_mm.core.checkpoint import fingerprint
from liera_mm.core.errors import SetupError
from liera_mm.core.extract import extract
from liera_mm.core.wrappers import plain_names, unwrap

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def group(tmp_path_factory):
    """A process group of this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    if digit_version(torch.__version__) < digit_version('2.5'):
        pytest.skip('torch before 2.5 cannot compile adapted layers')
    return torch.compile(model, backend='eager')


WRAPPERS = {
    'compile': compiled,
    'DataParallel': DataParallel,
    'DDP': DistributedDataParallel,
    'MMDDP': MMDistributedDataParallel,
    'AveragedModel': AveragedModel,
    'EMA': ExponentialMovingAverage,
    'checkpoint': checkpoint_wrapper,
    'DDP of a compiled one': lambda model: DistributedDataParallel(compiled(model)),
    'compiled DDP': lambda model: compiled(DistributedDataParallel(model)),
}
PARTS = {'whole': (), 'a part': ('stem', ), 'parts in parts': ('stages.0.pointwise_conv1', 'stages.0', 'stem.0', 'head')}


def wrap(model, wrapper, names):
    """Wrap a model, or those of its parts."""
    if not names:
        return WRAPPERS[wrapper](model)
    for name in names:
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, WRAPPERS[wrapper](model.get_submodule(name)))
    return model


@pytest.fixture(params=WRAPPERS)
def wrapper(request, group):
    return request.param


@pytest.fixture
def bare(net, perturb):
    """An adapted and trained network with two more adapters."""
    model = perturb(liera_mm.adapt(net, rank=2))
    for name in ('cats', 'dogs'):
        perturb(liera_mm.load_adapter(model, liera_mm.adapter_state_dict(model), name))
    return model.eval()


@pytest.fixture(autouse=True)
def whole_graphs():
    """Before torch 2.6, its DDPOptimizer cannot split graphs that have autograd functions."""
    old = digit_version(torch.__version__) < digit_version('2.6')
    with torch._dynamo.config.patch(optimize_ddp=False) if old else contextlib.nullcontext():
        yield


@pytest.fixture(params=PARTS)
def wrapped(bare, wrapper, request):
    """The same in wrappers, which hold what EMAs copy from it as well."""
    if wrapper in ('DDP', 'MMDDP', 'DDP of a compiled one', 'compiled DDP') and request.param == 'parts in parts':
        pytest.skip('these replicate no part without trained parameters')
    return wrap(copy.deepcopy(bare), wrapper, PARTS[request.param]).eval()


def assert_equal(ours, theirs):
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_reading(wrapped, bare, tmp_path):
    assert_equal(liera_mm.adapter_state_dict(wrapped), liera_mm.adapter_state_dict(bare))
    assert_equal(liera_mm.export(wrapped), liera_mm.export(bare))
    assert fingerprint(wrapped) == fingerprint(bare)
    assert liera_mm.summary(wrapped) == liera_mm.summary(bare)
    assert liera_mm.range_report(wrapped) == liera_mm.range_report(bare)
    assert liera_mm.layer_reports(wrapped) == liera_mm.layer_reports(bare)
    liera_mm.save_adapter(wrapped, tmp_path / 'wrapped')
    liera_mm.save_adapter(bare, tmp_path / 'bare')
    assert (tmp_path / 'wrapped').read_bytes() == (tmp_path / 'bare').read_bytes()


def test_switching(wrapped, bare, image):
    for name in ('default', 'cats', 'dogs', 'default'):
        assert liera_mm.set_adapter(wrapped, name) is wrapped
        assert active_adapter(wrapped) == name
        torch.testing.assert_close(wrapped(image), liera_mm.set_adapter(bare, name)(image))
    assert liera_mm.combine(wrapped, {'cats': .5, 'dogs': .5}, 'both') is wrapped
    torch.testing.assert_close(wrapped(image), liera_mm.combine(bare, {'cats': .5, 'dogs': .5}, 'both')(image))


def test_loading(wrapped, bare, perturb, image, tmp_path):
    liera_mm.save_adapter(perturb(bare), tmp_path / 'adapter')
    before = wrapped(image)
    assert liera_mm.load_adapter(wrapped, tmp_path / 'adapter', 'new') is wrapped
    torch.testing.assert_close(wrapped(image), bare(image))
    assert liera_mm.load_adapter(wrapped, liera_mm.adapter_state_dict(bare), 'cats') is wrapped
    torch.testing.assert_close(liera_mm.set_adapter(wrapped, 'dogs')(image), before)


NAMES = {
    'compiled': lambda name: f'_orig_mod.{name}',
    'DDP of a compiled one': lambda name: f'module._orig_mod.{name}',
    'compiled DDP': lambda name: f'_orig_mod.module.{name}',
    'compiled parts': lambda name: name.replace('stem.', 'stem._orig_mod.').replace('stages.0.', 'stages._orig_mod.0.'),
    'checkpoint': lambda name: name.replace('stem.', 'stem._checkpoint_wrapped_module.'),
}


@pytest.mark.parametrize('names', NAMES)
def test_loading_what_a_wrapped_model_called_its_tensors(bare, net, perturb, image, names):
    state = {NAMES[names](name): t.clone() for name, t in liera_mm.adapter_state_dict(bare).items()}
    plain = {NAMES[names](name): t for name, t in liera_mm.export(bare).items()}
    expected = bare(image)
    assert torch.equal(liera_mm.load_adapter(perturb(bare), state)(image), expected)
    perturb(bare)
    assert all(fit.residual < .01 for fit in extract(bare, plain))
    torch.testing.assert_close(bare(image), expected, rtol=.01, atol=.01)


def test_names_that_would_be_the_same_stay():
    state = {'module.weight': torch.ones(1), 'weight': torch.zeros(1)}
    assert plain_names(state, ['weight']) == state


def test_merging(wrapped, bare, net, image):
    expected = wrapped(image)
    assert liera_mm.merge(wrapped) is wrapped
    torch.testing.assert_close(wrapped(image), expected)
    assert liera_mm.unmerge(wrapped) is wrapped
    assert torch.equal(wrapped(image), expected)
    with liera_mm.adapters_off(wrapped) as same, liera_mm.adapters_off(bare):
        assert same is wrapped
        torch.testing.assert_close(wrapped(image), bare(image))
    assert liera_mm.merge_and_unload(wrapped) is wrapped
    torch.testing.assert_close(wrapped(image), expected)
    assert not any(hasattr(module, 'liera') for module in wrapped.modules())


def test_wrappers_are_back_after_an_error(wrapped, bare):
    modules = list(wrapped.modules())
    with pytest.raises(ValueError, match='no adapter'):
        liera_mm.set_adapter(wrapped, 'fish')
    assert all(a is b for a, b in zip(modules, wrapped.modules()))


@pytest.mark.parametrize('wrapper', ['compile', 'DataParallel', 'checkpoint'])
@pytest.mark.parametrize('part', PARTS)
def test_adapting(net, image, wrapper, part):
    expected = net(image)
    names = list(liera_mm.adapt(copy.deepcopy(net), rank=2).state_dict())
    model = wrap(net, wrapper, PARTS[part])
    assert liera_mm.adapt(model, rank=2) is model
    assert torch.equal(model(image), expected)
    assert list(liera_mm.adapter_state_dict(model)) == [
        name for name in names if '.adapter.' in name or name.startswith(('stem.1.running', 'stem.1.num'))]


@pytest.mark.parametrize('wrapper', ['DDP', 'MMDDP', 'AveragedModel', 'EMA', 'DDP of a compiled one', 'compiled DDP'],
                         indirect=True)
@pytest.mark.parametrize('part', ['whole', 'a part'])
def test_wrappers_that_must_come_later(net, wrapper, part):
    """They know the parameters that they were made with, and would not exchange or average new ones."""
    model = wrap(net, wrapper, PARTS[part])
    with pytest.raises(ValueError, match='adapt the model first, then wrap it'):
        liera_mm.adapt(model)
    assert not any(hasattr(module, 'adapter') for module in model.modules())


# Shards


@pytest.fixture
def fully_shard(group):
    if not hasattr(torch.distributed.fsdp, 'fully_shard'):
        pytest.skip('torch before 2.6 has no fully_shard that works without a GPU')
    return torch.distributed.fsdp.fully_shard


@pytest.fixture(params=['sharded', 'gathered', 'the root alone'])
def sharded(request, bare, image, fully_shard):
    """A copy in shards; after a forward pass the parameters that the root manages stay whole."""
    model = copy.deepcopy(bare)
    for unit in [] if request.param == 'the root alone' else [model.stem[0], *model.stages]:
        fully_shard(unit)
    fully_shard(model)
    if request.param == 'gathered':
        model(image)
    return model


def test_reading_shards(sharded, bare, image, tmp_path):
    expected = sharded(image)
    torch.testing.assert_close(expected, bare(image))
    test_reading(sharded, bare, tmp_path)
    with torch.inference_mode():
        assert_equal(liera_mm.adapter_state_dict(sharded), liera_mm.adapter_state_dict(bare))
    assert torch.equal(sharded(image), expected)
    assert active_adapter(sharded) == active_adapter(bare)
    sharded.train()(image).sum().backward()
    trained = [p for p in sharded.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=.1).step()
    assert all(hasattr(p.grad, 'full_tensor') for p in trained)


@pytest.mark.parametrize('method', METHODS)
def test_moving_shards(net, image, method, fully_shard):
    expected = liera_mm.adapt(net, rank=2, method=method)(image)
    fully_shard(net.stem[0])
    fully_shard(net)
    torch.testing.assert_close(net.to('cpu')(image), expected)


WRITES = {
    'set_adapter': lambda model: liera_mm.set_adapter(model, 'cats'),
    'load_adapter': lambda model: liera_mm.load_adapter(model, {}, 'fish'),
    'combine': lambda model: liera_mm.combine(model, {'cats': 1.}, 'fish'),
    'merge': liera_mm.merge,
    'merge_and_unload': liera_mm.merge_and_unload,
    'adapters_off': lambda model: liera_mm.adapters_off(model).__enter__(),
}


@pytest.mark.parametrize('write', WRITES)
def test_writing_to_shards(sharded, write, image):
    expected = sharded(image)
    with pytest.raises(SetupError, match=r'The model is in shards.*\nDo this before fully_shard'):
        WRITES[write](sharded)
    assert torch.equal(liera_mm.unmerge(sharded)(image), expected)


def test_unmerging_shards(bare, fully_shard):
    with pytest.raises(SetupError, match='The model is in shards'):
        liera_mm.unmerge(fully_shard(liera_mm.merge(bare)) or bare)


def test_adapting_shards(net, fully_shard):
    fully_shard(net.stem)
    with pytest.raises(ValueError, match='stem is inside of FSDPModule.*adapt the model first, then wrap it'):
        liera_mm.adapt(net)


def test_flat_shards(bare, group):
    """Those of FullyShardedDataParallel, FSDP's first form, would replace each layer's parameters."""
    with pytest.raises(SetupError, match=r'fully_shard\(model\)'):
        FullyShardedDataParallel(bare, use_orig_params=True, device_id=torch.device('cpu'))


def test_a_module_that_is_called_like_a_wrapper_keeps_its_name(image):
    """Names go by what is a wrapper, not by what one calls its content."""

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.module, self._orig_mod = nn.Linear(3, 3), nn.Linear(3, 3)

    model = liera_mm.adapt(Net(), rank=1)
    assert unwrap(model) is model
    assert {name.rpartition('.adapter')[0] for name in liera_mm.adapter_state_dict(model)} == {'module', '_orig_mod'}


def test_the_memory_of_the_first_adapter_is_its_own(net, perturb, image):
    """What was lost: one adapter after another, loaded into a compiled model."""
    model = perturb(liera_mm.adapt(net, rank=2)).eval()
    first, state = model(image), {k: t.clone() for k, t in liera_mm.adapter_state_dict(model).items()}
    model = compiled(model)
    for name in ('cats', 'dogs'):
        liera_mm.load_adapter(model, {key: tensor + tensor.is_floating_point() for key, tensor in state.items()}, name)
    assert torch.equal(liera_mm.set_adapter(model, 'default')(image), first)


def test_in_inference_mode(net, perturb, image, tmp_path):
    """What is loaded there can be trained later."""
    model = perturb(liera_mm.adapt(net, rank=2))
    liera_mm.save_adapter(model, tmp_path / 'adapter')
    with torch.inference_mode():
        liera_mm.load_adapter(model, tmp_path / 'adapter', 'cats')
        liera_mm.combine(model, {'cats': .5, 'default': .5}, 'both')
        liera_mm.load_adapter(model, {k: t * 1 for k, t in liera_mm.adapter_state_dict(model).items()}, 'dogs')
    for name in ('cats', 'default', 'both', 'dogs'):
        liera_mm.set_adapter(model, name)
        model(image).sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1).step()
    with torch.inference_mode():
        liera_mm.merge_and_unload(model)
    model.requires_grad_()(image).sum().backward()
