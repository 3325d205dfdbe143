"""Features of regions of an image.

Shapes: input (N, C, H, W), rois (K, 5) as image index, x1, y1, x2, y2 in pixels of the image, output (K, C, h, w). The
spatial scale is in pixels of the input per pixel of the image.
"""
from typing import Tuple

import torch
from torch import Tensor

from .precision import same_precision
from .sampling import chunks, corners, largest, samples, scatter, table


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """RoIAlign.

    Args:
        output (Tensor): (K, C, aligned_height, aligned_width), overwritten.
        argmax_y (Tensor): With maximum pooling, overwritten by where in the input the largest sample of every bin lies, as
            is ``argmax_x``; -1 in a bin without samples, whose output is 0. With average pooling not used.
        sampling_ratio (int): Samples per bin and axis; 0 for as many as the bin has pixels.
        pool_mode (int): 0, maximum; 1, average.
        aligned (bool): Whether pixel centres lie at half-integers. If not, a RoI is at least one pixel wide and high.

    Raises:
        RuntimeError: On the CPU, if a RoI is not finite, or if it has a negative size and ``aligned`` is set.
    """
    # torchvision crashes on these. Like mmcv, don't check on CUDA: that would wait for the device.
    if not rois.is_cuda and not (rois.isfinite().all() and (not aligned or (rois[:, 3:] >= rois[:, 1:3]).all())):
        raise RuntimeError('roi_align needs finite RoIs, and x2 >= x1 and y2 >= y1 if aligned=True')
    features, rois = same_precision(input, rois)
    if pool_mode == 1:
        output.copy_(torch.ops.torchvision.roi_align(
            features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))
        return
    pixels, (height, width) = table(features), input.shape[2:]
    start, size = _scaled(rois, spatial_scale, aligned)
    first = (rois[:, 0].long() * height * width).view(-1, 1, 1, 1, 1)
    for k in chunks(_sample_counts(size, aligned_height, aligned_width, sampling_ratio), input.shape[1]):
        (x, columns, _), (y, rows, _) = (samples(start[k, axis], size[k, axis], bins, sampling_ratio)
                                         for axis, bins in ((0, aligned_width), (1, aligned_height)))
        y, x = torch.broadcast_tensors(y[:, :, None, :, None], x[:, None, :, None, :])
        values = sum(pixels[first[k] + place] * weight[..., None] for place, weight in corners(y, x, height, width))
        used = (rows[:, :, None, :, None] & columns[:, None, :, None, :]).expand(y.shape)
        best_values, best = largest(values.flatten(3, 4), used.flatten(3))
        output[k] = best_values.to(output.dtype)
        for argmax, positions in ((argmax_y, y), (argmax_x, x)):
            argmax[k] = _take(positions, best).to(argmax.dtype)


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Gradient of :func:`roi_align_forward`: overwrites ``grad_input`` (N, C, H, W).

    torchvision's CUDA kernel adds in any order, and refuses to do so where PyTorch was asked for deterministic
    algorithms: there matrix products do it.
    """
    grad, rois = same_precision(grad_output, rois)
    if pool_mode == 0:
        y, x = same_precision(argmax_y, argmax_x)
        total = grad.new_zeros(grad_input.shape)
        for place, weight in corners(y, x, *grad_input.shape[2:]):
            scatter(total, rois[:, 0], place, grad * weight * (y != -1))
        grad_input.copy_(total)
    elif grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        _deterministic_backward(grad, rois, grad_input, spatial_scale, sampling_ratio, aligned)
    else:
        grad_input.copy_(torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned))


def _deterministic_backward(grad, rois, grad_input, spatial_scale, sampling_ratio, aligned, chunk=32):
    """RoIAlign is ``rows @ features @ columns.T`` for each RoI; so its gradient is ``rows.T @ grad @ columns``."""
    starts, sizes = _scaled(rois, spatial_scale, aligned)
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
    position, used, count = samples(start, size, bins, sampling_ratio)
    used = used & (position >= -1) & (position <= length)
    distance = position.clamp(0, length - 1)[..., None] - torch.arange(length, device=start.device)
    return ((1 - distance.abs()).clamp(min=0) * used[..., None]).sum(dim=2) / count.clamp(min=1)


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int, pooled_width: int,
                     spatial_scale: float) -> None:
    """Largest of the pixels that each bin touches.

    Unlike torchvision's, RoIs aren't rounded to pixels, and extend by a pixel of the image to the right and the bottom.

    Args:
        output (Tensor): (K, C, pooled_height, pooled_width), overwritten; 0 where a bin has no pixels.
        argmax (Tensor): As the output, int32, overwritten by the places in the flattened (H, W); -1 where there is none.
    """
    features, rois = same_precision(input, rois)
    pixels, (height, width) = table(features), input.shape[2:]
    first = (rois[:, 0].long() * height * width).view(-1, 1, 1, 1, 1)
    start, end = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    real = (end > start).all(1)[:, None]
    (left, right), (top, bottom) = (_touched(start[:, axis], end[:, axis], real, bins, length)
                                    for axis, bins, length in ((0, pooled_width, width), (1, pooled_height, height)))
    counts = (right - left).amax(1) * (bottom - top).amax(1) * pooled_height * pooled_width
    for k in chunks(counts, input.shape[1]):
        (x, columns), (y, rows) = (_range(low[k], high[k]) for low, high in ((left, right), (top, bottom)))
        place = y[:, :, None, :, None] * width + x[:, None, :, None, :]
        used = rows[:, :, None, :, None] & columns[:, None, :, None, :]
        values, best = largest(pixels[first[k] + place.where(used, 0)].flatten(3, 4), used.flatten(3))
        output[k], argmax[k] = values.to(output.dtype), _take(place, best).to(argmax.dtype)


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Gradient of :func:`roi_pool_forward`: overwrites ``grad_input`` (N, C, H, W)."""
    grad, = same_precision(grad_output)
    total = grad.new_zeros(grad_input.shape)
    scatter(total, rois[:, 0], argmax.long().clamp(min=0), grad * (argmax >= 0))
    grad_input.copy_(total)


def deform_roi_pool_forward(input: Tensor, rois: Tensor, offset: Tensor, output: Tensor, pooled_height: int,
                            pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """Deformable RoI pooling (Dai et al. 2017, eq. 5): aligned RoIAlign whose bins are moved.

    Args:
        offset (Tensor): (K, 2, pooled_height, pooled_width) as x, y, in units of ``gamma`` times the RoI's size; or empty.
        output (Tensor): (K, C, pooled_height, pooled_width), overwritten.
        sampling_ratio (int): Samples per bin and axis; 0 for as many as the bin has pixels.
    """
    features, rois, offset = same_precision(input, rois, offset)
    pixels, settings = table(features), (input.shape[2:], spatial_scale, sampling_ratio, gamma)
    offset = offset if offset.numel() else offset.new_zeros(len(rois), 2, pooled_height, pooled_width)
    _, size = _scaled(rois, spatial_scale, True)
    for k in chunks(_sample_counts(size, pooled_height, pooled_width, sampling_ratio), input.shape[1]):
        output[k] = _pool_moved_bins(pixels, rois[k], offset[k], *settings).to(output.dtype)


def deform_roi_pool_backward(grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor,
                             grad_offset: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float,
                             sampling_ratio: int, gamma: float) -> None:
    """Gradients of :func:`deform_roi_pool_forward`: overwrites ``grad_input``, and ``grad_offset`` unless it is empty."""
    grad, features, rois, wide_offset = same_precision(grad_output, input, rois, offset)
    pixels, settings = table(features).requires_grad_(), (input.shape[2:], spatial_scale, sampling_ratio, gamma)
    moved = offset.numel() > 0
    wide_offset = wide_offset if moved else grad.new_zeros(len(rois), 2, pooled_height, pooled_width)
    total = torch.zeros_like(pixels)
    _, size = _scaled(rois, spatial_scale, True)
    for k in chunks(_sample_counts(size, pooled_height, pooled_width, sampling_ratio), input.shape[1]):
        with torch.enable_grad():
            bins = wide_offset[k].requires_grad_()
            pooled = _pool_moved_bins(pixels, rois[k], bins, *settings)
            grads = torch.autograd.grad(pooled, (pixels, bins), grad[k])
        total += grads[0]
        if moved:
            grad_offset[k] = grads[1].to(grad_offset.dtype)
    n, c, h, w = input.shape
    grad_input.copy_(total.view(n, h, w, c).permute(0, 3, 1, 2))


def _scaled(rois: Tensor, spatial_scale: float, aligned: bool) -> Tuple[Tensor, Tensor]:
    """Upper left corners and sizes as x, y in pixels of the input, (K, 2) both."""
    scaled = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0)
    start, size = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
    return start, size if aligned else size.clamp(min=1)


def _sample_counts(size: Tensor, height: int, width: int, ratio: int) -> Tensor:
    """How many samples each RoI has, (K,)."""
    if ratio > 0:
        return torch.full_like(size[:, 0], ratio * ratio * height * width)
    return (size[:, 0] / width).ceil().clamp(min=0) * (size[:, 1] / height).ceil().clamp(min=0) * height * width


def _take(positions: Tensor, index: Tensor) -> Tensor:
    """Positions (K, h, w, Sy, Sx) at indices of samples (K, C, h, w); -1 where the index is."""
    positions = positions.flatten(3)[:, None].expand(-1, index.shape[1], -1, -1, -1)
    if not positions.shape[4]:
        return index
    return positions.gather(4, index.clamp(min=0)[..., None])[..., 0].where(index >= 0, -1)


def _touched(start: Tensor, end: Tensor, real: Tensor, bins: int, length: int) -> Tuple[Tensor, Tensor]:
    """First pixel, and the one after the last, of each bin along an axis: (K, bins) both, the same if RoIs aren't real."""
    edges = torch.arange(bins + 1, device=start.device) * ((end - start) / bins)[:, None] + start[:, None]
    low, high = (edge.clamp(0, length).long() for edge in (edges[:, :-1].floor(), edges[:, 1:].ceil()))
    return low, torch.maximum(high, low).where(real, low)


def _range(low: Tensor, high: Tensor) -> Tuple[Tensor, Tensor]:
    """Pixels of each bin along an axis, and which of them belong to it: (K, bins, S) both."""
    longest = int((high - low).max()) if low.numel() else 0
    pixels = low[..., None] + torch.arange(longest, device=low.device)
    return pixels, pixels < high[..., None]


def _pool_moved_bins(pixels: Tensor, rois: Tensor, offset: Tensor, shape: Tuple[int, int], spatial_scale: float, ratio: int,
                     gamma: float) -> Tensor:
    """Deformable RoI pooling of a table of pixels: (K, C, h, w)."""
    height, width = shape
    start, size = _scaled(rois, spatial_scale, True)
    (x, columns, count_x), (y, rows, count_y) = (
        samples(start[:, axis], size[:, axis], offset.shape[3 - axis], ratio) for axis in (0, 1))
    dx, dy = ((gamma * size[:, axis, None, None] * offset[:, axis])[..., None, None] for axis in (0, 1))
    y, x = torch.broadcast_tensors(y[:, :, None, :, None] + dy, x[:, None, :, None, :] + dx)
    used = rows[:, :, None, :, None] & columns[:, None, :, None, :]
    first = (rois[:, 0].long() * height * width).view(-1, 1, 1, 1, 1)
    total = 0
    for place, weight in corners(y, x, height, width):
        values = pixels.index_select(0, (first + place).flatten()).view(*place.shape, pixels.shape[1])
        total = total + (values * (weight * used)[..., None]).sum((3, 4))
    return (total / (count_y * count_x).clamp(min=1)[..., None]).permute(0, 3, 1, 2)
