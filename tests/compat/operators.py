"""What the tests of the operators share."""
import importlib
import importlib.util

import pytest
import torch

from liera_mm import compat

compat.install()

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
HALVES = [torch.float16, torch.bfloat16]
compiled = importlib.util.find_spec('mmcv._ext').origin != 'torchvision'
fallback_only = pytest.mark.skipif(compiled, reason='mmcv has its compiled operators here')


def tensors(device, *arrays):
    return [torch.from_numpy(array).to(device) for array in arrays]


def randn(*shape, seed=0, device='cpu'):
    """Normal random numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def twisted(tensor):
    """The same numbers, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def gradients(function, inputs, grad):
    """A function's output, and the gradients of its inputs that are floating point."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], grad)]


TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-10), torch.float32: dict(rtol=1e-4, atol=1e-4),
             torch.float16: dict(rtol=2e-3, atol=2e-3), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}


def check(operator, reference, inputs, dtype=torch.float64):
    """The operator's output and gradients are those of the reference in float64.

    The operator's inputs, and the gradient of its output, are of the given dtype and not contiguous.
    """
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    grad = randn(*reference(*wide).shape, seed=99, device=inputs[0].device).to(dtype)
    actual = gradients(operator, [twisted(x) for x in inputs], twisted(grad))
    for ours, theirs in zip(actual, gradients(reference, wide, grad.double())):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCE[dtype])


def reference_bilinear(image, y, x):
    """Values (C, ...) of an image (C, H, W) between its pixels, with zeros around it."""
    total = 0
    for row in (y.detach().floor(), y.detach().floor() + 1):
        for column in (x.detach().floor(), x.detach().floor() + 1):
            inside = (row >= 0) & (row < image.shape[1]) & (column >= 0) & (column < image.shape[2])
            value = image[:, row.clamp(0, image.shape[1] - 1).long(), column.clamp(0, image.shape[2] - 1).long()]
            total = total + value * inside * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return total
