"""CARAFE against unfolding and upsampling."""
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import CARAFEPack, carafe, carafe_naive
from operators import DEVICES, HALVES, check, fallback_only, randn

pytestmark = fallback_only  # compiled ones have no CPU kernels


def reference(x, masks, kernel, groups, scale):
    n, c, h, w = x.shape
    around = F.unfold(x, kernel, padding=kernel // 2).view(n, c * kernel**2, h, w)
    around = F.interpolate(around, scale_factor=scale, mode='nearest').view(n, groups, -1, kernel**2, scale * h, scale * w)
    return torch.einsum('ngckhw,ngkhw->ngchw', around, masks.view(n, groups, kernel**2, scale * h, scale * w)).flatten(1, 2)


def inputs(device, kernel, groups, scale, images=2):
    return (randn(images, 4, 3, 5, device=device),
            randn(images, groups * kernel**2, 3 * scale, 5 * scale, seed=1, device=device))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('kernel, groups, scale', [(5, 1, 2), (3, 2, 3), (1, 4, 1)])
def test_carafe(kernel, groups, scale, dtype, device):
    check(lambda x, masks: carafe(x, masks, kernel, groups, scale),
          lambda x, masks: reference(x, masks, kernel, groups, scale), inputs(device, kernel, groups, scale), dtype)


@pytest.mark.parametrize('device', DEVICES)
def test_naive(device):
    if device == 'cpu':  # whose gradients mmcv refuses
        x, masks = inputs(device, 3, 2, 2)
        torch.testing.assert_close(carafe_naive(x, masks, 3, 2, 2), reference(x, masks, 3, 2, 2))
    else:
        check(lambda x, masks: carafe_naive(x, masks, 3, 2, 2), lambda x, masks: reference(x, masks, 3, 2, 2),
              inputs(device, 3, 2, 2))


@pytest.mark.parametrize('device', DEVICES)
def test_no_images(device):
    x, masks = (t.requires_grad_() for t in inputs(device, 5, 1, 2, images=0))
    output = carafe(x, masks, 5, 1, 2)
    output.sum().backward()
    assert output.shape == (0, 4, 6, 10) and x.grad.shape == x.shape


@pytest.mark.parametrize('device', DEVICES)
def test_layer_under_autocast(device):
    torch.manual_seed(0)
    layer, x = CARAFEPack(8, 2, compressed_channels=4).to(device), torch.randn(2, 8, 4, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        output = layer(x)
    torch.testing.assert_close(output.float(), layer(x), rtol=.1, atol=.1)
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
