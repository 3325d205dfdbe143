"""Features of regions against their definitions, sample by sample."""
import math

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign, deform_roi_pool, roi_align, roi_pool
from mmcv.ops.deform_roi_pool import DeformRoIPoolPack, ModulatedDeformRoIPoolPack
from operators import DEVICES, HALVES, check, fallback_only, randn, reference_bilinear, tensors

from liera_mm.compat.ops import sampling
from liera_mm.compat.ops.roi import _deterministic_backward


def reference_weights(length, start, size, bins, samples):
    """Weight of each pixel of a line in each bin, sample by sample, each between its two neighbours: (bins, length)."""
    weights = np.zeros((bins, length))
    samples = samples or math.ceil(size / bins)
    for b in range(bins):
        for s in range(samples):
            position = start + size / bins * (b + (s + 0.5) / samples)
            if not -1 <= position <= length:
                continue
            position = min(max(position, 0), length - 1)
            low = int(position)
            weights[b, low] += (low + 1 - position) / samples
            if position > low:
                weights[b, low + 1] += (position - low) / samples
    return weights


def reference_roi_align(features, rois, output_size, scale, samples, aligned, grad=None):
    """Output (K, C, h, w) in float64, or the gradient (N, C, H, W) of the features for a gradient of the output."""
    output = np.zeros((len(rois), features.shape[1], *output_size))
    grad_features = np.zeros(features.shape)
    for k, (image, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (corner * scale - (0.5 if aligned else 0) for corner in corners)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        rows = reference_weights(features.shape[2], top, height, output_size[0], samples)
        columns = reference_weights(features.shape[3], left, width, output_size[1], samples)
        output[k] = np.einsum('ph,chw,qw->cpq', rows, features[int(image)], columns)
        if grad is not None:
            grad_features[int(image)] += np.einsum('ph,cpq,qw->chw', rows, grad[k], columns)
    return output if grad is None else grad_features


def roi_inputs(scale=1., seed=0):
    """Features (2, 3, 10, 13) and RoIs in image pixels: inside, partly and wholly outside, and of no size."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-4, 12, (8, 2))
    rois = np.concatenate([rng.integers(0, 2, (8, 1)), corners, corners + rng.uniform(0.2, 11, (8, 2))], axis=1)
    special = [[0, -3.5, -2.2, 2.1, 3.3], [1, 9.3, 7.1, 18.7, 14.9], [1, 30, 30, 40, 42], [0, -9, -9, -5, -4],
               [0, 0, 0, 13, 10], [1, 4.3, 5.2, 4.3, 8.9], [0, 3, 3, 3, 3]]
    rois = np.concatenate([rois, special])
    rois[:, 1:] /= scale
    return rng.standard_normal((2, 3, 10, 13)), rois


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('samples', [0, 2])
@pytest.mark.parametrize('scale, output_size', [(1., (3, 2)), (0.25, (2, 2)), (0.5, (1, 4))])
def test_roi_align(scale, output_size, samples, aligned, dtype, device):
    features, rois = roi_inputs(scale)
    x, r = (t.to(dtype) for t in tensors(device, features, rois))
    x.requires_grad_()
    output = RoIAlign(output_size, scale, samples, aligned=aligned)(x, r)
    assert output.dtype == dtype and output.device.type == device
    tolerance = {'rtol': 1e-4, 'atol': 1e-5} if dtype == torch.float32 else {'rtol': 1e-9, 'atol': 1e-11}
    expected = reference_roi_align(features, rois, output_size, scale, samples, aligned)
    np.testing.assert_allclose(output.detach().cpu(), expected, **tolerance)
    assert np.abs(expected).max() > 0.5

    grad = np.random.default_rng(1).standard_normal(output.shape)
    # Not contiguous, as the gradient of a permuted output is.
    output.backward(torch.from_numpy(grad).to(output).transpose(2, 3).contiguous().transpose(2, 3))
    expected = reference_roi_align(features, rois, output_size, scale, samples, aligned, grad)
    np.testing.assert_allclose(x.grad.cpu(), expected, **tolerance)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('samples', [0, 2])
def test_roi_align_gradient_by_finite_differences(samples, aligned, device):
    features, rois = tensors(device, *roi_inputs(0.5))
    features = features[:, :1].clone().requires_grad_()
    # CUDA adds in any order, so two runs may differ in the last bits.
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 2), 0.5, samples, 'avg', aligned), features,
                                    nondet_tol=1e-12)


@pytest.mark.parametrize('device', DEVICES)
def test_roi_align_of_channels_last_features_and_of_no_rois(device):
    features, rois = tensors(device, *roi_inputs())
    expected = roi_align(features, rois, (3, 2), 1., 0, 'avg', True)
    channels_last = features.to(memory_format=torch.channels_last)
    torch.testing.assert_close(roi_align(channels_last, rois, (3, 2), 1., 0, 'avg', True), expected)
    features.requires_grad_()
    empty = roi_align(features, rois[:0], (3, 2), 1., 0, 'avg', True)
    empty.sum().backward()
    assert empty.shape == (0, 3, 3, 2) and not features.grad.any()


@pytest.mark.parametrize('samples', [0, 2])
def test_roi_align_of_malformed_rois(samples):
    features, _ = roi_inputs()
    rois = np.float64([[0, 6, 2, 4, 8], [0, 3, 5, 9, 4.5], [1, 7, 7, 2, 2]])
    x, r = tensors('cpu', features, rois)
    np.testing.assert_allclose(roi_align(x, r, (2, 3), 1., samples, 'avg', False),
                               reference_roi_align(features, rois, (2, 3), 1., samples, False), rtol=1e-9)
    for roi in r:
        with pytest.raises(RuntimeError):
            roi_align(x, roi[None], (2, 3), 1., samples, 'avg', True)


@fallback_only
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_roi_align_of_rois_that_are_not_finite(value, aligned):
    with pytest.raises(RuntimeError, match='finite'):
        roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0., 1, 1, value, 5]]), (2, 2), 1., 2, 'avg', aligned)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('half_rois', [True, False])
def test_roi_align_in_half_precision_is_the_rounded_exact_result(half_rois, dtype, device):
    features, rois = tensors(device, *roi_inputs(0.25))
    features, rois = features.to(dtype), rois.to(dtype) if half_rois else rois.float()
    outputs = []
    for x in (features, features.float()):
        x = x.clone().requires_grad_()
        output = roi_align(x, rois.to(dtype if half_rois else torch.float32), (3, 2), 0.25, 0, 'avg', True)
        output.backward(torch.linspace(-1, 1, output.numel(), device=device).view_as(output).to(dtype).to(output.dtype))
        assert output.dtype == x.grad.dtype == x.dtype
        outputs += [(output.detach(), x.grad)]
    (half, half_grad), (exact, exact_grad) = outputs
    assert torch.equal(half, exact.to(dtype))
    # CUDA adds the gradient in any order.
    torch.testing.assert_close(half_grad, exact_grad.to(dtype), **(
        {'rtol': 0, 'atol': 0} if device == 'cpu' else {'rtol': 1e-2, 'atol': 1e-5}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_roi_align_under_cuda_autocast():
    features, rois = tensors('cuda', *roi_inputs())
    x = features.half().requires_grad_()
    with torch.autocast('cuda'):
        output = roi_align(x, rois.half(), (3, 2), 1., 0, 'avg', True)
    output.sum().backward()
    expected = reference_roi_align(x.detach().double().cpu().numpy(), rois.half().double().cpu().numpy(), (3, 2), 1.,
                                   0, True)
    np.testing.assert_allclose(output.detach().float().cpu(), expected, rtol=1e-2, atol=1e-2)
    assert x.grad.dtype == torch.half and x.grad.any()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('samples', [0, 2])
def test_deterministic_backward(samples, aligned, device):
    features, rois = roi_inputs(0.5)
    rois = rois.repeat(3, axis=0)
    grad = np.random.default_rng(1).standard_normal((len(rois), 3, 2, 4))
    g, r = tensors(device, grad, rois)
    grad_input = torch.full(features.shape, math.nan, dtype=torch.float64, device=device)
    _deterministic_backward(g, r, grad_input, 0.5, samples, aligned)
    expected = reference_roi_align(features, rois, (2, 4), 0.5, samples, aligned, grad)
    np.testing.assert_allclose(grad_input.cpu(), expected, rtol=1e-9, atol=1e-11)


@fallback_only
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_backward_obeys_the_deterministic_flag(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.manual_seed(0)
    x = torch.randn(1, 64, 32, 32, device='cuda', requires_grad=True)
    corners = torch.rand(500, 2, device='cuda') * 20
    rois = torch.cat([torch.zeros(500, 1, device='cuda'), corners, corners + 10], dim=1)
    torch.use_deterministic_algorithms(True)
    try:
        grads = [torch.autograd.grad(roi_align(x, rois, (7, 7), 1., 0, 'avg', True).square().sum(), x)[0]
                 for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    fast, = torch.autograd.grad(roi_align(x, rois, (7, 7), 1., 0, 'avg', True).square().sum(), x)
    torch.testing.assert_close(grads[0], fast, rtol=1e-3, atol=1e-3)


# Other ways to pool, against definitions that autograd differentiates


def clamped(image, y, x):
    """Values (C, ...) of an image (C, H, W) between its pixels; up to a pixel outside of them those at the edge, then 0."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return reference_bilinear(image, y.clamp(0, height - 1), x.clamp(0, width - 1)) * inside


def reference_bins(features, rois, output_size, scale, samples, aligned, pool, offset=None, gamma=.1):
    """Pools the samples (C, Sy, Sx) of every bin; the bins of aligned RoIs may be moved by offsets (K, 2, h, w)."""
    output = []
    for k, (image, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (corner * scale - (.5 if aligned else 0) for corner in corners)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / output_size[0], width / output_size[1]
        samples_y, samples_x = samples or max(math.ceil(bin_h), 0), samples or max(math.ceil(bin_w), 0)
        for p in range(output_size[0]):
            for q in range(output_size[1]):
                y = top + bin_h * (p + (torch.arange(samples_y).to(features) + .5) / max(samples_y, 1))
                x = left + bin_w * (q + (torch.arange(samples_x).to(features) + .5) / max(samples_x, 1))
                if offset is not None:
                    x, y = x + gamma * width * offset[k, 0, p, q], y + gamma * height * offset[k, 1, p, q]
                y, x = torch.meshgrid(y, x, indexing='ij')
                values = clamped(features[int(image)], y, x)
                output.append(pool(values.flatten(1)) if y.numel() else values.sum((1, 2)))
    return torch.stack(output).view(len(rois), *output_size, -1).permute(0, 3, 1, 2)


def pool_inputs(device, scale=1., images=2):
    """Features, and RoIs whose sizes and places are never such that a sample lies at a pixel, in any precision."""
    rois = np.float64([[0, 1.3, 2.2, 9.6, 7.7], [1, -3.6, -2.3, 3.1, 4.4], [1, 8.3, 6.1, 17.8, 13.9], [0, 30, 30, 40, 42],
                       [0, 5.2, 3.6, 6.1, 4.3], [1, 0.2, 0.4, 12.5, 9.9]])
    rois[:, 1:] /= scale
    return randn(images, 3, 10, 13, device=device), torch.from_numpy(rois).to(device)


@pytest.fixture(params=[None, 500], ids=['at once', 'in chunks'])
def chunk(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(sampling, 'CHUNK', request.param)


@pytest.mark.usefixtures('chunk')
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('scale, output_size, samples, aligned', [
    (1., (3, 2), 0, True), (.25, (2, 2), 2, True), (.5, (1, 4), 0, False), (1., (2, 3), 3, False)])
def test_max_roi_align(scale, output_size, samples, aligned, dtype, device):
    features, rois = pool_inputs(device, scale)
    rois = rois.to(dtype)
    check(lambda x: roi_align(x, rois, output_size, scale, samples, 'max', aligned),
          lambda x: reference_bins(x, rois, output_size, scale, samples, aligned, lambda v: v.max(1)[0]),
          (features, ), dtype)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
def test_max_roi_align_in_half_precision(dtype, device):
    features, rois = pool_inputs(device)
    features, rois = features.to(dtype).requires_grad_(), rois.to(dtype)
    output = roi_align(features, rois, (3, 2), 1., 2, 'max', True)
    expected = reference_bins(features.detach().double(), rois, (3, 2), 1., 2, True, lambda v: v.max(1)[0])
    assert torch.equal(output, expected.float().to(dtype))
    output.sum().backward()
    # The places of the maxima are kept in half precision, so the gradient is spread a little differently.
    assert features.grad.dtype == dtype
    torch.testing.assert_close(features.grad.sum((1, 2, 3)).double(), torch.stack([
        (expected[rois[:, 0] == image] != 0).sum() for image in (0, 1)]).double(), rtol=2e-2, atol=0)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
def test_max_roi_align_of_rois_without_samples(device):
    features = torch.ones(1, 2, 5, 5, device=device, requires_grad=True)
    output = roi_align(features, torch.tensor([[0., 2, 2, 2, 4]], device=device), (2, 2), 1., 0, 'max', True)
    output.sum().backward()
    assert not output.any() and not features.grad.any()
    assert roi_align(features, torch.empty(0, 5, device=device), (2, 2), 1., 0, 'max', True).shape == (0, 2, 2, 2)


def reference_roi_pool(features, rois, output_size, scale):
    output = []
    for image, *corners in rois.tolist():
        left, top, right, bottom = (scale * (corner + extra) for corner, extra in zip(corners, (0, 0, 1, 1)))
        for p in range(output_size[0]):
            for q in range(output_size[1]):
                edges = [(start + (end - start) / bins * i, start + (end - start) / bins * (i + 1))
                         for start, end, bins, i in ((top, bottom, output_size[0], p), (left, right, output_size[1], q))]
                rows, columns = (slice(max(math.floor(low), 0), max(math.ceil(high), 0)) for low, high in edges)
                pixels = features[int(image), :, rows, columns].flatten(1)
                real = right > left and bottom > top and pixels.shape[1]
                output.append(pixels.max(1)[0] if real else features[0, :, 0, 0] * 0)
    return torch.stack(output).view(len(rois), *output_size, -1).permute(0, 3, 1, 2)


@fallback_only
@pytest.mark.usefixtures('chunk')
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('scale, output_size', [(1., (3, 2)), (.25, (7, 7)), (.5, (1, 4))])
def test_roi_pool(scale, output_size, dtype, device):
    features, rois = pool_inputs(device, scale)
    rois = torch.cat([rois, rois[:1, [0, 3, 4, 1, 2]]]).to(dtype)  # the last one is inside out
    check(lambda x: roi_pool(x, rois, output_size, scale),
          lambda x: reference_roi_pool(x, rois, output_size, scale), (features, ), dtype)


@fallback_only
def test_roi_pool_of_equal_values_and_of_no_rois():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    roi_pool(features, torch.tensor([[0., 1, 1, 2, 2]]), 1).backward()
    assert features.grad[0, 0, 1, 1] == 1 and features.grad.sum() == 1  # the first one, as in mmcv
    assert roi_pool(features, torch.empty(0, 5), 2).shape == (0, 1, 2, 2)


@fallback_only
@pytest.mark.usefixtures('chunk')
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('scale, output_size, samples, moved', [
    (1., (3, 2), 0, True), (.25, (2, 2), 2, True), (.5, (2, 3), 0, False)])
def test_deform_roi_pool(scale, output_size, samples, moved, dtype, device):
    features, rois = pool_inputs(device, scale)
    rois = rois.to(dtype)
    offset = [(4 * randn(len(rois), 2, *output_size, seed=1, device=device)).round() / 4] * moved
    check(lambda x, *offset: deform_roi_pool(x, rois, *(offset or [None]), output_size, scale, samples, .1),
          lambda x, *offset: reference_bins(x, rois, output_size, scale, samples, True, lambda v: v.mean(1), *offset),
          (features, *offset), dtype)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('layer', [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_deform_roi_pool_layers(layer, device):
    features, rois = (t.float() for t in pool_inputs(device))
    pool = layer(2, 3, deform_fc_channels=8).to(device)
    output = pool(features, rois)
    output.sum().backward()
    assert output.shape == (6, 3, 2, 2) and pool.offset_fc[-1].bias.grad.any()
    assert deform_roi_pool(features, rois[:0], None, (2, 2)).shape == (0, 3, 2, 2)
