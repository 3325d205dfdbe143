"""Deformable convolutions against their definition, tap by tap."""
import pytest
import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d, deform_conv2d, modulated_deform_conv2d
from operators import DEVICES, HALVES, check, fallback_only, randn, reference_bilinear

GEOMETRIES = [  # kernel, stride, padding, dilation, groups, deformable groups
    ((3, 3), 1, 1, 1, 1, 1), ((3, 3), 2, 1, 1, 2, 1), ((3, 2), (1, 2), (2, 0), (2, 1), 1, 2), ((1, 1), 1, 0, 1, 4, 4)]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def reference(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    out_h, out_w = offset.shape[2:]
    kernel = weight.shape[2:]
    offset = offset.view(len(x), deform_groups, *kernel, 2, out_h, out_w)
    mask = mask.view(len(x), deform_groups, *kernel, out_h, out_w)
    rows = torch.arange(out_h, device=x.device)[:, None] * pair(stride)[0] - pair(padding)[0]
    columns = torch.arange(out_w, device=x.device) * pair(stride)[1] - pair(padding)[1]
    output = []
    for image in range(len(x)):
        seen = []
        for g, channels in enumerate(x[image].chunk(deform_groups)):
            seen.append(torch.stack([torch.stack([
                reference_bilinear(channels, rows + i * pair(dilation)[0] + offset[image, g, i, j, 0],
                                   columns + j * pair(dilation)[1] + offset[image, g, i, j, 1]) * mask[image, g, i, j]
                for j in range(kernel[1])], 1) for i in range(kernel[0])], 1))
        output.append(torch.cat([torch.einsum('ocij,cijhw->ohw', w, s)
                                 for w, s in zip(weight.chunk(groups), torch.cat(seen).chunk(groups))]))
    return torch.stack(output) + bias[:, None, None]


def inputs(device, kernel, stride, padding, dilation, groups, deform_groups):
    """Input, offset, mask, weight and bias; the offset so that, in any precision, none ends at a pixel: a kink."""
    out = [(size + 2 * p - d * (k - 1) - 1) // s + 1
           for size, k, s, p, d in zip((7, 8), kernel, *map(pair, (stride, padding, dilation)))]
    taps = deform_groups * kernel[0] * kernel[1]
    shapes = [(2, 4, 7, 8), (2, 2 * taps, *out), (2, taps, *out), (8, 4 // groups, *kernel), (8, )]
    x, offset, *others = (randn(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes))
    return [x, (4 * offset).round() / 4 + 1 / 8, *others]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kernel, stride, padding, dilation, groups, deform_groups', GEOMETRIES)
@pytest.mark.parametrize('biased', [True, False])
def test_modulated(biased, kernel, stride, padding, dilation, groups, deform_groups, dtype, device):
    geometry = (stride, padding, dilation, groups, deform_groups)
    x, offset, mask, weight, bias = inputs(device, kernel, *geometry)
    none = torch.zeros_like(bias)
    check(lambda *args: modulated_deform_conv2d(*args, *([] if biased else [None]), *geometry),
          lambda *args: reference(*args, *([] if biased else [none.to(args[0])]), *geometry),
          (x, offset, mask, weight, bias)[:5 if biased else 4], dtype)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('kernel, stride, padding, dilation, groups, deform_groups', GEOMETRIES)
def test_without_modulation(kernel, stride, padding, dilation, groups, deform_groups, dtype, device):
    geometry = (stride, padding, dilation, groups, deform_groups)
    x, offset, mask, weight, bias = inputs(device, kernel, *geometry)
    check(lambda *args: deform_conv2d(*args, *geometry),
          lambda x, offset, weight: reference(x, offset, torch.ones_like(mask), weight, bias.to(x) * 0, *geometry),
          (x, offset, weight), dtype)


@pytest.mark.parametrize('device', DEVICES)
def test_offsets_of_a_finer_level(device):
    """DyHead's: the kernels count in the memory of an image as if it had the height and width of the output."""
    geometry = (1, 1, 1, 1, 2)
    x, _, _, weight, bias = inputs(device, (3, 3), *geometry)
    offset = (4 * randn(2, 36, 14, 15, seed=1, device=device)).round() / 4 + 1 / 8
    mask = randn(2, 18, 14, 15, seed=2, device=device)

    def read(values):
        memory = [image.reshape(-1)[:len(image) * 7 * 8] for image in values]
        return torch.stack([image.reshape(-1, 7, 8) for image in memory])

    check(lambda *args: modulated_deform_conv2d(*args, *geometry),
          lambda x, offset, mask, *args: reference(x, read(offset), read(mask), *args, *geometry),
          (x, offset, mask, weight, bias))


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('modulated', [True, False])
def test_half_precision(modulated, dtype, device):
    geometry = (1, 1, 1, 1, 1)
    x, offset, mask, weight, bias = inputs(device, (3, 3), *geometry)
    if modulated:
        check(lambda *args: modulated_deform_conv2d(*args, *geometry), lambda *args: reference(*args, *geometry),
              (x, offset, mask, weight, bias), dtype)
    else:
        check(lambda *args: deform_conv2d(*args, *geometry),
              lambda x, offset, weight: reference(x, offset, torch.ones_like(mask), weight, bias.to(x) * 0, *geometry),
              (x, offset, weight), dtype)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('frozen', ['input', 'offset', 'weight', 'input and offset'])
def test_frozen_operands(frozen, device):
    names, geometry = ('input', 'offset', 'weight'), (1, 1, 1, 1, 1)
    x, offset, mask, weight, bias = inputs(device, (3, 3), *geometry)
    operands = [t.requires_grad_(n not in frozen) for n, t in zip(names, (x, offset, weight))]
    trained = [t for t in operands if t.requires_grad]
    output = deform_conv2d(*operands, *geometry)
    expected = torch.autograd.grad(
        reference(x, offset, torch.ones_like(mask), weight, bias * 0, *geometry).square().sum(), trained)
    for _ in range(2):  # a second time, since the first one leaves nothing behind
        actual = torch.autograd.grad(output.square().sum(), trained, retain_graph=True)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('layer', [DeformConv2d, ModulatedDeformConv2d])
def test_more_images_than_mmcv_takes_at_a_time(layer, device):
    torch.manual_seed(0)
    conv = layer(2, 3, 3, padding=1).to(device)
    x, offset = torch.randn(64, 2, 5, 5, device=device), torch.randn(64, 18, 5, 5, device=device)
    mask = [torch.rand(64, 9, 5, 5, device=device)] * (layer is ModulatedDeformConv2d)
    torch.testing.assert_close(conv(x, offset, *mask)[40:42], conv(x[40:42], offset[40:42], *[m[40:42] for m in mask]))


@pytest.mark.parametrize('device', DEVICES)
def test_under_autocast(device):
    geometry = (1, 1, 1, 1, 1)
    x, offset, mask, weight, bias = (t.float().requires_grad_() for t in inputs(device, (3, 3), *geometry))
    with torch.autocast(device, torch.float16):
        # The offset decides, as it comes from a convolution.
        output = modulated_deform_conv2d(x, offset.half(), mask, weight, bias, *geometry)
    output.sum().backward()
    assert output.dtype == torch.float16 and all(t.grad.dtype == torch.float32 for t in (x, offset, mask, weight, bias))
    torch.testing.assert_close(output.double(), reference(x.double(), offset.half().double(), *(
        t.double() for t in (mask, weight, bias)), *geometry), rtol=1e-2, atol=2e-2)
