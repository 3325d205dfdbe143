"""Point-wise spatial attention (Zhao et al. 2018, section 3.3): masks around every pixel become maps of the whole image.

Shapes: masks (N, h_mask * w_mask, H, W), maps (N, H * W, H, W). ``psa_type`` 0, collect, has at [:, j, p] what pixel p gives
to pixel j, and 1, distribute, the same at [:, p, j]; it is 0 where j lies outside of the mask around p.
"""
from typing import Tuple

import torch
from torch import Tensor


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int, h_mask: int,
                    w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Overwrites ``output`` by the maps of the masks ``input``; ``num_`` isn't used."""
    place, inside = _places(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, input.device)
    maps = input.flatten(2).gather(1, place.expand(len(input), -1, -1)) * inside
    output.copy_((maps.mT if psa_type else maps).reshape(output.shape))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, num_: int, h_feature: int, w_feature: int,
                     h_mask: int, w_mask: int, half_h_mask: int, half_w_mask: int) -> None:
    """Gradient of :func:`psamask_forward`: overwrites ``grad_input``."""
    place, inside = _places(h_feature, w_feature, h_mask, w_mask, half_h_mask, half_w_mask, grad_output.device)
    grad = grad_output.flatten(2)
    grad = (grad.mT if psa_type else grad) * inside
    total = torch.zeros_like(grad_input).flatten(2).scatter_add_(1, place.expand_as(grad), grad)
    grad_input.copy_(total.view_as(grad_input))


def _places(height: int, width: int, h_mask: int, w_mask: int, half_h: int, half_w: int,
            device: torch.device) -> Tuple[Tensor, Tensor]:
    """Where in the mask around pixel p pixel j lies, at [j, p] of (H * W, H * W), and whether it does; 0 where not."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing='ij')
    y, x = (position.flatten() for position in (y, x))
    rows, columns = y[:, None] - y + half_h, x[:, None] - x + half_w
    inside = (rows >= 0) & (rows < h_mask) & (columns >= 0) & (columns < w_mask)
    return (rows * w_mask + columns).where(inside, 0), inside
