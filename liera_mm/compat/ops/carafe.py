"""Content-aware reassembly of features (Wang et al. 2019, eq. 2).

Shapes: features (N, C, H, W), masks (N, G * k * k, sH, sW), output (N, C, sH, sW), for s times upsampling with kernels of
k × k pixels, one for each of G groups of channels. Half precision is computed in float32.
"""
from typing import Iterator, Tuple

import torch.nn.functional as F
from torch import Tensor

from .precision import same_precision


def carafe_naive_forward(features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int,
                         scale_factor: int) -> None:
    """Every pixel of the output is the sum of the features around it, weighted by the mask: overwrites ``output``."""
    wide_features, wide_masks = same_precision(features, masks)
    total = 0
    for pixels, weights, _ in _taps(wide_features, wide_masks, kernel_size, group_size, scale_factor):
        total = total + pixels * weights
    output.copy_(total.reshape(output.shape))


def carafe_naive_backward(top_grad: Tensor, features: Tensor, masks: Tensor, bottom_grad: Tensor, mask_grad: Tensor,
                          kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Gradients of :func:`carafe_naive_forward`: overwrites ``bottom_grad`` and ``mask_grad``."""
    grad, wide_features, wide_masks = same_precision(top_grad, features, masks)
    n, c, h, w = features.shape
    grad = grad.reshape(n, group_size, c // group_size, h, scale_factor, w, scale_factor)
    around = (kernel_size - 1) // 2
    padded_grad = F.pad(wide_features.new_zeros(features.shape), [around] * 4)
    mask_grads = mask_grad.view(n, group_size, kernel_size**2, h, scale_factor, w, scale_factor)
    for tap, (pixels, weights, (top, left)) in enumerate(
            _taps(wide_features, wide_masks, kernel_size, group_size, scale_factor)):
        mask_grads[:, :, tap] = (grad * pixels).sum(2)
        padded_grad[:, :, top:top + h, left:left + w] += (grad * weights).sum((4, 6)).view(n, c, h, w)
    bottom_grad.copy_(padded_grad[:, :, around:around + h, around:around + w])


def carafe_forward(features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor, output: Tensor,
                   kernel_size: int, group_size: int, scale_factor: int) -> None:
    """As :func:`carafe_naive_forward`. mmcv keeps ``rfeatures``, and not the features, for :func:`carafe_backward`."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(top_grad: Tensor, rfeatures: Tensor, masks: Tensor, rtop_grad: Tensor, rbottom_grad_hs: Tensor,
                    rbottom_grad: Tensor, rmask_grad: Tensor, bottom_grad: Tensor, mask_grad: Tensor, kernel_size: int,
                    group_size: int, scale_factor: int) -> None:
    """As :func:`carafe_naive_backward`, of the features that :func:`carafe_forward` left in ``rfeatures``."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _taps(features: Tensor, masks: Tensor, kernel_size: int, groups: int,
          scale: int) -> Iterator[Tuple[Tensor, Tensor, Tuple[int, int]]]:
    """For every tap: its pixels (N, G, C / G, H, 1, W, 1), weights (N, G, 1, H, s, W, s), and where it starts if padded."""
    n, c, h, w = features.shape
    padded = F.pad(features, [(kernel_size - 1) // 2] * 4)
    masks = masks.reshape(n, groups, kernel_size**2, h, scale, w, scale)
    for tap in range(kernel_size**2):
        top, left = divmod(tap, kernel_size)
        pixels = padded[:, :, top:top + h, left:left + w].reshape(n, groups, c // groups, h, 1, w, 1)
        yield pixels, masks[:, :, None, tap], (top, left)
