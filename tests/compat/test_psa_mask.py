"""Masks of point-wise spatial attention against loops over pixels."""
import pytest
import torch
from mmcv.ops import PSAMask
from operators import DEVICES, HALVES, check, fallback_only, randn

pytestmark = fallback_only  # compiled ones have no half precision on the CPU


def reference(masks, kind, size):
    n, _, height, width = masks.shape
    masks = masks.view(n, *size, height, width)
    empty = masks.new_zeros(n)
    rows = []
    for y in range(height):
        for x in range(width):
            for h in range(height):
                for w in range(width):
                    (i, j), (p, q) = ((y, x), (h, w)) if kind == 'collect' else ((h, w), (y, x))
                    row, column = i - p + (size[0] - 1) // 2, j - q + (size[1] - 1) // 2
                    inside = 0 <= row < size[0] and 0 <= column < size[1]
                    rows.append(masks[:, row, column, p, q] if inside else empty)
    return torch.stack(rows, 1).view(n, height * width, height, width)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('size', [(3, 3), (5, 7), (4, 2)])
@pytest.mark.parametrize('kind', ['collect', 'distribute'])
def test_psa_mask(kind, size, dtype, device):
    masks = randn(2, size[0] * size[1], 3, 4, device=device)
    check(PSAMask(kind, size), lambda x: reference(x, kind, size), [masks], dtype)


@pytest.mark.parametrize('device', DEVICES)
def test_no_image(device):
    masks = torch.zeros(0, 9, 3, 4, device=device, requires_grad=True)
    output = PSAMask('collect', (3, 3))(masks)
    output.sum().backward()
    assert output.shape == (0, 12, 3, 4) and masks.grad.shape == masks.shape
