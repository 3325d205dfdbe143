"""Rotated boxes, as x, y of the centre, width, height in pixels and an angle in radians, from the x to the y axis."""
import torch
from torch import Tensor

from .precision import same_precision
from .sampling import CHUNK


def box_iou_rotated(boxes1: Tensor, boxes2: Tensor, ious: Tensor, mode_flag: int, aligned: bool) -> None:
    """Overlaps of rotated boxes; 0 where one has no area.

    Args:
        boxes1 (Tensor): (N, 5).
        boxes2 (Tensor): (M, 5), or (N, 5) if ``aligned``.
        ious (Tensor): (N * M,), or (N,) if ``aligned``, overwritten by the intersection's area over the union's.
        mode_flag (int): 1 for over the area of the first box instead.
    """
    boxes1, boxes2 = same_precision(boxes1, boxes2)
    overlaps = _overlaps(boxes1, boxes2, mode_flag) if aligned else _pairwise_overlaps(boxes1, boxes2, mode_flag)
    ious.copy_(overlaps.view(ious.shape))


def nms_rotated(dets: Tensor, scores: Tensor, order: Tensor, dets_sorted: Tensor, labels: Tensor, iou_threshold: float,
                multi_label: bool) -> Tensor:
    """Greedy non-maximum suppression of rotated boxes.

    Args:
        dets (Tensor): (N, 5), or (N, 6) with a label at the end, if ``multi_label``.
        scores (Tensor): Not used, nor are ``labels``.
        order (Tensor): (N,) int64, the boxes from best to worst.
        dets_sorted (Tensor): ``dets`` in this order.
        iou_threshold (float): A box is dropped if its IoU with a better one, of the same label, is larger.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes, best first.
    """
    boxes, = same_precision(dets_sorted)
    hides = _pairwise_overlaps(boxes[:, :5], boxes[:, :5], 0) > iou_threshold
    if multi_label:
        hides &= boxes[:, None, 5] == boxes[:, 5]
    hides, kept = hides.cpu(), torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1:] &= ~hides[i, i + 1:]
    return order[kept.to(order.device)]


def _pairwise_overlaps(boxes1: Tensor, boxes2: Tensor, mode: int) -> Tensor:
    """(N, 5), (M, 5) -> (N, M), a few rows at a time."""
    result = boxes1.new_zeros(len(boxes1), len(boxes2))
    rows = max(1, CHUNK // (64 * max(1, len(boxes2))))
    for start in range(0, len(boxes1), rows):
        result[start:start + rows] = _overlaps(boxes1[start:start + rows, None], boxes2, mode)
    return result


def _overlaps(boxes1: Tensor, boxes2: Tensor, mode: int) -> Tensor:
    """(..., 5) twice -> (...)."""
    boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
    middle = (boxes1[..., :2] + boxes2[..., :2]) / 2
    shared = _shared_area(*(_corners(boxes, middle) for boxes in (boxes1, boxes2)))
    area1, area2 = (boxes[..., 2] * boxes[..., 3] for boxes in (boxes1, boxes2))
    real = (area1 >= 1e-14) & (area2 >= 1e-14)
    whole = area1 if mode else area1 + area2 - shared
    return (shared / whole.where(real, 1)).where(real, 0)


def _corners(boxes: Tensor, origin: Tensor) -> Tensor:
    """(..., 5) -> (..., 4, 2), from the x to the y axis."""
    signs = boxes.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
    x, y = (signs * boxes[..., None, 2:4]).unbind(-1)
    cos, sin = boxes[..., 4:].cos(), boxes[..., 4:].sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1) + (boxes[..., :2] - origin)[..., None, :]


def _shared_area(a: Tensor, b: Tensor) -> Tensor:
    """Area of the intersection of convex polygons, (..., 4, 2) twice: of its corners, in the order of their angles."""
    da, db = a.roll(-1, -2) - a, b.roll(-1, -2) - b
    between = b[..., None, :, :] - a[..., None, :]
    turn = _cross(da[..., None, :], db[..., None, :, :])
    along_a, along_b = _cross(between, db[..., None, :, :]) / turn, _cross(between, da[..., None, :]) / turn
    crossing = (along_a >= 0) & (along_a <= 1) & (along_b >= 0) & (along_b <= 1) & (turn != 0)
    crossings = a[..., None, :] + along_a.where(crossing, 0)[..., None] * da[..., None, :]
    points = torch.cat([crossings.flatten(-3, -2), a, b], -2)
    used = torch.cat([crossing.flatten(-2), _inside(a, b, db), _inside(b, a, da)], -1)

    center = (points * used[..., None]).sum(-2, keepdim=True) / used.sum(-1).clamp(min=1)[..., None, None]
    points = (points - center) * used[..., None]
    angles = torch.atan2(points[..., 1], points[..., 0]).where(used, torch.inf)
    order = angles.argsort(-1)
    points = points.gather(-2, order[..., None].expand(points.shape))
    # What isn't used comes last: there the first corner again.
    points = points.where(used.gather(-1, order)[..., None], points[..., :1, :])
    return (_cross(points, points.roll(-1, -2)).sum(-1) / 2).clamp(min=0)


def _inside(points: Tensor, polygon: Tensor, edges: Tensor) -> Tensor:
    """Which points (..., P, 2) lie in a polygon (..., 4, 2), up to rounding."""
    side = _cross(edges[..., None, :, :], points[..., None, :] - polygon[..., None, :, :])
    return (side >= -1e-6 * edges.square().sum(-1)[..., None, :]).all(-1)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
