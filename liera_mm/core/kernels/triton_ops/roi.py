"""Features of regions of an image, for all levels of a feature pyramid."""
from typing import List, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import power_of_2


@triton.jit
def _place(start, size, bin, i, samples, bins, length):
    """Where a sample lies along an axis: the pixels before and after it, and their weights, zero outside of the image."""
    at = start + (bin + (i + .5) / samples) * size / bins
    inside = tl.where(at >= -1., 1., 0.) * tl.where(at <= length, 1., 0.)
    at = tl.minimum(tl.maximum(at, 0.), length - 1.)
    low = at.to(tl.int32)
    return low, tl.minimum(low + 1, length - 1), (low + 1 - at) * inside, (at - low) * inside


@triton.jit
def _pool(x, rois, levels, out, level, scale, H, W, C, BINS: tl.constexpr, BC: tl.constexpr, BACKWARD: tl.constexpr):
    """One bin of a RoI. Backward, ``out`` is the gradient of the bin, which is added to that of the pixels, ``x``."""
    roi, ch = tl.program_id(0), tl.arange(0, BC)
    if tl.load(levels + roi) == level:
        row, col = tl.program_id(1) // BINS, tl.program_id(1) % BINS
        x += tl.load(rois + roi * 5).to(tl.int64) * H * W * C
        x1 = tl.load(rois + roi * 5 + 1).to(tl.float32) * scale - .5
        y1 = tl.load(rois + roi * 5 + 2).to(tl.float32) * scale - .5
        width = tl.load(rois + roi * 5 + 3).to(tl.float32) * scale - .5 - x1
        height = tl.load(rois + roi * 5 + 4).to(tl.float32) * scale - .5 - y1
        columns, rows = tl.ceil(width / BINS).to(tl.int32), tl.ceil(height / BINS).to(tl.int32)
        share = 1. / tl.maximum(columns * rows, 1)
        at = out + (roi.to(tl.int64) * BINS * BINS + tl.program_id(1)) * C + ch
        value = tl.zeros((BC, ), tl.float32)
        if BACKWARD:
            value = tl.load(at, ch < C, other=0.).to(tl.float32) * share
        for i in range(rows):
            upper = _place(y1, height, row, i, rows, BINS, H)
            for j in range(columns):
                left = _place(x1, width, col, j, columns, BINS, W)
                for corner in tl.static_range(4):
                    pixel = x + (upper[corner // 2] * W + left[corner % 2]) * C + ch
                    weight = upper[2 + corner // 2] * left[2 + corner % 2]
                    if BACKWARD:
                        tl.atomic_add(pixel, value * weight, ch < C, sem='relaxed')
                    else:
                        value += tl.load(pixel, ch < C, other=0.).to(tl.float32) * weight
        if not BACKWARD:
            tl.store(at, (value * share).to(out.dtype.element_ty), ch < C)


def _launch(x: Tensor, rois: Tensor, levels: Tensor, out: Tensor, level: int, scale: float, backward: bool) -> None:
    _, height, width, channels = x.shape
    bins, bc = out.shape[1], power_of_2(channels)
    _pool[(len(rois), bins * bins)](x, rois, levels, out, level, scale, height, width, channels, BINS=bins, BC=bc,
                                    BACKWARD=backward, num_warps=max(1, min(4, bc // 256)))


def roi_pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], bins: int) -> Tensor:
    channels = features[0].shape[3]
    out = torch.empty(len(rois), bins, bins, channels, dtype=features[0].dtype, device=rois.device)
    for level, (x, scale) in enumerate(zip(features, scales)):
        _launch(x, rois, levels, out, level, scale, False)
    return out


def roi_pool_grad(grad: Tensor, shapes: Sequence[torch.Size], rois: Tensor, levels: Tensor,
                  scales: Sequence[float]) -> List[Tensor]:
    results = []
    for level, (shape, scale) in enumerate(zip(shapes, scales)):
        total = torch.zeros(shape, dtype=torch.float32, device=grad.device)
        _launch(total, rois, levels, grad, level, scale, True)
        results.append(total.to(grad.dtype))
    return results
