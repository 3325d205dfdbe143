"""Which of many overlapping boxes stay."""
from typing import List

import torch
from torch import Tensor

from .precision import same_precision


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes (Tensor): (N, 4) as x1, y1, x2, y2 in pixels.
        scores (Tensor): (N,).
        iou_threshold (float): A box is dropped if its IoU with a better one is larger than this.
        offset (int): 0 or 1, added to every width and height.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes, best first; equal scores in the order of the input.
    """
    boxes, scores = same_precision(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    # torchvision compares with a double; an IoU of exactly 0.3 in float32 is above that, and mmcv keeps the box.
    iou_threshold = torch.tensor(iou_threshold, dtype=boxes.dtype, device='cpu').item()
    if boxes.is_cuda:  # where torchvision takes milliseconds for the boxes of one image
        from ...core.kernels import ops_for
        return ops_for(boxes).nms(boxes, scores, iou_threshold)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Soft-NMS: lowers the scores of overlapping boxes instead of dropping them.

    As in mmcv, the best box stays even if its score is below ``min_score``. Two empty boxes don't overlap.

    Args:
        boxes (Tensor): (N, 4) as x1, y1, x2, y2 in pixels, on the CPU.
        scores (Tensor): (N,).
        dets (Tensor): (N, 5), its first K rows are overwritten by the kept boxes and their new scores.
        iou_threshold (float): Methods 0 and 1 leave scores alone at a smaller IoU.
        sigma (float): Width of method 2's Gaussian.
        min_score (float): A box is dropped once its score is smaller.
        method (int): What to multiply a score with: 0 (naive) 0, 1 (linear) 1 - IoU, 2 (Gaussian) exp(-IoU² / sigma).
        offset (int): 0 or 1, added to every width and height.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes, best first.
    """
    boxes, scores = same_precision(boxes, scores)
    scores = scores.clone()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1)
    # Positions of the boxes that are left. They move as in mmcv's loop, since the first of equal scores goes first.
    order = torch.arange(len(boxes), device=boxes.device)
    keep = []
    while len(order):
        best = scores[order].argmax()
        i = int(order[best])
        keep.append(i)
        order[best] = order[0]
        order = order[1:]
        others = boxes[order]
        sizes = torch.minimum(boxes[i, 2:], others[:, 2:]) - torch.maximum(boxes[i, :2], others[:, :2]) + offset
        overlap = sizes.clamp(min=0).prod(dim=1)
        iou = (overlap / (areas[i] + areas[order] - overlap)).nan_to_num(0)
        if method == 2:
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        new_scores = scores[order] * weight
        scores[order] = new_scores
        alive = new_scores >= min_score
        count = int(alive.sum())
        # mmcv puts the last box in the place of a dropped one.
        order, tail = order[:count], order[count:][alive[count:]]
        order[~alive[:count]] = tail.flip(0)
    keep = torch.tensor(keep, dtype=torch.long, device=boxes.device)
    dets[:len(keep)] = torch.cat([boxes[keep], scores[keep, None]], dim=1)
    return keep


def nms_match(dets: Tensor, iou_threshold: float) -> List[List[int]]:
    """Groups of boxes that overlap.

    Args:
        dets (Tensor): (N, 5) as x1, y1, x2, y2, score.
        iou_threshold (float): A box belongs to the best one whose IoU with it is this or larger.

    Returns:
        list[list[int]]: Indices of the boxes of each group, best first, as the groups are.
    """
    dets, = same_precision(dets.cpu())
    areas = (dets[:, 2:4] - dets[:, :2]).prod(dim=1)
    order = dets[:, 4].sort(descending=True, stable=True).indices
    groups = []
    while len(order):
        i, others = order[0], order[1:]
        sizes = torch.minimum(dets[i, 2:4], dets[others, 2:4]) - torch.maximum(dets[i, :2], dets[others, :2])
        overlap = sizes.clamp(min=0).prod(dim=1)
        same = overlap / (areas[i] + areas[others] - overlap) >= torch.tensor(iou_threshold, dtype=dets.dtype)
        groups.append([int(i), *others[same].tolist()])
        order = others[~same]
    return groups


def line_nms_forward(boxes: Tensor, scores: Tensor, thresh: float, top_k: int) -> List[Tensor]:
    """Non-maximum suppression of lane lines (Zheng et al. 2022), by their mean distance where both exist.

    Args:
        boxes (Tensor): (N, 5 + R) as two numbers that aren't used, the start from 0 to 1, one more that isn't used, the
            length in rows, and the x of the line in each of R rows, in pixels.
        scores (Tensor): (N,).
        thresh (float): A line is dropped if its distance from a better one is smaller than this, in pixels.
        top_k (int): How many lines to keep at most.

    Returns:
        list[Tensor]: (N,) int64, indices of the kept lines, best first, then zeros; their number, (); and (N,) int64, the
        place plus one among the kept lines of the last that a line is near to, 0 if there was none.
    """
    rows = boxes.shape[1] - 5
    lines, order = same_precision(boxes)[0], scores.sort(descending=True, stable=True).indices
    first = (lines[:, 2] * (rows - 1) + .5).int()
    last = first + lines[:, 4].int() - 1
    row = torch.arange(rows, device=boxes.device)
    keep, parents = torch.zeros_like(order), torch.zeros_like(order)
    count = 0
    alive = torch.ones_like(order, dtype=torch.bool)
    for place, i in enumerate(order.tolist()):
        if not alive[place]:
            continue
        if count == top_k:
            break
        keep[count] = i
        count += 1
        others = order[place + 1:]
        start = first[others].clamp(min=int(first[i]))
        end = last[others].clamp(max=min(int(last[i]), rows - 1))
        both = (row >= start[:, None]) & (row <= end[:, None])
        distance = ((lines[others, 5:] - lines[i, 5:]).abs() * both).sum(dim=1)
        near = (distance < thresh * (end - start + 1)) & (start >= 0) & (end >= start)
        alive[place + 1:] &= ~near
        parents[others[near]] = parents[i] = count
    return [keep, torch.tensor(count, device=boxes.device), parents]
