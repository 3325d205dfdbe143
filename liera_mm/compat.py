"""The one place that knows about other packages' version trouble.

:func:`install` has to run before ``mmcv.ops``, ``mmdet.models`` or ``mmpretrain.models`` is imported;
``import liera_mm`` does that. This module imports none of them.
"""
import sys
import warnings
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import List

import torch
from torch import Tensor


def install() -> None:
    """Make MMCV's operators and mmpretrain's models importable; calling it again changes nothing.

    - Where mmcv has no compiled ``mmcv._ext``, one backed by torchvision takes its place. A compiled one is always
      preferred, because Python's own finders are asked first.
    - With transformers 5 or later, mmpretrain's optional multimodal part, which cannot be imported, is kept off.
    """
    if _operators not in sys.meta_path:
        sys.meta_path.append(_operators)
    if 'mmdet.structures.mask' in sys.modules and 'mmcv.ops' not in sys.modules:
        warnings.warn('mmdet was imported before liera_mm and goes on without operators: import liera_mm first.',
                      stacklevel=2)
    if _transformers_major() >= 5:
        if 'mmpretrain.utils.dependency' in sys.modules:
            sys.modules['mmpretrain.utils.dependency'].WITH_MULTIMODAL = False
        elif _no_multimodal not in sys.meta_path:
            sys.meta_path.insert(0, _no_multimodal)


def _transformers_major() -> int:
    """Major version of the installed transformers, 0 if there is none; does not import it."""
    try:
        return int(metadata.version('transformers').split('.')[0])
    except metadata.PackageNotFoundError:
        return 0


class _NoMultimodalFinder(MetaPathFinder):
    """Clears ``WITH_MULTIMODAL`` in ``mmpretrain.utils.dependency`` as soon as that is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'mmpretrain.utils.dependency':
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            exec_module = spec.loader.exec_module

            def exec_without_multimodal(module):
                exec_module(module)
                module.WITH_MULTIMODAL = False

            spec.loader.exec_module = exec_without_multimodal
        return spec


class _OperatorFinder(MetaPathFinder, Loader):
    """Finds and loads the stand-in for ``mmcv._ext``."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, origin='torchvision') if fullname == 'mmcv._ext' else None

    def exec_module(self, module):
        import torchvision  # noqa: F401  (registers torch.ops.torchvision)
        module.nms = nms
        module.softnms = softnms
        module.roi_align_forward = roi_align_forward
        module.roi_align_backward = roi_align_backward
        module.get_compiler_version = module.get_compiling_cuda_version = lambda: 'n/a (operators of torchvision)'
        module.__getattr__ = _missing_operator


_operators = _OperatorFinder()
_no_multimodal = _NoMultimodalFinder()


def _missing_operator(name: str):
    """Any other operator: there when mmcv looks for it on import, an error when it is called."""
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute '{name}'")

    def operator(*args, **kwargs):
        raise RuntimeError(
            f"The mmcv operator '{name}' is not available: this mmcv has no compiled operators, and liera_mm stands in "
            'for nms, softnms and average-pooling roi_align only. Install mmcv with compiled operators, see '
            'https://mmcv.readthedocs.io/en/latest/get_started/installation.html')

    return operator


def _same_precision(*tensors: Tensor) -> List[Tensor]:
    """Cast to the widest of the tensors' dtypes, float32 at least: half precision is too coarse for coordinates."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes (Tensor): (N, 4) as x1, y1, x2, y2 in pixels.
        scores (Tensor): (N,).
        iou_threshold (float): A box is dropped if its IoU with a better one is larger than this.
        offset (int): 0 or 1, added to every width and height.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes, best first; equal scores in the order of the input.
    """
    boxes, scores = _same_precision(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    # torchvision compares with a double; an IoU of exactly 0.3 in float32 is above that, and mmcv keeps the box.
    iou_threshold = torch.tensor(iou_threshold, dtype=boxes.dtype, device='cpu').item()
    if boxes.is_cuda:  # where torchvision takes milliseconds for the boxes of one image
        from .kernels import ops_for
        return ops_for(boxes).nms(boxes, scores, iou_threshold)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Soft-NMS: lowers the scores of overlapping boxes instead of dropping them.

    As in mmcv, the best box stays even if its score is below ``min_score``. Two empty boxes don't overlap.

    Args:
        boxes (Tensor): (N, 4) as x1, y1, x2, y2 in pixels, on the CPU.
        scores (Tensor): (N,).
        dets (Tensor): (N, 5), its first K rows are overwritten by the kept boxes and their new scores.
        iou_threshold (float): Methods 0 and 1 leave scores alone at a smaller IoU.
        sigma (float): Width of method 2's Gaussian.
        min_score (float): A box is dropped once its score is smaller.
        method (int): What to multiply a score with: 0 (naive) 0, 1 (linear) 1 - IoU, 2 (Gaussian) exp(-IoU² / sigma).
        offset (int): 0 or 1, added to every width and height.

    Returns:
        Tensor: (K,) int64, indices of the kept boxes, best first.
    """
    boxes, scores = _same_precision(boxes, scores)
    scores = scores.clone()
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(dim=1)
    # Positions of the boxes that are left. They move as in mmcv's loop, since the first of equal scores goes first.
    order = torch.arange(len(boxes), device=boxes.device)
    keep = []
    while len(order):
        best = scores[order].argmax()
        i = int(order[best])
        keep.append(i)
        order[best] = order[0]
        order = order[1:]
        others = boxes[order]
        sizes = torch.minimum(boxes[i, 2:], others[:, 2:]) - torch.maximum(boxes[i, :2], others[:, :2]) + offset
        overlap = sizes.clamp(min=0).prod(dim=1)
        iou = (overlap / (areas[i] + areas[order] - overlap)).nan_to_num(0)
        if method == 2:
            weight = torch.exp(-(iou * iou) / sigma)
        else:
            weight = torch.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        new_scores = scores[order] * weight
        scores[order] = new_scores
        alive = new_scores >= min_score
        count = int(alive.sum())
        # mmcv puts the last box in the place of a dropped one.
        order, tail = order[:count], order[count:][alive[count:]]
        order[~alive[:count]] = tail.flip(0)
    keep = torch.tensor(keep, dtype=torch.long, device=boxes.device)
    dets[:len(keep)] = torch.cat([boxes[keep], scores[keep, None]], dim=1)
    return keep


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
        _missing_operator("roi_align with pool_mode='max'")()
    # torchvision crashes on these. Like mmcv, don't check on CUDA: that would wait for the device.
    if not rois.is_cuda and not (rois.isfinite().all() and (not aligned or (rois[:, 3:] >= rois[:, 1:3]).all())):
        raise RuntimeError('roi_align needs finite RoIs, and x2 >= x1 and y2 >= y1 if aligned=True')
    features, rois = _same_precision(input, rois)
    output.copy_(torch.ops.torchvision.roi_align(
        features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Gradient of :func:`roi_align_forward`: overwrites ``grad_input`` (N, C, H, W).

    torchvision's CUDA kernel adds in any order, and refuses to do so where PyTorch was asked for deterministic
    algorithms: there matrix products do it.
    """
    grad, rois = _same_precision(grad_output, rois)
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
