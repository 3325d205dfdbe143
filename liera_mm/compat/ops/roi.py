"""Features of regions of an image."""
import torch
from torch import Tensor

from .precision import same_precision


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """RoIAlign with average pooling.

    Args:
        input (Tensor): (N, C, H, W) features.
        rois (Tensor): (K, 5) as image index, x1, y1, x2, y2; in pixels of the image.
        output (Tensor): (K, C, aligned_height, aligned_width), overwritten.
        argmax_y (Tensor): Not used, nor is ``argmax_x``.
        spatial_scale (float): Feature pixels per image pixel.
        sampling_ratio (int): Samples per bin and axis; 0 for as many as the bin has pixels.
        pool_mode (int): 1, average.
        aligned (bool): Whether pixel centres lie at half-integers. If not, a RoI is at least one pixel wide and high.

    Raises:
        RuntimeError: If ``pool_mode`` is 0 (max); on the CPU also if a RoI is not finite, or if it has a negative size
            and ``aligned`` is set.
    """
    if pool_mode == 0:
        raise RuntimeError("The mmcv operator 'roi_align_forward' with pool_mode='max' is not available.")
    # torchvision crashes on these. Like mmcv, don't check on CUDA: that would wait for the device.
    if not rois.is_cuda and not (rois.isfinite().all() and (not aligned or (rois[:, 3:] >= rois[:, 1:3]).all())):
        raise RuntimeError('roi_align needs finite RoIs, and x2 >= x1 and y2 >= y1 if aligned=True')
    features, rois = same_precision(input, rois)
    output.copy_(torch.ops.torchvision.roi_align(
        features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Gradient of :func:`roi_align_forward`: overwrites ``grad_input`` (N, C, H, W).

    torchvision's CUDA kernel adds in any order, and refuses to do so where PyTorch was asked for deterministic
    algorithms: there matrix products do it.
    """
    grad, rois = same_precision(grad_output, rois)
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _deterministic_backward(grad, rois, grad_input, spatial_scale, sampling_ratio, aligned)
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(
        grad, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned))


def _deterministic_backward(grad, rois, grad_input, spatial_scale, sampling_ratio, aligned, chunk=32):
    """RoIAlign is ``rows @ features @ columns.T`` for each RoI; so its gradient is ``rows.T @ grad @ columns``."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    starts, sizes = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sizes = sizes.clamp(min=1)
    for image in range(len(grad_input)):
        total = grad.new_zeros(grad_input.shape[1:])
        for index in (rois[:, 0].int() == image).nonzero()[:, 0].split(chunk):
            columns, rows = (
                _pooling_weights(starts[index, axis], sizes[index, axis], bins, length, sampling_ratio)
                for axis, bins, length in ((0, grad.shape[3], total.shape[2]), (1, grad.shape[2], total.shape[1])))
            total += torch.einsum('kph,kcpq,kqw->chw', rows, grad[index], columns)
        grad_input[image] = total


def _pooling_weights(start: Tensor, size: Tensor, bins: int, length: int, sampling_ratio: int) -> Tensor:
    """Weight of each of ``length`` pixels in each bin of K segments: (K,), (K,) -> (K, bins, length)."""
    start, width = start[:, None, None], size[:, None, None] / bins
    samples = torch.full_like(width, sampling_ratio) if sampling_ratio > 0 else width.ceil()
    sample = torch.arange(max(int(samples.max()), 0), device=start.device)
    used, samples = sample < samples, samples.clamp(min=1)
    position = start + torch.arange(bins, device=start.device)[:, None] * width + (sample + 0.5) * width / samples
    used = used & (position >= -1) & (position <= length)
    distance = position.clamp(0, length - 1)[..., None] - torch.arange(length, device=start.device)
    return ((1 - distance.abs()).clamp(min=0) * used[..., None]).sum(dim=2) / samples
