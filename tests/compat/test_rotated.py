"""Rotated boxes against clipping, edge by edge."""
import math

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, box_iou_rotated, nms_rotated
from operators import DEVICES, HALVES, fallback_only, tensors


def corners(box):
    x, y, width, height, angle = box
    return [(x + dx * width / 2 * math.cos(angle) - dy * height / 2 * math.sin(angle),
             y + dx * width / 2 * math.sin(angle) + dy * height / 2 * math.cos(angle))
            for dx, dy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


def reference_iou(a, b, over_first=False):
    """Cuts the first box at every side of the second one."""
    shape, sides = corners(a), corners(b)
    for (x1, y1), (x2, y2) in zip(sides, sides[1:] + sides[:1]):
        depth = [(x2 - x1) * (y - y1) - (y2 - y1) * (x - x1) for x, y in shape]
        kept = []
        for i, (p, d) in enumerate(zip(shape, depth)):
            q, e = shape[(i + 1) % len(shape)], depth[(i + 1) % len(shape)]
            if d >= 0:
                kept.append(p)
            if d * e < 0:
                kept.append(tuple(u + (v - u) * d / (d - e) for u, v in zip(p, q)))
        shape = kept
    shared = sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(shape, shape[1:] + shape[:1])) / 2
    return shared / (a[2] * a[3] + (0 if over_first else b[2] * b[3] - shared))


def rotated_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 40, (count, 2)), rng.uniform(3, 25, (count, 2)),
                           rng.uniform(-4, 4, (count, 1))], 1)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_iou(mode, dtype, tolerance, device):
    a, b = rotated_boxes(20), rotated_boxes(15, seed=1)
    expected = np.array([[reference_iou(p, q, mode == 'iof') for q in b.tolist()] for p in a.tolist()])
    a, b = (t.to(dtype) for t in tensors(device, a, b))
    np.testing.assert_allclose(box_iou_rotated(a, b, mode).cpu(), expected, atol=tolerance)
    np.testing.assert_allclose(box_iou_rotated(a[:15], b, mode, aligned=True).cpu(), expected.diagonal(), atol=tolerance)
    assert (expected > .1).sum() > 20 and (expected == 0).sum() > 20


@pytest.mark.parametrize('device', DEVICES)
def test_boxes_with_common_sides(device):
    boxes = rotated_boxes(30)
    boxes[:, :2] *= 30  # as far from the origin as in a picture
    same, turned, half, beside = (boxes.copy() for _ in range(4))
    turned[:, 4] += math.pi
    half[:, 2] /= 2
    beside[:, 0] += boxes[:, 2] * np.cos(boxes[:, 4])
    beside[:, 1] += boxes[:, 2] * np.sin(boxes[:, 4])
    for others, expected in ((same, 1), (turned, 1), (half, .5), (beside, 0)):
        ious = box_iou_rotated(*(t.float() for t in tensors(device, boxes, others)), aligned=True)
        np.testing.assert_allclose(ious.cpu(), expected, atol=1e-3)


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
def test_no_boxes_and_no_area(device):
    boxes, = tensors(device, rotated_boxes(3))
    assert box_iou_rotated(boxes, boxes[:0]).shape == (3, 0)
    boxes[:, 2] = 0
    assert not box_iou_rotated(boxes, boxes).any()


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES])
@pytest.mark.parametrize('labelled', [False, True])
def test_nms(labelled, dtype, device):
    boxes, = tensors('cpu', rotated_boxes(40))
    boxes = boxes.to(dtype)
    labels, scores = torch.arange(40) % 3, torch.linspace(.1, 1, 40)[torch.randperm(40)]
    keep = []
    for i in scores.argsort(descending=True).tolist():
        if all(reference_iou(boxes[i].tolist(), boxes[j].tolist()) <= .25 for j in keep
               if not labelled or labels[i] == labels[j]):
            keep.append(i)
    inputs = [t.to(device) for t in (boxes, scores)] + [labels.to(device)] * labelled
    dets, kept = nms_rotated(*inputs[:2], .25, *inputs[2:])
    assert kept.tolist() == keep and len(keep) < 40 and kept.device.type == device
    assert torch.equal(dets[:, :5].cpu(), boxes[keep].to(dets.dtype).cpu())


@fallback_only
@pytest.mark.parametrize('device', DEVICES)
def test_batched_nms(device):
    boxes, = tensors(device, rotated_boxes(40))
    labels, scores = torch.arange(40, device=device) % 3, torch.linspace(.1, 1, 40, device=device, dtype=torch.float64)
    kept = batched_nms(boxes, scores, labels, dict(type='nms_rotated', iou_threshold=.25))[1]
    assert torch.equal(kept, nms_rotated(boxes, scores, .25, labels)[1])
