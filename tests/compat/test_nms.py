"""Non-maximum suppression against plain-Python definitions."""
import math

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms
from operators import DEVICES, fallback_only, tensors


def random_boxes(rng, count, size=100.):
    corners = rng.uniform(0, size, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(1, size / 2, (count, 2))], axis=1).astype(np.float32)


def integer_boxes(rng, count):
    corners = rng.integers(0, 6, (count, 2))
    return np.concatenate([corners, corners + rng.integers(1, 11, (count, 2))], axis=1).astype(np.float32)


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


# Groups


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('threshold', [0.2, 0.3, 0.5])
def test_nms_match(threshold, device):
    at_threshold = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        boxes, scores = integer_boxes(rng, 40), rng.permutation(40).astype(np.float32)
        left, expected = np.argsort(-scores).tolist(), []
        while left:
            best, *left = left
            ious = {i: reference_iou(boxes[best].tolist(), boxes[i].tolist(), 0) for i in left}
            at_threshold += list(ious.values()).count(threshold)
            expected.append([best, *(i for i in left if ious[i] >= threshold)])
            left = [i for i in left if ious[i] < threshold]
        dets = np.concatenate([boxes, scores[:, None]], 1)
        groups = nms_match(*tensors(device, dets), threshold)
        assert [group.tolist() for group in groups] == expected
        assert groups[0].dtype == torch.int64 and groups[0].device.type == device
        assert [group.tolist() for group in nms_match(dets, threshold)] == expected
    assert at_threshold > 0


@fallback_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_match_in_other_precisions(dtype):
    dets = torch.tensor([[0., 0, 2, 2, .25], [20, 20, 22, 22, 1], [0, 0, 2, 3, .5]], dtype=dtype)
    assert [group.tolist() for group in nms_match(dets, .5)] == [[1], [2, 0]]
    assert nms_match(dets[:0], .5) == []


# Lanes


def lanes(count, seed=0):
    """Lanes of 72 rows as of CLRNet: …, where they start, …, how many rows long they are, and x at every row."""
    rng = np.random.default_rng(seed)
    lines = np.zeros((count, 77), dtype=np.float32)
    lines[:, 2] = rng.integers(0, 60, count) / 71
    lines[:, 4] = rng.integers(0, 40, count)
    lines[:, 5:] = rng.uniform(0, 60, (count, 1)) + rng.uniform(-5, 5, (count, 72))
    return lines, rng.permutation(count).astype(np.float32)


@pytest.fixture
def line_nms():
    return pytest.importorskip('mmcv.ops.line_nms', reason='the official mmcv has none').line_nms


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('top_k', [3, 100])
def test_line_nms(line_nms, top_k, device):
    line_nms = pytest.importorskip('mmcv.ops.line_nms', reason='this mmcv has no line_nms').line_nms
    near_any = 0
    for seed in range(10):
        lines, scores = lanes(30, seed)
        kept, parents = [], [0] * 30
        dropped = set()
        for i in np.argsort(-scores).tolist():
            if i in dropped:
                continue
            if len(kept) == top_k:
                break
            kept.append(i)
            parents[i] = len(kept)
            for j in np.flatnonzero(scores < scores[i]):
                starts = [round(71 * float(lines[k, 2])) for k in (i, j)]
                ends = [s + int(lines[k, 4]) - 1 for s, k in zip(starts, (i, j))]
                rows = np.arange(max(starts), min(*ends, 71) + 1)
                if len(rows) and np.abs(lines[i, 5 + rows] - lines[j, 5 + rows]).mean() < 8:
                    dropped.add(j)
                    parents[j] = len(kept)
        near_any += len(dropped)
        keep, count, parent = line_nms(*tensors(device, lines, scores), overlap=8., top_k=top_k)
        assert keep[:count].tolist() == kept and not keep[count:].any()
        assert parent.tolist() == parents and keep.device.type == device
    assert near_any > 20


@fallback_only
def test_line_nms_of_no_lanes(line_nms):
    line_nms = pytest.importorskip('mmcv.ops.line_nms', reason='this mmcv has no line_nms').line_nms
    keep, count, parents = line_nms(torch.empty(0, 77), torch.empty(0), 50., 4)
    assert count == 0 and keep.shape == parents.shape == (0, )
