"""A convolution of one image that is computed at some pixels only."""
import torch
import torch.nn.functional as F
from torch import Tensor


def masked_im2col_forward(im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, kernel_h: int, kernel_w: int,
                          pad_h: int, pad_w: int) -> None:
    """What a kernel sees at M pixels.

    Args:
        im (Tensor): (1, C, H, W).
        mask_h_idx (Tensor): (M,) int64, rows of the pixels; ``mask_w_idx`` are their columns.
        col (Tensor): (C * kernel_h * kernel_w, M), overwritten.
    """
    padded = F.pad(im[0], (pad_w, kernel_w - 1, pad_h, kernel_h - 1))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].view(col.shape))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int,
                          channels: int) -> None:
    """Puts the results (channels, M) at the pixels of ``im`` (1, channels, height, width); leaves the others alone."""
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
