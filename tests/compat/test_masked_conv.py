"""Masked convolutions against whole ones."""
import pytest
import torch
from mmcv.ops import MaskedConv2d
from operators import DEVICES, HALVES, TOLERANCE, fallback_only, randn, twisted

pytestmark = fallback_only  # compiled ones have no CPU kernels


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('kernel, padding', [(3, 1), (1, 0), ((3, 5), (1, 2))])
def test_masked_conv(kernel, padding, dtype, device):
    torch.manual_seed(0)
    conv = MaskedConv2d(3, 4, kernel, padding=padding).to(device, dtype)
    x, mask = twisted(randn(1, 3, 6, 7, device=device).to(dtype)), randn(1, 6, 7, seed=1, device=device) > .3
    with torch.no_grad():
        output = conv(x, mask)
        expected = conv.double()(x.double()) * mask  # without a mask it is a Conv2d
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize('device', DEVICES)
def test_padding_for_another_kernel(device):
    conv = MaskedConv2d(3, 4, 3, padding=2).to(device).double()  # whose output is larger than its mask
    x, mask = randn(1, 3, 6, 7, device=device), torch.ones(1, 6, 7, device=device)
    with torch.no_grad():
        output = conv(x, mask)
        torch.testing.assert_close(output[..., :6, :7], conv(x)[..., :6, :7])
    assert output.shape == (1, 4, 8, 9) and not output[..., 6:, :].any() and not output[..., 7:].any()


@pytest.mark.parametrize('device', DEVICES)
def test_nothing_chosen(device):
    conv = MaskedConv2d(3, 4, 3, padding=1).to(device)
    assert not conv(torch.randn(1, 3, 6, 7, device=device), torch.zeros(1, 6, 7, device=device)).any()
