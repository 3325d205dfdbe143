"""A module that is replayed from graphs trains as it does without; on the CPU, with a stand-in for the graphs."""
import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from recorded import Recorded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import liera_mm
from liera_mm.models import LieRAConvNeXt
from liera_mm.models.graphs import Graphs

pytestmark = pytest.mark.usefixtures('one_thread')

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=needs_cuda)]


def backbone(device='cpu', **kwargs):
    torch.manual_seed(0)
    settings = dict(liera=dict(rank=2), drop_path_rate=.3, layer_scale_init_value=0., use_grn=True, out_indices=[0, 1],
                    arch=dict(depths=[1, 2], channels=[8, 16]), gap_before_final_norm=False)
    model = LieRAConvNeXt(**{**settings, **kwargs})
    for parameter in model.parameters():
        parameter.data += .1 * torch.randn_like(parameter)
    return model.to(device).train()


def graphed(module, most=4):
    """The module with graphs; and the shapes for which it made one, as they come."""
    on_gpu = next(module.parameters()).is_cuda
    module.forward = graphs = Graphs(module, 'backbone', most, None if on_gpu else Recorded)
    capture, made = graphs.capture, []

    def counted(function, inputs, *args):
        made.append(tuple(inputs[0].shape))
        return capture(function, inputs, *args)

    graphs.capture = counted
    return module, made


def step(model, x, seed=0, chosen=slice(None)):
    """Outputs, and gradients as the parameters have them afterwards; these add up from step to step."""
    torch.manual_seed(seed)
    outputs = [output.clone() for output in model(x)]
    sum(output.square().mean() for output in outputs[chosen]).backward()
    return outputs, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def images(device='cpu', height=32, count=2, seed=3):
    return torch.randn(count, 3, height, 32, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('options', [{}, dict(with_cp=True), dict(liera=dict(rank=2, update='exp', train_norm=True)),
                                     dict(fast=False), dict(liera=dict(method='dora', rank=2))], ids=str)
def test_trains_as_it_does_without_graphs(options, device):
    (ours, made), theirs = graphed(backbone(device, **options)), backbone(device, **options)
    for seed, height in enumerate([32, 32, 64, 32, 64, 32]):
        x = images(device, height, seed=seed)
        assert_same(step(ours, x, seed), step(theirs, x, seed))
        if seed % 2:  # two batches to an optimizer's step
            for model in (ours, theirs):
                for parameter in model.parameters():
                    parameter.data -= .01 * parameter.grad if parameter.grad is not None else 0
                    parameter.grad = None
    assert made == [(2, 3, 32, 32), (2, 3, 64, 32)]


@pytest.mark.parametrize('device', DEVICES)
def test_under_autocast(device):
    (ours, made), theirs = graphed(backbone(device)), backbone(device)
    for seed in range(3):
        x = images(device, seed=seed)
        with torch.autocast(device, torch.bfloat16):
            results = [model(x) for model in (ours, theirs) if torch.manual_seed(seed)]
        assert results[0][0].dtype == torch.bfloat16
        for outputs in results:
            sum(output.float().square().mean() for output in outputs).backward()
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=.02, atol=.02)
    assert len(made) == 1 and step(ours, x)[0][0].dtype == torch.float32


@pytest.mark.parametrize('device', DEVICES)
def test_bound(device):
    (ours, made), theirs = graphed(backbone(device), most=1), backbone(device)
    for height in [32, 32, 64, 64, 64, 32]:
        assert_same(step(ours, images(device, height)), step(theirs, images(device, height)))
    assert made == [(2, 3, 32, 32)]


@pytest.mark.parametrize('device', DEVICES)
def test_other_memory(device, tmp_path):
    """Another adapter, one of another rank, the first again, and merged."""
    (ours, made), theirs = graphed(backbone(device), most=9), backbone(device)
    models = ours, theirs

    def compare():
        results = ([step(model, images(device, seed=seed), seed) for seed in range(3)] for model in models)
        assert_same(*results)

    compare()
    liera_mm.save_adapter(models[1], tmp_path / 'other.safetensors')
    for change in (lambda model: liera_mm.load_adapter(model, tmp_path / 'other.safetensors', name='other'),
                   lambda model: liera_mm.combine(model, dict(default=.3, other=.4), 'both'),
                   lambda model: liera_mm.set_adapter(model, 'default')):
        for model in models:
            change(model)
            model.zero_grad()
        compare()
    assert len(made) == 4
    for model in models:
        liera_mm.merge(model)
        model.norm1.requires_grad_(True)
        model.zero_grad()
    compare()


@pytest.mark.parametrize('device', DEVICES)
def test_two_forward_passes_before_the_backward_passes(device):
    (ours, made), theirs = graphed(backbone(device, drop_path_rate=0.)), backbone(device, drop_path_rate=0.)
    for model in (ours, theirs):
        for _ in range(3):
            step(model, images(device))
        twice = [model(images(device, seed=seed)) for seed in range(2)]
        sum(output.square().mean() for outputs in twice for output in outputs).backward()
        ours(images(device))  # without a backward pass
        step(model, images(device))
    assert_same(gradients(ours), gradients(theirs))
    assert len(made) == 1


@pytest.mark.parametrize('again', [lambda model: None, lambda model: step(model, images())], ids=['backward', 'step'])
def test_what_a_backward_pass_needs_is_there_once(again):
    model, _ = graphed(backbone())
    for _ in range(2):
        step(model, images())
    loss = sum(output.sum() for output in model(images()))
    loss.backward(retain_graph=True)
    again(model)
    with pytest.raises(RuntimeError, match='backbone was replayed since'):
        loss.backward()


@pytest.mark.parametrize('device', DEVICES)
def test_outputs_that_are_written_to(device):
    ours, theirs = graphed(backbone(device))[0], backbone(device)
    for seed in range(3):
        results = []
        for model in (ours, theirs):
            torch.manual_seed(seed)
            sum(output.mul_(2).relu_().square().mean() for output in model(images(device, seed=seed))).backward()
            results.append(gradients(model))
        assert_same(*results)


@pytest.mark.parametrize('device', DEVICES)
def test_outputs_that_the_loss_does_not_use(device):
    options = dict(liera=dict(rank=2, train_norm=True))
    (ours, made), theirs = graphed(backbone(device, **options)), backbone(device, **options)
    for seed in range(3):
        result = step(ours, images(device), seed, slice(0, 1))
        assert_same(result, step(theirs, images(device), seed, slice(0, 1)))
    assert made and 'norm1.weight' not in result[1]
    with pytest.raises(RuntimeError, match='depends on an output of backbone that it did not depend on'):
        step(ours, images(device))


def test_evaluation_no_gradients_and_hooks_inside():
    model, made = graphed(backbone())
    for _ in range(3):
        step(model, images())
    replayed, calls = len(made), []
    handle = model.stages[0].register_forward_hook(lambda *_: calls.append('hook'))
    step(model, images())
    handle.remove()
    assert calls == ['hook']
    with torch.no_grad():
        assert not model(images())[0].requires_grad
    twin = backbone().eval()
    assert all(map(torch.equal, model.eval()(images()), twin(images())))
    assert len(made) == replayed


@pytest.mark.parametrize('device', DEVICES)
def test_frozen(device):
    ours, made = graphed(backbone(device, liera=None))
    for seed in range(3):
        torch.manual_seed(seed)
        outputs = [output.clone() for output in ours(images(device, seed=seed))]
        torch.manual_seed(seed)
        assert_same(outputs, list(ours.forward.eager(images(device, seed=seed))))
    assert len(made) == 1 and not outputs[0].requires_grad


class WithBuffers(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, extra):
        return dict(out=nn.functional.dropout(self.norm(self.conv(x)), .5) + extra[0])


@pytest.mark.parametrize('device', DEVICES)
def test_buffers_random_numbers_and_gradients_of_inputs(device):
    torch.manual_seed(0)
    theirs = WithBuffers().to(device)
    ours, made = graphed(copy.deepcopy(theirs))
    results = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        for seed in range(4):
            extra = torch.ones((), device=device, requires_grad=True)
            model(images(device, seed=seed), extra=[extra])['out'].square().sum().backward()
            results.append(extra.grad)
    assert_same(results[:4], results[4:])
    assert_same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert_same(gradients(ours), gradients(theirs))
    assert len(made) == 1


@pytest.mark.parametrize('device', DEVICES)
def test_copy_goes_its_own_way(device):
    model, made = graphed(backbone(device))
    for _ in range(3):
        step(model, images(device))
    twin = copy.deepcopy(model)
    assert twin.forward.module is twin
    before = [output.clone() for output in twin.eval()(images(device))]
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(map(torch.equal, twin(images(device)), before))


@pytest.mark.parametrize('device', DEVICES)
def test_gradients_are_reduced_between_processes(device):
    """One process of one: what it hands over in all steps but the first of two whose gradients add up."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        handed, theirs = [], backbone(device)
        ours = DistributedDataParallel(backbone(device), gradient_as_bucket_view=True)
        ours.register_comm_hook(None, lambda _, bucket: handed.append(bucket.index()) or done(bucket.buffer()))
        _, made = graphed(ours.module)
        for seed in range(6):
            x = images(device, seed=seed)
            with ours.no_sync() if seed % 2 == 0 else contextlib.nullcontext():
                step(ours, x, seed)
            step(theirs, x, seed)
            assert_same(gradients(ours.module), gradients(theirs))
            assert len(handed) == (seed + 1) // 2
            if seed % 2:
                ours.zero_grad(), theirs.zero_grad()
        assert len(made) == 1
    finally:
        dist.destroy_process_group()


def done(tensor):
    future = torch.futures.Future(devices=[tensor.device] if tensor.is_cuda else None)
    future.set_result(tensor)
    return future


def test_no_graph_goes_to_the_memory_of_those_that_are_gone(monkeypatch):
    pools, numbers = [], iter(range(9))
    monkeypatch.setattr('torch.cuda.graph_pool_handle', lambda: next(numbers))
    monkeypatch.setattr('torch.cuda.Stream', object)
    monkeypatch.setattr('liera_mm.models.graphs.CUDAGraphPair',
                        lambda pool, stream, *args: pools.append((pool, stream)) or Recorded(*args))
    model = backbone()
    model.forward = Graphs(model, 'backbone', 9)
    for height in (32, 32, 64, 64):
        step(model, images(height=height))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    for _ in range(2):
        step(model, images())
    assert [pool for pool, _ in pools] == [0, 0, 1] and len({stream for _, stream in pools}) == 1


def test_what_cannot_be_captured(monkeypatch):
    attempts, said = [], []
    monkeypatch.setattr('liera_mm.models.graphs.print_log', lambda message, *_: said.append(message))

    def capture(*_):
        attempts.append(1)
        raise RuntimeError('operation not permitted when stream is capturing')

    model, twin = backbone(), backbone()
    model.forward = Graphs(model, 'backbone', 4, capture)
    for seed in range(4):
        assert_same(step(model, images(), seed), step(twin, images(), seed))
    assert len(attempts) == len(said) == 1
    assert said[0] == 'LieRA  backbone stays without graphs: operation not permitted when stream is capturing'


class Waits(nn.Module):
    """Asks for a value while it computes, which no graph can."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = nn.functional.dropout(self.conv(x), .5)
        return y * y.abs().max().item()


@needs_cuda
def test_after_a_capture_that_failed(monkeypatch):
    """Random numbers, memory and other graphs are as without it."""
    said = []
    monkeypatch.setattr('liera_mm.models.graphs.print_log', lambda message, *_: said.append(message))
    torch.manual_seed(0)
    theirs = Waits().cuda()
    ours = copy.deepcopy(theirs)
    ours.forward = Graphs(ours, 'head', 4)
    (other, made), twin = graphed(backbone('cuda')), backbone('cuda')
    for seed in range(4):
        results = []
        for model in (ours, theirs):
            model.zero_grad()
            torch.manual_seed(seed)
            model(images('cuda', seed=seed)).sum().backward()
            results.append((gradients(model), torch.rand(3, device='cuda')))
        assert_same(*results)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert_same(step(other, images('cuda', seed=seed), seed), step(twin, images('cuda', seed=seed), seed))
    assert len(made) == 1 and sum('head stays without graphs' in line for line in said) == 1
    before = active_bytes()
    used_elsewhere = torch.empty(2**20, device='cuda')
    used_elsewhere.record_stream(torch.cuda.Stream())
    del used_elsewhere
    assert active_bytes() == before


def active_bytes():
    torch.cuda.synchronize()
    torch.empty(1, device='cuda')  # the allocator looks for memory that other streams are done with
    return torch.cuda.memory_stats()['active_bytes.all.current']
