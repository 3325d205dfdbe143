"""RoIAlign from all levels of a feature pyramid."""
from typing import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops_for


def roi_pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], bins: int) -> Tensor:
    """Features of each RoI: RoIAlign (averages, aligned, as many samples as a bin has pixels) from the level of its own.

    Args:
        features: The levels, (N, C, H, W) each; best with the channels last.
        rois: (K, 5), as image, x1, y1, x2, y2 in pixels of the image. A RoI without extent has zeros.
        levels: Which of the features each RoI is pooled from, (K,).
        scales: Of each level, its pixels per pixel of the image.
        bins: Height and width of the result.

    Returns:
        (K, C, bins, bins), with the channels last.
    """
    features = [each.permute(0, 2, 3, 1).contiguous() for each in features]
    return _RoIPool.apply(rois.contiguous(), levels, scales, bins, *features).permute(0, 3, 1, 2)


class _RoIPool(torch.autograd.Function):

    @staticmethod
    def forward(ctx, rois, levels, scales, bins, *features):
        ctx.save_for_backward(rois, levels)
        ctx.scales, ctx.shapes = scales, [each.shape for each in features]
        return ops_for(*features).roi_pool(features, rois, levels, scales, bins)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rois, levels = ctx.saved_tensors
        return None, None, None, None, *ops_for(grad).roi_pool_grad(grad.contiguous(), ctx.shapes, rois, levels, ctx.scales)
