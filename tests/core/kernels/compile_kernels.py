"""Compiles every Triton kernel for an H100, which takes none, and ends with those that do not compile.

A process of its own for test_compilation.py, since the other tests run Triton's interpreter where there is no GPU.
"""
import sys

import torch
import torchvision  # noqa: F401  registers its operators
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from liera_mm.core.kernels import triton_ops


class Target:
    """Stands in for Triton's driver of a machine with an H100."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)


def half(*shape):
    return torch.ones(shape, dtype=torch.float16)


def ones(*shape):
    return torch.ones(shape)


def calls():
    """Arguments of every operator, with each part of its kernels switched on."""
    x, row = half(2, 8, 8, 64), ones(64)
    mean = ones(2, 8, 8, 1)
    hidden, rows, cols = half(2, 64, 128), ones(2, 64), ones(2, 128)
    levels, boxes = torch.zeros(3, dtype=torch.long), ones(2, 70, 4)
    for update in ('additive', 'taylor', 'exp'):
        weights, product = [half(64, 49)] * 2, (ones(2, 16, 49), ones(2, 64, 16), .5, [torch.ones(())] * 2, update)
        yield 'moved_weights', (weights, *product, torch.float16)
        yield 'product_grads', (weights, *product, half(2, 64, 49))
    yield 'rescaled', (ones(64, 49), row, torch.float16)
    yield 'rescaled_grad', (ones(64, 49), row, torch.float16, ones(64, 49))
    yield 'layer_norm', (x, row, row, 1e-6)
    yield 'layer_norm_grad', (x, x, row, row, mean, mean, True, True)
    yield 'gelu', (hidden, ones(128), True)
    yield 'gelu_grad', (hidden, hidden, ones(128), cols, True)
    yield 'response', (ones(2, 3, 128), ones(128), 1e-6)
    yield 'response_grad', (ones(3, 2, 128), ones(128), cols, 1e-6)
    yield 'scaled_weights', (2, half(64, 128), rows, cols, ones(128))
    yield 'weight_grad', (half(2, 64, 128), half(64, 128), rows, cols, rows, ones(128))
    yield 'residual', (x, x, row, ones(3, 64), rows)
    yield 'depthwise', (x, half(49, 64), row, None, False)
    yield 'depthwise', (x, half(49, 64), None, x, True)
    yield 'depthwise_weight_grad', (x, x)
    yield 'roi_pool', ([x, x], ones(3, 5), levels, [.25, .125], 7)
    yield 'roi_pool_grad', (half(3, 7, 7, 64), [x.shape] * 2, ones(3, 5), levels, [.25, .125])
    yield 'nms_kept', (boxes, .5)
    yield 'nms', (boxes[0], ones(70), .5)


def main():
    run = JITFunction.run
    JITFunction.run = lambda self, *args, warmup=False, **more: run(self, *args, warmup=True, **more)
    triton.runtime.driver.set_active(Target())
    assert {name for name, _ in calls()} == set(triton_ops.__all__)
    problems = []
    for name, args in calls():
        try:
            getattr(triton_ops, name)(*args)
        except triton.CompilationError as error:
            problems.append(f'{name}: {error}')
    sys.exit('\n'.join(problems) or 0)


if __name__ == '__main__':
    main()
