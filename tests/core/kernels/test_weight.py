"""Effective weights of many layers at once: values, gradients by finite differences, memory."""
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from liera_mm.core.adapt import adapt
from liera_mm.core.factors import factor_shapes, low_rank
from liera_mm.core.group import UPDATES
from liera_mm.core.kernels import torch_ops
from liera_mm.core.kernels.weight import moved_weights, rescaled
from liera_mm.core.layers import effective_weights

SHAPES = {'linear': (6, 4), 'conv': (4, 3, 3, 3), 'depthwise': (5, 1, 3, 3)}


def random_layers(shape, layers=2, dtype=torch.float64):
    groups = shape[0] if shape[1] == 1 and len(shape) > 2 else 1
    shapes = factor_shapes(torch.Size(shape), groups, rank=2)
    return [[torch.randn(s, dtype=dtype, requires_grad=True) for _ in range(layers)] for s in (shape, *shapes)]


@pytest.mark.parametrize('rms', [None, (.5, 4.)], ids=['plain', 'relative'])
@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, update, rms):
    weights, a, b = random_layers(shape)
    units = rms and [torch.tensor(unit, dtype=torch.float64) for unit in rms]

    def move(*tensors):
        return tuple(moved_weights(tensors[:2], tensors[2:4], tensors[4:], .3, update, torch.float64, units))

    for moved, *args, unit in zip(move(*weights, *a, *b), weights, a, b, rms or (1, 1)):
        expected = UPDATES[update](args[0], low_rank(*args[1:], .3 / unit, args[0].shape))
        torch.testing.assert_close(moved, expected)
    assert gradcheck(move, (*weights, *a, *b))
    assert gradgradcheck(move, (*weights, *a, *b), fast_mode=True)


def test_gradients_in_any_memory_format():
    weights, a, b = random_layers((4, 3, 3, 3))
    moved = moved_weights(weights, a, b, .3, 'taylor', torch.float64)
    grads = [torch.randn_like(weight) for weight in weights]
    expected = torch.autograd.grad(moved, a, grads, retain_graph=True)
    channels_last = [grad.contiguous(memory_format=torch.channels_last) for grad in grads]
    assert all(map(torch.equal, torch.autograd.grad(moved, a, channels_last), expected))


@pytest.mark.parametrize('update', UPDATES)
def test_keeps_nothing_of_a_weights_size(update):
    weights, a, b = ([tensor.detach() for tensor in tensors] for tensors in random_layers((64, 64)))
    frozen = {weight.data_ptr() for weight in weights}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        moved_weights(weights, [t.requires_grad_() for t in a], [t.requires_grad_() for t in b], .3, update, torch.float32)
    assert all(t.numel() < weights[0].numel() or t.data_ptr() in frozen for t in saved)


@pytest.mark.parametrize('size', [1e-200, 1., 1e200])
@pytest.mark.parametrize('precision', [torch.float64, torch.float32], ids=str)
def test_rows_scaled_to_norms(size, precision):
    if precision == torch.float32 and size != 1:
        pytest.skip('float32 has no such norms')
    rows, norms = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    rows[2] = 0

    def scale(rows, norms):
        return rescaled(size * rows, norms, torch.float64)

    result = scale(rows, norms)
    torch.testing.assert_close(result.norm(dim=1), norms * torch.tensor([1., 1., 0.]))
    torch.testing.assert_close(result[:2] / norms[:2, None], rows[:2] / rows[:2].norm(dim=1, keepdim=True))
    ordinary = rows[:2].requires_grad_(), norms[:2].requires_grad_()
    assert gradcheck(scale, ordinary) and gradgradcheck(scale, ordinary, fast_mode=True)
    # The formula, which transforms of torch.func differentiate, and the gradient that is written out
    grad = torch.randn_like(rows)
    ours = torch.autograd.grad(rescaled(*ordinary, precision), ordinary, grad[:2])
    theirs = torch.autograd.grad(torch_ops.rescaled(*ordinary, precision)[0], ordinary, grad[:2])
    torch.testing.assert_close(ours, theirs)


def test_layers_of_all_kinds_and_settings():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 8), nn.Conv2d(3, 4, 3),
        nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4))
    adapt(model, rank=2, targets=['re:[0-5]'], overrides=[
        dict(targets=['1'], update='exp'), dict(targets=['3'], method='dora'), dict(targets=['5'], method='dense')])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(.3 * torch.randn_like(parameter))
    together = effective_weights(list(model))
    assert all(torch.equal(weight, effective_weights([layer])[0]) for weight, layer in zip(together, model))
    assert [weight.dtype for weight in together] == [layer.weight.dtype for layer in model]
    assert all(weight.dtype == torch.float16 for weight in effective_weights(list(model), torch.float16))
