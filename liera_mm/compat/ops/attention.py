"""Multi-scale deformable attention (Zhu et al. 2021, eq. 3).

Shapes: N images, S pixels of L levels in a row, M heads of D channels, Q queries, P points a level; value (N, S, M, D),
spatial shapes (L, 2) as height, width, sampling locations (N, Q, M, L, P, 2) as x, y from 0 to 1, attention weights
(N, Q, M, L, P), output (N, Q, M * D). Half precision is computed in float32.
"""
from typing import Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import same_precision


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Weighted sums of the values at the locations, with zeros around every level: (N, Q, M * D).

    Levels follow each other without gaps, so ``value_level_start_index`` isn't used; nor is ``im2col_step``.
    """
    images, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    operands = same_precision(value, sampling_locations, attention_weights)
    output = operands[0].new_zeros(images * heads, channels, queries)
    for _, _, pixels, grid, weights in _levels(value_spatial_shapes, *operands):
        output += (_sample(pixels, grid) * weights).sum(-1)
    return output.view(images, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Gradients of :func:`ms_deform_attn_forward`: overwrites the three of them."""
    images, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    *operands, grad = same_precision(value, sampling_locations, attention_weights, grad_output)
    grad = grad.view(images, queries, heads, channels).permute(0, 2, 3, 1).reshape(images * heads, channels, queries, 1)
    for level, (start, end, pixels, grid, weights) in enumerate(_levels(value_spatial_shapes, *operands)):
        dweights = (_sample(pixels, grid) * grad).sum(1)
        grad_attn_weight[:, :, :, level] = dweights.view(images, heads, queries, points).transpose(1, 2)
        dpixels, dgrid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weights, pixels, grid, 0, 0, False, [True, True])
        grad_value[:, start:end] = dpixels.view(images, heads, channels, end - start).permute(0, 3, 1, 2)
        # The grid is twice the location, minus one.
        grad_sampling_loc[:, :, :, level] = 2 * dgrid.view(images, heads, queries, points, 2).transpose(1, 2)


def _levels(shapes: Tensor, value: Tensor, locations: Tensor,
            weights: Tensor) -> Iterator[Tuple[int, int, Tensor, Tensor, Tensor]]:
    """Every level's first pixel and the one after its last, and what :func:`grid_sample` takes, a head being an image:

    pixels (N * M, D, H, W), grid (N * M, Q, P, 2) from -1 to 1, and weights (N * M, 1, Q, P).
    """
    start = 0
    for level, (height, width) in enumerate(shapes.tolist()):
        end = start + height * width
        pixels = value[:, start:end].permute(0, 2, 3, 1).reshape(-1, value.shape[3], height, width)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        yield start, end, pixels, grid, weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        start = end


def _sample(pixels: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(pixels, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
