"""Assignment and sampling of boxes for all images of a batch at once, in tensors of fixed shapes.

What MMDetection's ``MaxIoUAssigner``, ``RandomSampler`` and ``DeltaXYWHBBoxCoder`` compute, without what makes the host wait
for the device: numbers read from tensors, ``nonzero``, boolean indices, constants copied from pageable memory. Where images
differ in their number of boxes, they are padded, and masks say which are there.

Shapes: N images, G boxes of ground truth and P priors (anchors or proposals) an image.
"""
from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from mmdet.models.task_modules.assigners import BboxOverlaps2D, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.samplers import BaseSampler, RandomSampler
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .samplers import DeviceRandomSampler

CHUNK = 8  # boxes of ground truth whose overlaps with all anchors are in memory at once


class Boxes(NamedTuple):
    """Boxes of a batch, padded.

    Attributes:
        boxes: (N, G, 4), as x1, y1, x2, y2; G is at least one.
        valid: Which of them are there, (N, G).
        labels: Their classes, (N, G); zero where there are none.
    """
    boxes: Tensor
    valid: Tensor
    labels: Tensor


def on_device(values: Sequence[Any], device: torch.device, dtype: Optional[torch.dtype] = None) -> Tensor:
    """A small tensor of numbers that the host knows. It does not wait, as ``torch.tensor(values, device=device)`` does."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def pad_boxes(instances: Sequence[Optional[InstanceData]], like: Tensor) -> Boxes:
    """The boxes and labels of each image's instances, in float32 and on the device of ``like``."""
    boxes = [like.new_zeros(0, 4, dtype=torch.float32) if each is None else
             get_box_tensor(each.bboxes).to(like.device, torch.float32).view(-1, 4) for each in instances]
    labels = [each.labels if each is not None and 'labels' in each else like.new_zeros(len(box), dtype=torch.long)
              for each, box in zip(instances, boxes)]
    boxes, counts = [*boxes, like.new_zeros(1, 4, dtype=torch.float32)], [len(box) for box in boxes]
    padded = pad_sequence(boxes, batch_first=True)[:-1]
    labels = pad_sequence([*labels, like.new_zeros(1, dtype=torch.long)], batch_first=True)[:-1]
    valid = torch.arange(padded.shape[1], device=like.device) < on_device(counts, like.device)[:, None]
    return Boxes(padded, valid, labels)


def overlaps(a: Tensor, b: Tensor, of_first: bool = False) -> Tensor:
    """IoU of (..., A, 4) with (..., B, 4): (..., A, B); or the share of the first ones' area (IoF)."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = (torch.min(a[..., 2], b[..., 2]) - torch.max(a[..., 0], b[..., 0])).clamp(min=0)
    height = (torch.min(a[..., 3], b[..., 3]) - torch.max(a[..., 1], b[..., 1])).clamp(min=0)
    shared = width.mul_(height)
    area = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    if not of_first:
        area = area + (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) - shared
    return shared / area.clamp(min=1e-6)


def assign(assigner: MaxIoUAssigner, priors: Tensor, gts: Boxes, ignored: Boxes, usable: Optional[Tensor] = None) -> Tensor:
    """What each prior is: 0 for background, k for the k-th box of ground truth, -1 for neither.

    Args:
        priors: (P, 4), the same in all images, or (N, P, 4).
        ignored: Regions of which no prior may become background.
        usable: Priors that exist in each image, (N, P); None if all do. The others get -1.

    Returns:
        (N, P), int64.
    """
    images, count, *_ = gts.boxes.shape
    best = priors.new_full((images, priors.shape[-2]), -2.)
    assigned = torch.full_like(best, -1, dtype=torch.long)
    matched, of = torch.zeros_like(assigned), torch.zeros_like(assigned)
    hidden = torch.zeros_like(best, dtype=torch.bool) if usable is None else ~usable
    if assigner.ignore_iof_thr > 0:
        if assigner.ignore_wrt_candidates:
            shares = overlaps(priors, ignored.boxes, of_first=True).mT
        else:
            shares = overlaps(ignored.boxes, priors, of_first=True)
        hidden = hidden | ((shares > assigner.ignore_iof_thr) & ignored.valid[..., None]).any(1)
    for start in range(0, count, CHUNK):
        part, valid = slice(start, start + CHUNK), gts.valid[:, start:start + CHUNK]
        values = overlaps(gts.boxes[:, part], priors).masked_fill_(hidden[:, None], -1.)
        values.masked_fill_(~valid[..., None], -2.)
        most, which = values.max(1)
        better = most > best
        best, of = torch.where(better, most, best), torch.where(better, which + start, of)
        if assigner.match_low_quality:
            tops, first = values.max(2)
            if assigner.gt_max_assign_all:
                matches = values == tops[..., None]
            else:
                matches = torch.zeros_like(values, dtype=torch.bool).scatter_(2, first[..., None], True)
            matches &= (valid & (tops >= assigner.min_pos_iou))[..., None]
            numbers = torch.arange(start + 1, start + 1 + values.shape[1], device=values.device)
            matched = torch.where(matches, numbers[:, None], 0).amax(1).maximum(matched)  # the last of them has it
    low, high = assigner.neg_iou_thr if isinstance(assigner.neg_iou_thr, tuple) else (0., assigner.neg_iou_thr)
    assigned = torch.where((best >= low) & (best < high), 0, assigned)
    assigned = torch.where(best >= assigner.pos_iou_thr, of + 1, assigned)
    assigned = torch.where(matched > 0, matched, assigned)
    assigned = torch.where(gts.valid.any(1, keepdim=True), assigned, 0)
    return assigned if usable is None else torch.where(usable, assigned, -1)


class Samples(NamedTuple):
    """Priors of each image that were chosen, at most ``num`` of the sampler, positive ones first.

    Attributes:
        index: Of the priors, (N, S).
        positive, negative: Which of them are; the rest fill up.
        slots: The positive ones are among this many first.
    """
    index: Tensor
    positive: Tensor
    negative: Tensor
    slots: int


def sample(sampler: BaseSampler, assigned: Tensor) -> Samples:
    """Choose at random, each subset as likely as any other, as ``RandomSampler`` does for one image after another.

    Args:
        assigned: As of :func:`assign`, (N, P).
    """
    positive, negative = assigned > 0, assigned == 0
    total, slots = (min(number, assigned.shape[1]) for number in (sampler.num, int(sampler.num * sampler.pos_fraction)))
    keys = torch.rand(assigned.shape, device=assigned.device)
    if slots < assigned.shape[1]:
        top, index = torch.where(positive, keys, -1.).topk(slots)
        positive = torch.zeros_like(positive).scatter_(1, index, top >= 0)
    keys, index = torch.where(positive, keys + 1, torch.where(negative, keys, -1.)).topk(total)
    positive, negative = keys >= 1, (keys >= 0) & (keys < 1)
    if sampler.neg_pos_ub >= 0:
        found = positive.sum(1, keepdim=True)
        negative &= torch.arange(total, device=keys.device) - found < (found.clamp(min=1) * sampler.neg_pos_ub).floor()
    return Samples(index, positive, negative, slots)


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values[n, index[n, s]]`` of (N, P) or (N, P, C) for (N, S)."""
    return values.gather(1, index) if values.dim() == 2 else values.gather(1, index[..., None].expand(
        -1, -1, values.shape[2]))


def encode(coder: DeltaXYWHBBoxCoder, boxes: Tensor, gts: Tensor) -> Tensor:
    """Deltas from boxes to those of the ground truth, (..., 4)."""
    px, py = (boxes[..., 0] + boxes[..., 2]) * .5, (boxes[..., 1] + boxes[..., 3]) * .5
    pw, ph = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    gx, gy = (gts[..., 0] + gts[..., 2]) * .5, (gts[..., 1] + gts[..., 3]) * .5
    gw, gh = gts[..., 2] - gts[..., 0], gts[..., 3] - gts[..., 1]
    deltas = (gx - px) / pw, (gy - py) / ph, torch.log(gw / pw), torch.log(gh / ph)
    return torch.stack([(d - mean) / std for d, mean, std in zip(deltas, coder.means, coder.stds)], -1)


def decode(coder: DeltaXYWHBBoxCoder, boxes: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """Boxes moved by deltas, (N, S, 4), within images of the widths and heights of ``limits``, (N, 2)."""
    dx, dy, dw, dh = (d * std + mean for d, mean, std in zip(deltas.unbind(-1), coder.means, coder.stds))
    centre, size = (boxes[..., :2] + boxes[..., 2:]) * .5, boxes[..., 2:] - boxes[..., :2]
    most = abs(float(np.log(16 / 1000)))
    centre = centre + size * torch.stack([dx, dy], -1)
    half = size * torch.stack([dw, dh], -1).clamp(min=-most, max=most).exp() * .5
    moved = torch.cat([centre - half, centre + half], -1)
    if coder.clip_border:
        limits = limits.to(moved.dtype)[:, None]
        moved = moved.clamp(min=0).minimum(torch.cat([limits, limits], -1))
    return moved


def unsupported(assigner: Any, sampler: Any, coder: Any) -> List[str]:
    """Names of the classes, or settings of them, that the functions of this file do not stand in for."""
    problems = [type(each).__name__ for each, known in [(assigner, (MaxIoUAssigner, )), (coder, (DeltaXYWHBBoxCoder, )),
                                                        (sampler, (RandomSampler, DeviceRandomSampler))]
                if type(each) not in known]
    if problems:
        return problems
    calculator = assigner.iou_calculator
    if type(calculator) is not BboxOverlaps2D or calculator.dtype is not None:
        problems.append('iou_calculator')
    if getattr(assigner, 'perm_repeat_gt_cfg', None) is not None:
        problems.append('perm_repeat_gt_cfg')
    if coder.add_ctr_clamp:
        problems.append('add_ctr_clamp')
    return problems


def image_sizes(metas: Sequence[dict], device: torch.device) -> Tensor:
    """Width and height of the images, (N, 2)."""
    return on_device([meta['img_shape'][1::-1] for meta in metas], device)
