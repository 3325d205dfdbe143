"""Multi-scale deformable attention against its definition, head by head."""
import pytest
import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from operators import DEVICES, HALVES, check, fallback_only, randn, reference_bilinear

pytestmark = fallback_only  # compiled ones have no CPU kernels
SHAPES = [(6, 4), (3, 2), (1, 1)]


def attend(value, locations, weights):
    shapes = torch.tensor(SHAPES, device=value.device)
    sizes = shapes.prod(1)
    return MultiScaleDeformableAttnFunction.apply(value, shapes, sizes.cumsum(0) - sizes, locations, weights, 64)


def reference(value, locations, weights):
    output = []
    levels = value.split([h * w for h, w in SHAPES], 1)
    for image in range(len(value)):
        for head in range(value.shape[2]):
            output.append(0)
            for level, (h, w) in enumerate(SHAPES):
                pixels = levels[level][image, :, head].T.view(-1, h, w)
                x, y = (locations[image, :, head, level] * torch.tensor([w, h], device=value.device) - .5).unbind(-1)
                output[-1] = output[-1] + (reference_bilinear(pixels, y, x) * weights[image, :, head, level]).sum(-1)
    return torch.stack(output).view(len(value), -1, locations.shape[1]).transpose(1, 2)


def inputs(device, queries=5, heads=2, channels=3, points=4):
    """Value, sampling locations (some outside, none at a pixel in any precision) and attention weights."""
    keys = sum(h * w for h, w in SHAPES)
    value = randn(2, keys, heads, channels, device=device)
    locations = .4 * randn(2, queries, heads, len(SHAPES), points, 2, seed=1, device=device) + .5
    locations = (32 * locations).round() / 32 + 1 / 64
    return value, locations, randn(2, queries, heads, len(SHAPES), points, seed=2, device=device).softmax(-1)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
def test_attention(dtype, device):
    check(attend, reference, inputs(device), dtype)


@pytest.mark.parametrize('device', DEVICES)
def test_channels_of_a_real_head(device):
    check(attend, reference, inputs(device, heads=1, channels=32), torch.float32)


@pytest.mark.parametrize('device', DEVICES)
def test_no_queries_and_no_images(device):
    value, locations, weights = inputs(device, queries=0)
    value.requires_grad_()
    output = attend(value, locations, weights)
    output.sum().backward()
    assert output.shape == (2, 0, 6) and not value.grad.any()
    assert attend(*(t[:0] for t in inputs(device))).shape == (0, 5, 6)


@pytest.mark.parametrize('device', DEVICES)
def test_as_mmcv_on_the_cpu(device):
    operands = [t.float() for t in inputs(device)]
    torch.testing.assert_close(attend(*operands), multi_scale_deformable_attn_pytorch(operands[0], SHAPES, *operands[1:]))


@pytest.mark.parametrize('device', DEVICES)
def test_layer_under_autocast(device):
    torch.manual_seed(0)
    layer = MultiScaleDeformableAttention(16, 2, len(SHAPES), 4, dropout=0., batch_first=True).to(device)
    keys = sum(h * w for h, w in SHAPES)
    shapes = torch.tensor(SHAPES, device=device)
    queries, value = torch.randn(2, 5, 16, device=device), torch.randn(2, keys, 16, device=device)
    settings = dict(reference_points=torch.rand(2, 5, len(SHAPES), 2, device=device), spatial_shapes=shapes,
                    level_start_index=shapes.prod(1).cumsum(0) - shapes.prod(1))
    expected = layer(queries, value=value, **settings)
    with torch.autocast(device, torch.bfloat16):
        output = layer(queries, value=value, **settings)
    torch.testing.assert_close(output, expected, rtol=.1, atol=.1)
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
