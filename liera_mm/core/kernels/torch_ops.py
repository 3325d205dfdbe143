"""The operators behind :mod:`weight` and :mod:`convnext` in plain torch: what the Triton kernels compute.

Shapes: N images, T tokens (pixels) an image, C channels, J hidden channels. Statistics and sums are in float32 or better.
"""
import math
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..factors import at_least_float32, low_rank, rounded
from ..group import SLOPES, UPDATES


def moved_weights(weights: Sequence[Tensor], a: Tensor, b: Tensor, scale: float, rms: Optional[Sequence[Tensor]],
                  update: str, dtype: torch.dtype) -> Tensor:
    """Weights of one shape, moved by Δ = scale / rms · reshape(B A) under an update rule; factors and results stacked."""
    moved = [UPDATES[update](at_least_float32(w), low_rank(*factors, scale / unit, w.shape))
             for w, *factors, unit in zip(weights, a, b, rms or [1] * len(weights))]
    return torch.stack(moved).to(dtype)


def product_grads(weights: Sequence[Tensor], a: Tensor, b: Tensor, scale: float, rms: Optional[Sequence[Tensor]],
                  update: str, grad: Tensor) -> Tensor:
    """The gradients of every product B A from those of the moved weights, all stacked."""
    slopes = [scale / unit * SLOPES[update](at_least_float32(w), low_rank(*factors, scale / unit, w.shape))
              for w, *factors, unit in zip(weights, a, b, rms or [1] * len(weights))]
    grads = torch.stack([at_least_float32(g) * slope for g, slope in zip(grad, slopes)])
    return grads.reshape(len(a), b.shape[1], a.shape[2])


def rescaled(rows: Tensor, norms: Tensor, precision: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Rows scaled to given norms, one each; also the norms that they had. Differentiable by both arguments.

    A row whose norm is zero or no ordinary number stays as it is. Norms that rows had are taken as ``precision`` can hold
    them, so that rows whose norms were stored in it, and are given back, stay as they are bit for bit.
    """
    norm, unit = _norms(rows.detach())
    found = norm * unit
    scaled = _are_scaled(found, precision)
    # The derivative of the branch that where() does not take must be finite too
    norm, _ = _norms(torch.where(scaled[:, None], rows, 1))
    ratio = torch.where(scaled, norms / (norm + (_held(norm, unit, precision) - norm).detach()), unit)
    return rows / unit[:, None] * ratio[:, None], found


def rescaled_grad(rows: Tensor, norms: Tensor, precision: torch.dtype, grad: Tensor) -> Tuple[Tensor, Tensor]:
    """Gradients of the first of :func:`rescaled` by both arguments."""
    norm, unit = _norms(rows)
    scaled, held = _are_scaled(norm * unit, precision), _held(norm, unit, precision)
    normal = torch.where(scaled[:, None], rows / unit[:, None], 0)
    dnorms = torch.where(scaled, (at_least_float32(grad) * normal).sum(1) / held, 0)
    ratio = torch.where(scaled, norms / held / unit, 1)
    pull = torch.where(scaled, dnorms * norms / held / norm / unit, 0)
    return grad * ratio[:, None] - normal * pull[:, None], dnorms


def _norms(rows: Tensor) -> Tuple[Tensor, Tensor]:
    """Euclidean norms of rows and the units they are in, powers of two in which no square over- or underflows.

    The unit is one for ordinary rows. Units have no derivative.
    """
    _, exponent = math.frexp(torch.finfo(rows.dtype).max)
    largest = rows.detach().abs().amax(1)
    unit = torch.where(largest < 2.**(-exponent // 4), 2.**(-exponent * 5 // 8), torch.ones_like(largest))
    unit = torch.where(largest > 2.**(exponent // 4), 2.**(exponent * 5 // 8), unit)
    return (rows / unit[:, None]).norm(dim=1), unit


def _are_scaled(norm: Tensor, precision: torch.dtype) -> Tensor:
    return (norm >= torch.finfo(precision).tiny) & norm.isfinite()


def _held(norm: Tensor, unit: Tensor, precision: torch.dtype) -> Tensor:
    """Norms, in units, as a precision can hold them."""
    return norm if precision == norm.dtype else rounded(norm * unit, precision) / unit


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last dimension; also the mean and the reciprocal deviation of every token."""
    wide = at_least_float32(x)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return ((wide - mean) * rstd * weight + bias).to(x.dtype), mean, rstd


def layer_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, params: bool,
                    output: bool) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Gradients of :func:`layer_norm` by its input and, if asked for, by its weight and bias; and its output again."""
    grad, normed = at_least_float32(dy), (x - mean) * rstd
    inner = grad * weight
    dx = (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True)) * rstd
    tokens = tuple(range(x.dim() - 1))
    dw, db = ((grad * normed).sum(tokens), grad.sum(tokens)) if params else (None, None)
    return dx.to(x.dtype), dw, db, (normed * weight + bias).to(x.dtype) if output else None


def gelu(hidden: Tensor, bias: Tensor, squares: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """GELU of ``hidden + bias``, (N, T, J); if asked for, sums of its squares over parts of the tokens, (N, parts, J)."""
    out = F.gelu(hidden + bias).to(hidden.dtype)
    return out, at_least_float32(out).square().sum(1, keepdim=True) if squares else None


def gelu_grad(dg: Tensor, hidden: Tensor, bias: Tensor, pull: Optional[Tensor],
              bias_grad: bool) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradient of ``hidden`` from that of its GELU, ``dg + pull · GELU``; and that of the bias, if asked for.

    ``dg`` may be overwritten. ``pull`` is (N, J), or None for zero.
    """
    value, grad = at_least_float32(hidden) + bias, at_least_float32(dg)
    cdf = .5 * (1 + torch.erf(value * math.sqrt(.5)))
    if pull is not None:
        grad = grad + pull[:, None] * (value * cdf)
    grad = grad * (cdf + value * torch.exp(-.5 * value.square()) / math.sqrt(2 * math.pi))
    return grad.to(hidden.dtype), grad.sum((0, 1)) if bias_grad else None


def response(squares: Tensor, weight: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """Norms of the hidden channels of every image, (N, J), and what global response normalisation multiplies them by."""
    norms = squares.sum(1).sqrt()
    return norms, 1 + weight * norms / (norms.mean(1, keepdim=True) + eps)


def response_grad(dgains: Tensor, weight: Tensor, norms: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """From the gradient of the gains, (parts, N, J): that of the norms over the norms, and that of the weight by image."""
    grad, mean = dgains.sum(0), norms.mean(1, keepdim=True) + eps
    scaled = grad * weight
    dnorms = (scaled - (scaled * norms).mean(1, keepdim=True) / mean) / mean
    return torch.where(norms > 0, dnorms / norms, 0.), grad * norms / mean


def scaled_weights(images: int, weight: Tensor, rows: Optional[Tensor], cols: Optional[Tensor],
                   beta: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """A copy of a weight (C, J) for each image, its rows scaled by (N, C) and its columns by (N, J); None is 1.

    And the product of the weight with ``beta``, (J,), in parts: (parts, C).
    """
    out = weight.expand(images, -1, -1)
    out = out if cols is None else out * cols[:, None]
    out = out if rows is None else out * rows[..., None]
    return out.to(weight.dtype), None if beta is None else (at_least_float32(weight) @ beta)[None]


def weight_grad(products: Tensor, weight: Tensor, rows: Optional[Tensor], cols: Optional[Tensor], tokens: Optional[Tensor],
                beta: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    """Gradients of :func:`scaled_weights` by the weight, (C, J), and by ``cols`` in parts, (parts, N, J).

    Args:
        products: Gradients of the copies, (N, C, J).
        tokens: Gradients of the sum with ``beta`` in every image, (N, C), before ``rows``.
    """
    products = at_least_float32(products)
    if rows is not None:
        products = products * rows[..., None]
        tokens = None if tokens is None else tokens * rows
    dgains = None if cols is None else (products * weight).sum(1)[None]
    total = (products if cols is None else products * cols[:, None]).sum(0)
    if beta is not None:
        total = total + tokens.sum(0)[:, None] * beta
    return total.to(weight.dtype), dgains


def residual(x: Tensor, z: Tensor, bias: Tensor, sums: Optional[Tensor], rows: Optional[Tensor]) -> Tensor:
    """x + z + rows · (bias + sums): (N, H, W, C) twice, (C,), (parts, C) and (N, C)."""
    constants = bias if sums is None else bias + sums.sum(0)
    return (x + z + (constants if rows is None else (constants * rows)[:, None, None])).to(z.dtype)


def depthwise(x: Tensor, taps: Tensor, bias: Optional[Tensor], add: Optional[Tensor], flip: bool) -> Tensor:
    """Depthwise convolution of (N, H, W, C) with taps (7 · 7, C), which flip for the gradient by the input; plus ``add``."""
    weight = (taps.flip(0) if flip else taps).T.reshape(-1, 1, 7, 7)
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3, groups=len(weight)).permute(0, 2, 3, 1)
    return (out if add is None else out + add).contiguous()


def depthwise_weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient by the weight, (C, 7 · 7), in the dtype of ``x``."""
    grad = torch.nn.grad.conv2d_weight(
        x.permute(0, 3, 1, 2), (x.shape[3], 1, 7, 7), dy.permute(0, 3, 1, 2), padding=3, groups=x.shape[3])
    return grad.flatten(1)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes, (N, 4), that no better one overlaps by an IoU above the threshold, best first."""
    return torch.ops.torchvision.nms(boxes, scores, threshold)


def nms_kept(boxes: Tensor, threshold: float) -> Tensor:
    """Which boxes of each row, (R, K, 4), best first, no better one of that row overlaps by an IoU above the threshold."""
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    scores = torch.arange(boxes.shape[1], 0, -1, dtype=boxes.dtype, device=boxes.device)
    for row, each in zip(kept, boxes):
        row[nms(each, scores, threshold)] = True
    return kept


def roi_pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor, scales: Sequence[float], bins: int) -> Tensor:
    """RoIAlign of every RoI, (K, 5), from its level, (N, H, W, C): (K, bins, bins, C)."""
    align = torch.ops.torchvision.roi_align
    return sum(align(each.permute(0, 3, 1, 2), _of_level(rois, levels == level, each.dtype), scale, bins, bins, 0, True)
               for level, (each, scale) in enumerate(zip(features, scales))).permute(0, 2, 3, 1)


def roi_pool_grad(grad: Tensor, shapes: Sequence[torch.Size], rois: Tensor, levels: Tensor,
                  scales: Sequence[float]) -> List[Tensor]:
    """Gradients of :func:`roi_pool` by the levels."""
    backward, bins, grad = torch.ops.torchvision._roi_align_backward, grad.shape[1], grad.permute(0, 3, 1, 2)
    return [backward(grad, _of_level(rois, levels == level, grad.dtype), scale, bins, bins, images, channels, height, width,
                     0, True).permute(0, 2, 3, 1)
            for level, ((images, height, width, channels), scale) in enumerate(zip(shapes, scales))]


def _of_level(rois: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Those RoIs; the others without extent, and so without a pixel."""
    return torch.cat([rois[:, :1], rois[:, 1:] * mask[:, None]], 1).to(dtype)
