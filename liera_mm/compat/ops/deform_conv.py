"""Deformable convolutions (Dai et al. 2017; Zhu et al. 2019), by torchvision's compiled kernels.

Shapes: input (N, C, H, W), weight (O, C / groups, kH, kW), offset (N, deform_groups * 2 * kH * kW, oH, oW) as y, x of every
tap in pixels, mask (N, deform_groups * kH * kW, oH, oW), output (N, O, oH, oW). Half precision is computed in float32.
mmcv's buffers, and how many images it takes at a time, are not used.
"""
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import same_precision


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
                        kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
                        group: int, deformable_group: int, im2col_step: int) -> None:
    """Deformable convolution: overwrites ``output``."""
    _forward(output, input, weight, offset, None, None, _geometry(dH, dW, padH, padW, dilationH, dilationW),
             group, deformable_group)


def deform_conv_backward_input(input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor, gradOffset: Tensor,
                               weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int, padH: int,
                               dilationW: int, dilationH: int, group: int, deformable_group: int,
                               im2col_step: int) -> None:
    """Gradients by the input and the offsets: overwrites ``gradInput`` and ``gradOffset``.

    The gradient by the weight comes with them: it is left in the buffer ``columns``, where
    :func:`deform_conv_backward_parameters`, which mmcv calls next if at all, finds it.
    """
    grads = _backward(gradOutput, input, weight, offset, None, None,
                      _geometry(dH, dW, padH, padW, dilationH, dilationW), group, deformable_group)
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    columns.resize_(weight.shape).copy_(grads[1])


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor,
                                    columns: Tensor, ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int,
                                    padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
                                    scale: float, im2col_step: int) -> None:
    """Adds the gradient by the weight, times ``scale``, to ``gradWeight``; empties ``columns``."""
    if columns.shape == gradWeight.shape:
        grad = columns.clone()
        columns.resize_(0)
    else:
        grad = _backward(gradOutput, input, gradWeight, offset, None, None,
                         _geometry(dH, dW, padH, padW, dilationH, dilationW), group, deformable_group)[1]
    gradWeight.add_(grad, alpha=scale)


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor,
                                  output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int, stride_h: int,
                                  stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, group: int,
                                  deformable_group: int, with_bias: bool) -> None:
    """Deformable convolution whose taps are multiplied by ``mask``: overwrites ``output``."""
    _forward(output, input, weight, _as_read(offset, output), _as_read(mask, output), bias if with_bias else None,
             _geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w), group, deformable_group)


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                   mask: Tensor, columns: Tensor, grad_input: Tensor, grad_weight: Tensor,
                                   grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
                                   dilation_h: int, dilation_w: int, group: int, deformable_group: int,
                                   with_bias: bool) -> None:
    """Gradients of :func:`modulated_deform_conv_forward`: overwrites the five of them, that by the bias if there is one."""
    grads = _backward(grad_output, input, weight, _as_read(offset, grad_output), _as_read(mask, grad_output),
                      bias if with_bias else None,
                      _geometry(stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w), group, deformable_group)
    for target, grad in zip((grad_input, grad_weight, grad_offset, grad_mask, grad_bias), grads[:4 + with_bias]):
        if target.shape != grad.shape:  # of what was read
            grad = F.pad(grad.flatten(1), (0, target[0].numel() - grad[0].numel())).view_as(target)
        target.copy_(grad)


def _as_read(tensor: Tensor, output: Tensor) -> Tensor:
    """Offsets or mask of another height and width than the output, as mmcv's kernels read the memory of each image.

    They take it for one of the output's size. DyHead's offsets are those of a finer level than its convolution's input.
    """
    size = output.shape[2:]
    if tensor.shape[2:] == size:
        return tensor
    return tensor.flatten(1)[:, :tensor.shape[1] * size.numel()].view(*tensor.shape[:2], *size)


Geometry = Tuple[int, int, int, int, int, int]


def _geometry(*numbers: int) -> Geometry:
    """Stride, padding and dilation, each as of y, x."""
    return numbers


def _forward(output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Optional[Tensor],
             bias: Optional[Tensor], geometry: Geometry, groups: int, deform_groups: int) -> None:
    tensors = _operands(input, weight, offset, mask, bias)
    output.copy_(torch.ops.torchvision.deform_conv2d(*tensors, *geometry, groups, deform_groups, mask is not None))


def _backward(grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Optional[Tensor], bias: Optional[Tensor],
              geometry: Geometry, groups: int, deform_groups: int) -> List[Tensor]:
    """Gradients by input, weight, offset, mask and bias."""
    tensors = _operands(input, weight, offset, mask, bias)
    return torch.ops.torchvision._deform_conv2d_backward(
        grad.to(tensors[0].dtype), *tensors, *geometry, groups, deform_groups, mask is not None)


def _operands(input: Tensor, weight: Tensor, offset: Tensor, mask: Optional[Tensor],
              bias: Optional[Tensor]) -> List[Tensor]:
    """In one precision, contiguous, and with what torchvision wants in the place of what is not there."""
    mask = input.new_zeros(len(input), 1) if mask is None else mask
    bias = input.new_zeros(len(weight)) if bias is None else bias
    return [tensor.contiguous() for tensor in same_precision(input, weight, offset, mask, bias)]
