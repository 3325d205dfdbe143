"""What tools/benchmark.py compares kernels and operators with."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / 'tools'))

import benchmark_kernels as benchmark


def test_floors():
    """One block of width 2 on one token, in the only stage that has any: 2 bytes a number, 192 operations a product."""
    arch = dict(depths=[1, 0, 0, 0], channels=[2, 4, 8, 16])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark.LieRAConvNeXt.arch_settings, 'one', arch)
        floors = benchmark.floors('one', 1, 4, {'TB/s': 1e-12, 'TFLOP/s': 1e-12})
    assert floors == dict(benchmark.PASSES, **{'matrix products': 0}) | {
        **{name: 1000 * 2 * passes * 2 for name, passes in benchmark.PASSES.items()}, 'matrix products': 1000 * 6 * 2 * 16}


@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'ms_deform_attn'])
def test_operators_are_compared_with_what_computes_the_same(name):
    inputs, ours, native = benchmark.operator_calls(1, 64, torch.float64, 'cpu')[name]
    for a, b in zip(*([call(*inputs), *torch.autograd.grad(call(*inputs).sum(), inputs)] for call in (ours, native))):
        torch.testing.assert_close(a, b)
