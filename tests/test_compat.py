"""Parity of the operators with plain-Python definitions, and what surrounds them."""
import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from liera_mm import compat

compat.install()

from mmcv.ops import DeformConv2d, RoIAlign, batched_nms, nms, roi_align, soft_nms  # noqa: E402

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
compiled = importlib.util.find_spec('mmcv._ext').origin != 'torchvision'
fallback_only = pytest.mark.skipif(compiled, reason='mmcv has its compiled operators here')


def random_boxes(rng, count, size=100.):
    corners = rng.uniform(0, size, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(1, size / 2, (count, 2))], axis=1).astype(np.float32)


def integer_boxes(rng, count):
    corners = rng.integers(0, 6, (count, 2))
    return np.concatenate([corners, corners + rng.integers(1, 11, (count, 2))], axis=1).astype(np.float32)


def tensors(device, *arrays):
    return [torch.from_numpy(array).to(device) for array in arrays]


# Non-maximum suppression


def reference_iou(a, b, offset):
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    union = area_a + area_b - width * height
    return width * height / union if union else 0.


def reference_nms(boxes, scores, threshold, offset=0, score_threshold=0, max_num=-1):
    """Indices of the kept boxes, in double precision; IoU 3/10 is not larger than 0.3."""
    boxes = boxes.astype(np.float64).tolist()
    keep = []
    for i in np.argsort(-scores, kind='stable').tolist():
        if score_threshold > 0 and not scores[i] > score_threshold:
            continue
        if all(reference_iou(boxes[i], boxes[j], offset) <= threshold for j in keep):
            keep.append(i)
    return keep[:max_num] if max_num > 0 else keep


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.5, 0.7])
def test_nms(threshold, offset, device):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        boxes, scores = random_boxes(rng, 60), rng.random(60, dtype=np.float32)
        for limits in ({}, {'score_threshold': 0.4}, {'max_num': 7}, {'score_threshold': 0.2, 'max_num': 9}):
            expected = reference_nms(boxes, scores, threshold, offset, **limits)
            dets, keep = nms(*tensors(device, boxes, scores), threshold, offset=offset, **limits)
            assert keep.tolist() == expected
            assert keep.dtype == torch.int64 and keep.device.type == device
            np.testing.assert_array_equal(dets[:, :4].cpu(), boxes[expected])
            np.testing.assert_array_equal(dets[:, 4].cpu(), scores[expected])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.2, 0.3, 0.5, 0.6, 0.7])
def test_nms_of_equal_scores_and_of_an_iou_at_the_threshold(threshold, offset, device):
    at_threshold = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        boxes = integer_boxes(rng, 50)
        scores = rng.choice(np.float32([0.25, 0.5, 0.75]), 50)
        at_threshold += sum(reference_iou(a, b, offset) == threshold for a in boxes.tolist() for b in boxes.tolist())
        assert nms(*tensors(device, boxes, scores), threshold, offset=offset)[1].tolist() == reference_nms(
            boxes, scores, threshold, offset)
    assert at_threshold > 0


def test_nms_of_numpy_arrays_and_of_no_boxes():
    rng = np.random.default_rng(0)
    boxes, scores = random_boxes(rng, 20), rng.random(20, dtype=np.float32)
    dets, keep = nms(boxes, scores, 0.5)
    assert isinstance(dets, np.ndarray) and keep.tolist() == reference_nms(boxes, scores, 0.5)
    dets, keep = nms(boxes[:0], scores[:0], 0.5)
    assert dets.shape == (0, 5) and keep.shape == (0,)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_precisions(dtype, device):
    rng = np.random.default_rng(0)
    boxes = random_boxes(rng, 80)
    boxes, scores = tensors(device, boxes, np.linspace(1, 0.2, 80))
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    expected = reference_nms(boxes.double().cpu().numpy(), scores.double().cpu().numpy(), 0.4)
    assert nms(boxes, scores, 0.4)[1].tolist() == expected
    assert nms(boxes, scores.float(), 0.4)[1].tolist() == expected


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('split_thr', [10000, 10])
def test_batched_nms(split_thr, device):
    rng = np.random.default_rng(0)
    boxes, scores, classes = random_boxes(rng, 90), rng.random(90, dtype=np.float32), rng.integers(0, 3, 90)
    expected = sorted((np.flatnonzero(classes == c)[i] for c in range(3)
                       for i in reference_nms(boxes[classes == c], scores[classes == c], 0.4)),
                      key=lambda i: -scores[i])
    cfg = {'type': 'nms', 'iou_threshold': 0.4, 'split_thr': split_thr}
    dets, keep = batched_nms(*tensors(device, boxes, scores, classes), cfg)
    assert keep.tolist() == expected
    np.testing.assert_array_equal(dets[:, :4].cpu(), boxes[expected])
    assert batched_nms(*tensors(device, boxes, scores, classes), cfg, class_agnostic=True)[1].tolist() == (
        reference_nms(boxes, scores, 0.4) if split_thr > 90 else expected)


# Soft-NMS


def reference_soft_nms(boxes, scores, threshold=0.3, sigma=0.5, min_score=1e-3, method='linear', offset=0):
    """What mmcv's C++ loop does to the list, swap by swap: among equal scores, the first in the list goes first."""
    left = [[i, np.float32(score)] for i, score in enumerate(scores)]
    done = 0
    while done < len(left):
        best = max(range(done, len(left)), key=lambda position: (left[position][1], -position))
        left[done], left[best] = left[best], left[done]
        position = done + 1
        while position < len(left):
            iou = np.float32(reference_iou(*boxes[[left[done][0], left[position][0]]].tolist(), offset))
            if method == 'gaussian':
                weight = math.exp(-iou**2 / sigma)
            else:
                weight = 1 if iou < threshold else 1 - iou if method == 'linear' else 0
            left[position][1] = np.float32(left[position][1] * np.float32(weight))
            if left[position][1] < min_score:
                last = left.pop()
                if position < len(left):
                    left[position] = last
            else:
                position += 1
        done += 1
    return [i for i, _ in left], np.float32([score for _, score in left])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(method, offset, device):
    dropped = 0
    for seed in range(8):
        for threshold, sigma, min_score in ((0.3, 0.5, 1e-3), (0.5, 0.3, 0.2), (0.1, 0.1, 0.05)):
            rng = np.random.default_rng(seed)
            boxes, scores = random_boxes(rng, 50), rng.random(50, dtype=np.float32)
            kept, new_scores = reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset)
            dets, keep = soft_nms(*tensors(device, boxes, scores), threshold, sigma, min_score, method, offset)
            assert keep.tolist() == kept
            assert keep.device.type == dets.device.type == device
            np.testing.assert_array_equal(dets[:, :4].cpu(), boxes[kept])
            np.testing.assert_allclose(dets[:, 4].cpu(), new_scores, rtol=1e-5)
            dropped += len(boxes) - len(kept)
    assert dropped > 0


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_of_equal_scores_and_boxes(method):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        boxes, scores = integer_boxes(rng, 40), rng.choice(np.float32([0.25, 0.5, 0.75]), 40)
        boxes[20:30] = boxes[:10]
        kept, new_scores = reference_soft_nms(boxes, scores, 0.5, 0.5, 0.1, method)
        dets, keep = soft_nms(boxes, scores, 0.5, 0.5, 0.1, method)
        assert keep.tolist() == kept
        np.testing.assert_allclose(dets[:, 4], new_scores, rtol=1e-5)


def test_soft_nms_keeps_the_best_box_whatever_its_score():
    boxes, scores = np.float32([[0, 0, 9, 9], [20, 20, 30, 30], [40, 40, 50, 50]]), np.float32([0.1, 0.3, 0.2])
    dets, keep = soft_nms(boxes, scores, min_score=0.5)
    assert keep.tolist() == [1] and dets[0, 4] == np.float32(0.3)
    assert len(soft_nms(boxes[:0], scores[:0])[1]) == 0


@fallback_only
def test_soft_nms_of_empty_boxes_has_no_nan():
    boxes = torch.tensor([[5., 5, 5, 5]]).repeat(3, 1)
    dets, keep = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), method='gaussian')
    assert keep.tolist() == [1, 2, 0] and dets[:, 4].tolist() == pytest.approx([0.9, 0.7, 0.5])


def test_soft_nms_leaves_its_arguments_alone_and_works_batched():
    rng = np.random.default_rng(0)
    boxes, scores = tensors('cpu', random_boxes(rng, 40), rng.random(40, dtype=np.float32))
    before = scores.clone()
    cfg = {'type': 'soft_nms', 'iou_threshold': 0.5, 'min_score': 0.05}
    dets, keep = batched_nms(boxes, scores, torch.zeros(40), cfg)
    kept, new_scores = reference_soft_nms(boxes.numpy(), scores.numpy(), 0.5, min_score=0.05)
    assert keep.tolist() == kept
    np.testing.assert_allclose(dets[:, 4], new_scores, rtol=1e-5)
    assert torch.equal(scores, before)


# RoIAlign


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
    compat._deterministic_backward(g, r, grad_input, 0.5, samples, aligned)
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


# The module mmcv._ext


def run_python(code, *path):
    """Run code in a fresh interpreter that can ``import compat``, with more folders in front of its path."""
    code = ('import importlib.util as u, sys; spec = u.spec_from_file_location("compat", sys.argv[1]); '
            'sys.modules["compat"] = compat = u.module_from_spec(spec); spec.loader.exec_module(compat)\n' + code)
    paths = os.pathsep.join([*map(str, path), os.environ.get('PYTHONPATH', '')])
    return subprocess.run([sys.executable, '-c', code, compat.__file__], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': paths})


def check_python(code, *path):
    result = run_python(code, *path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_mmengine_and_mmcv_find_the_operators():
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available
    assert importlib.util.find_spec('mmcv._ext') is not None
    assert mmcv_full_available()
    if sys.version_info < (3, 14):  # pkgutil.find_loader, which it calls, is gone there
        assert check_ops_exist()


def test_environment_report():
    from mmcv.utils import collect_env
    assert collect_env()['MMCV Compiler']


@fallback_only
def test_unsupported_operators_fail_when_called_not_on_import():
    layer = DeformConv2d(3, 4, 3, padding=1)
    with pytest.raises(RuntimeError, match='deform_conv_forward.*nstall mmcv'):
        layer(torch.ones(1, 3, 8, 8), torch.zeros(1, 18, 8, 8))
    with pytest.raises(RuntimeError, match="pool_mode='max'"):
        roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0., 1, 1, 5, 5]]), (2, 2), 1., 2, 'max', True)


@fallback_only
def test_dunder_attributes_of_the_stand_in_are_missing_as_usual():
    ext = importlib.import_module('mmcv._ext')
    assert hasattr(ext, 'carafe_forward') and not hasattr(ext, '__path__')
    with pytest.raises(AttributeError, match='__wrapped__'):
        getattr(ext, '__wrapped__')  # noqa: B009


def test_compiled_operators_are_never_shadowed(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    code = 'compat.install(); from mmcv import _ext; print(_ext.__spec__.origin)'
    assert check_python(code, tmp_path).strip() == 'torchvision'
    (tmp_path / 'mmcv/_ext.py').touch()
    assert check_python(code, tmp_path).strip() == str(tmp_path / 'mmcv/_ext.py')


def test_without_mmcv_there_are_no_operators(tmp_path):
    check_python('''
compat.install()
sys.path = [folder for folder in sys.path if 'site-packages' not in folder]
try:
    u.find_spec('mmcv._ext')
except ModuleNotFoundError as error:
    assert error.name == 'mmcv'
else:
    raise AssertionError''')


def test_install_twice_adds_one_finder(tmp_path):
    fake_transformers(tmp_path, '5.1.0')
    check_python('''
before = list(sys.meta_path)
compat.install()
first = list(sys.meta_path)
assert len(first) == len(before) + 2 and first[1:-1] == before
compat.install()
assert sys.meta_path == first
assert not [m for m in sys.modules if m.startswith(('mmcv', 'mmdet', 'mmpretrain', 'torchvision', 'transformers'))]
''', tmp_path)


@fallback_only
def test_a_late_install_warns():
    check_python('''
import types, warnings
sys.modules['mmdet.structures.mask'] = types.ModuleType('mmdet.structures.mask')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    compat.install()
assert 'import liera_mm first' in str(caught[0].message)
''')


# The multimodal part of mmpretrain


def fake_transformers(folder, version):
    (folder / f'transformers-{version}.dist-info').mkdir()
    (folder / f'transformers-{version}.dist-info/METADATA').write_text(
        f'Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n')
    (folder / 'transformers.py').touch()


def test_mmpretrain_imports_with_transformers_5(tmp_path):
    pytest.importorskip('pycocotools')  # mmpretrain's multimodal part asks for it as well
    fake_transformers(tmp_path, '5.0.0rc1')
    code = 'import mmpretrain.models; assert "ConvNeXt" in mmpretrain.models.BACKBONES'
    assert 'ImportError: cannot import name' in run_python(code, tmp_path).stderr
    check_python('compat.install(); ' + code, tmp_path)


@pytest.mark.parametrize('version, on', [('4.40.2', True), ('5.0.0', False)])
def test_multimodal_part_is_switched_off_only_for_transformers_5(version, on, tmp_path):
    fake_transformers(tmp_path, version)
    for name, body in [('', ''), ('.utils', 'from .dependency import WITH_MULTIMODAL as SEEN'),
                       ('.utils.dependency', 'WITH_MULTIMODAL = True')]:
        file = tmp_path / f'mmpretrain{name}'.replace('.', '/')
        file = file.with_suffix('.py') if name.endswith('dependency') else file / '__init__.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
    check_python(f'compat.install(); import mmpretrain.utils as utils; assert utils.SEEN is {on}', tmp_path)
    # mmpretrain.utils may be there already; mmpretrain.models looks the flag up when it is imported.
    check_python('from mmpretrain.utils import dependency; compat.install(); '
                 f'assert dependency.WITH_MULTIMODAL is {on}', tmp_path)
