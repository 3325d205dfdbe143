"""Every Triton kernel against the operator in plain torch, in float64, at shapes that divide no block size.

On a GPU the kernels are compiled; elsewhere Triton's interpreter runs them (see conftest.py).
"""
import pytest
import torch
import torchvision  # noqa: F401  registers its operators

pytest.importorskip('triton', reason='Triton is not installed')

from liera_mm.core.kernels import torch_ops, triton_ops

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == 'cuda')
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def agree(name, dtype, *args):
    """The kernel and the plain operator, which computes in float64 from the same numbers, differ by rounding."""

    def widen(value):
        if isinstance(value, list):
            return [widen(item) for item in value]
        if isinstance(value, torch.Tensor):
            return value.double()
        return torch.float64 if isinstance(value, torch.dtype) else value

    expected = getattr(torch_ops, name)(*map(widen, args))
    actual = getattr(triton_ops, name)(*args)  # last: it may overwrite its arguments
    if isinstance(expected, torch.Tensor):
        expected, actual = [expected], [actual]
    assert len(expected) == len(actual)
    for ours, theirs in zip(actual, expected):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            if name in PARTS and ours.shape != theirs.shape:
                ours, theirs = (parts.double().sum(PARTS[name]) for parts in (ours, theirs))
            error = (ours.double().flatten() - theirs.flatten()).norm() / theirs.norm()
            assert error <= TOLERANCE[dtype], (name, error)


PARTS = dict(gelu=1, scaled_weights=0, weight_grad=0)  # dimension of sums that are left in parts


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('relative', [False, True])
@pytest.mark.parametrize('update', ['additive', 'taylor', 'exp'])
@pytest.mark.parametrize('layers, rows, cols, inner', [(1, 5, 3, 1), (2, 7, 147, 14), (3, 33, 70, 16), (1, 64, 64, 35)])
def test_moved_weights_and_their_gradient(layers, rows, cols, inner, update, relative, dtype):
    weights = [random(rows, cols, dtype=dtype) for _ in range(layers)]
    a, b = .3 * random(layers, inner, cols), .3 * random(layers, rows, inner)
    rms = [.2 + torch.rand((), device=DEVICE) for _ in range(layers)] if relative else None
    agree('moved_weights', dtype, weights, a, b, .7, rms, update, dtype)
    agree('product_grads', dtype, weights, a, b, .7, rms, update, random(layers, rows, cols, dtype=dtype))


@pytest.mark.parametrize('precision', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(1, 3), (70, 49), (5, 700)])
def test_rows_scaled_to_norms(shape, precision):
    rows, grad = random(*shape), random(*shape)
    rows *= 10.**torch.randint(-18, 18, (shape[0], 1), device=DEVICE) if precision == torch.float32 else 1
    given = [rows, .5 + torch.rand(shape[0], device=DEVICE)]
    # In float64 the plain operators would hold norms in another precision
    for name, args in dict(rescaled=given, rescaled_grad=[*given, grad]).items():
        for ours, theirs in zip(*(getattr(ops, name)(*args[:2], precision, *args[2:]) for ops in (triton_ops, torch_ops))):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize('precision', DTYPES, ids=str)
def test_rows_scaled_to_the_norms_that_they_had(precision):
    rows = torch.cat([random(64, 300), 1e-25 * random(4, 300), 1e25 * random(4, 300)])
    rows[3], rows[5, 7], rows[8, 9] = 0, float('inf'), float('nan')
    norms = triton_ops.rescaled(rows, torch.ones(len(rows), device=DEVICE), precision)[1]
    stored = norms.clamp(max=torch.finfo(precision).max).to(precision).float()
    result = triton_ops.rescaled(rows, stored, precision)[0]
    if precision != torch.float32:  # which has no such numbers
        rows, result = rows[:68], result[:68]
    torch.testing.assert_close(result, rows, rtol=0, atol=0, equal_nan=True)
    drows, dnorms = triton_ops.rescaled_grad(rows, stored[:len(rows)], precision, torch.ones_like(rows))
    assert all(torch.equal(drows[row], torch.ones_like(drows[row])) and dnorms[row] == 0 for row in (3, 5, 8))
    assert drows.isfinite().all() and dnorms.isfinite().all()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(1, 8), (2, 5, 3, 24), (37, 130)])
def test_layer_norm(shape, dtype):
    channels = shape[-1]
    x, weight, bias = 3 + random(*shape, dtype=dtype), random(channels), random(channels)
    agree('layer_norm', dtype, x, weight, bias, 1e-6)
    mean, rstd = x.float().mean(-1, keepdim=True), x.float().var(-1, correction=0, keepdim=True).add(1e-6).rsqrt()
    for params in (False, True):
        agree('layer_norm_grad', dtype, random(*shape, dtype=dtype), x, weight, bias, mean, rstd, params, not params)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('images, tokens, hidden', [(1, 1, 4), (3, 35, 20), (2, 130, 144)])
def test_gelu(images, tokens, hidden, dtype):
    for flag in (False, True):
        agree('gelu', dtype, random(images, tokens, hidden, dtype=dtype), random(hidden), flag)
        agree('gelu_grad', dtype, random(images, tokens, hidden, dtype=dtype), random(images, tokens, hidden, dtype=dtype),
              random(hidden), random(images, hidden) if flag else None, flag)


@pytest.mark.parametrize('images, parts, hidden', [(1, 1, 4), (3, 5, 20), (2, 3, 144)])
def test_response_normalisation(images, parts, hidden):
    squares, weight = random(images, parts, hidden).square(), random(hidden)
    agree('response', torch.float32, squares, weight, 1e-6)
    norms = squares.sum(1).sqrt()
    norms[0, 0] = 0
    agree('response_grad', torch.float32, random(parts, images, hidden), weight, norms, 1e-6)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('images, channels, hidden', [(1, 3, 5), (3, 40, 160)])
def test_weights_of_every_image(images, channels, hidden, dtype):
    weight = random(channels, hidden, dtype=dtype)
    by_channel, by_image = random(images, channels), random(images, 1).expand(-1, channels)
    for rows in (None, by_channel, by_image):
        for cols, beta in ((None, None), (random(images, hidden), random(hidden))):
            agree('scaled_weights', dtype, images, weight, rows, cols, beta)
            agree('weight_grad', dtype, random(images, channels, hidden, dtype=dtype), weight, rows, cols,
                  None if beta is None else random(images, channels), beta)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(1, 1, 1, 3), (2, 5, 7, 300)])
def test_residual(shape, dtype):
    images, *_, channels = shape
    x, z = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    for sums, rows in ((None, None), (random(3, channels), random(images, 1).expand(-1, channels))):
        agree('residual', dtype, x, z, random(channels), sums, rows)


# Several images and strips of columns; several parts of the rows
@pytest.mark.parametrize('shape, dtype', [((2, 3, 5, 9), torch.float16), ((1, 33, 1, 3), torch.float32)] + [
    ((2, 65, 35, 70), dtype) for dtype in DTYPES if DEVICE == 'cuda'], ids=str)
def test_depthwise(shape, dtype):
    x, taps, bias = random(*shape, dtype=dtype), random(49, shape[3], dtype=dtype), random(shape[3])
    agree('depthwise', dtype, x, taps, bias, None, False)
    agree('depthwise', dtype, x, taps, None, random(*shape, dtype=dtype), True)
    agree('depthwise_weight_grad', dtype, x, random(*shape, dtype=dtype))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('channels, bins', [(5, 2)] + [(70, 3), (256, 7)] * (DEVICE == 'cuda'))
def test_roi_pool(channels, bins, dtype):
    """RoIs in the image, across its border, outside of it, larger than it, smaller than a pixel, and without extent."""
    shapes, scales = [torch.Size([2, 6, 7, channels]), torch.Size([2, 3, 4, channels])], [.25, .125]
    rois = torch.tensor([[0, 3., 5, 20, 13], [1, -6, -3, 30, 10], [0, 40, 30, 50, 40], [1, -9, -9, 40, 40],
                         [0, 10, 10, 12, 11], [1, 0, 0, 0, 0], [0, 9, 0, 27, 23]], device=DEVICE)
    levels = torch.tensor([0, 1, 1, 1, 0, 0, 0], device=DEVICE)
    agree('roi_pool', dtype, [random(*shape, dtype=dtype) for shape in shapes], rois, levels, scales, bins)
    agree('roi_pool_grad', dtype, random(len(rois), bins, bins, channels, dtype=dtype), shapes, rois, levels, scales)


@pytest.mark.parametrize('count', [0, 1, 63, 64, 65, 200] + [8000] * (DEVICE == 'cuda'))
@pytest.mark.parametrize('threshold', [.1, .5, .9])
def test_nms(count, threshold):
    centre, size = 100 * torch.rand(count, 2, device=DEVICE), 30 * torch.rand(count, 2, device=DEVICE)
    size[::7] = 0
    boxes = torch.cat([centre - size, centre + size], 1)
    boxes[1::3] = boxes[::3][:len(boxes[1::3])] + .5  # near copies
    scores = torch.rand(count, device=DEVICE).round(decimals=2)  # ties
    kept = triton_ops.nms(boxes, scores, threshold)
    assert kept.tolist() == torch_ops.nms(boxes, scores, threshold).tolist()
    assert count < 60 or len(kept) < count


def test_nms_of_several_rows():
    """Each row is as if it were alone, padded boxes without extent hide nothing."""
    centre, size = 100 * torch.rand(3, 150, 2, device=DEVICE), 30 * torch.rand(3, 150, 2, device=DEVICE)
    boxes = torch.cat([centre - size, centre + size], 2)
    boxes[1, 40:] = 0
    kept = triton_ops.nms_kept(boxes, .5)
    assert torch.equal(kept, torch_ops.nms_kept(boxes, .5))
    for row, each in zip(kept, boxes):
        assert torch.equal(row, triton_ops.nms_kept(each[None], .5)[0])
    assert 120 < kept.sum() < 440 and kept[1, 40:].all()
