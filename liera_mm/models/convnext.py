"""ConvNeXt with adapted layers and a fast forward pass, for MMEngine's registry."""
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import Sequential
from mmengine.registry import MODELS
from mmpretrain.models.backbones import ConvNeXt
from mmpretrain.models.utils import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..algebra import at_least_float32
from ..kernels import convnext as fused
from ..layers import autocast_dtype, effective_weights
from .backbones import adapt_or_freeze
from .pretrained import PretrainedBackbone


@MODELS.register_module()
class LieRAConvNeXt(PretrainedBackbone, ConvNeXt):
    """ConvNeXt v1 or v2, frozen and adapted.

    The fast forward pass computes what mmpretrain's does, to rounding: with the channels last from the first layer to the
    outputs, in the dtype of autocast throughout, with statistics in float32. It calls the stages, but not the layers in
    them, so hooks on these do not run.

    Args:
        liera: Arguments of :func:`liera_mm.adapt`; None for a backbone that is frozen and nothing else.
        fast: Whether to use the fast forward pass. Norms other than ``LN2d`` and activations other than the exact
            ``GELU`` never do.
        **kwargs: Arguments of mmpretrain's ``ConvNeXt``.
    """

    def __init__(self, liera: Optional[Dict[str, Any]] = None, fast: bool = True, **kwargs):
        super().__init__(**kwargs)
        adapt_or_freeze(self, liera)
        for stage in self.stages:
            stage.__class__ = Stage
        norm, act = self.stages[0][0].norm, self.stages[0][0].act
        self.fast = fast and isinstance(norm, LayerNorm2d) and isinstance(act, nn.GELU) and act.approximate == 'none'

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        if not self.fast:
            return super().forward(x)
        x, outs = x.to(autocast_dtype(x)).permute(0, 2, 3, 1), []
        with torch.autocast(x.device.type, enabled=False):
            scales = _path_scales([block for stage in self.stages for block in stage], x)
            for i, stage in enumerate(self.stages):
                for layer in self.downsample_layers[i]:
                    x = _norm(layer, x) if isinstance(layer, LayerNorm2d) else _patch_conv(layer, x)
                x, scales = stage(x, scales[:len(stage)]), scales[len(stage):]
                if i in self.out_indices:
                    pooled = x.mean((1, 2), keepdim=True) if self.gap_before_final_norm else x
                    out = _norm(getattr(self, f'norm{i}'), pooled).permute(0, 3, 1, 2)
                    outs.append(out.flatten(1) if self.gap_before_final_norm else out)
        return tuple(outs)

    @property
    def units(self) -> Iterable[nn.Module]:
        return self.stages


class Stage(Sequential):
    """The blocks of a stage. Given their scales, it runs the fast forward pass, on ``x`` of shape (N, H, W, C)."""

    def forward(self, x: Tensor, scales: Optional[Sequence[Optional[Tensor]]] = None) -> Tensor:
        if scales is None:
            return super().forward(x)
        kernels = [layer for block in self
                   for layer in (block.depthwise_conv, block.pointwise_conv1, block.pointwise_conv2)]
        weights = iter(effective_weights(kernels, x.dtype))
        for block, scale in zip(self, scales):
            args = block, next(weights), next(weights), next(weights), scale, x
            again = block.with_cp and torch.is_grad_enabled()
            x = checkpoint(_block, *args, use_reentrant=False) if again else _block(*args)
        return x


# The parts of the fast forward pass; x is (N, H, W, C) everywhere


def _norm(layer: LayerNorm2d, x: Tensor) -> Tensor:
    return fused.layer_norm(x, layer.weight, layer.bias, layer.eps)


def _patch_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel size: one matrix product over patches."""
    weight, = effective_weights([layer], x.dtype)
    k, channels = layer.kernel_size[0], x.shape[3]
    height, width = x.shape[1] // k, x.shape[2] // k
    x = x[:, :height * k, :width * k].unflatten(1, (height, k)).unflatten(3, (width, k))
    x = x.transpose(2, 3).reshape(-1, height, width, k * k * channels)
    return F.linear(x, weight.permute(0, 2, 3, 1).flatten(1), layer.bias.to(x.dtype))


def _path_scales(blocks: Sequence[nn.Module], x: Tensor) -> List[Optional[Tensor]]:
    """What stochastic depth multiplies each image's branch by, (N, 1) for every block; None where it does nothing.

    The random numbers are those that the blocks would draw one after another.
    """
    paths = [block.drop_path for block in blocks]
    keep = [1 - path.drop_prob if isinstance(path, DropPath) and path.training else 1 for path in paths]
    draws = x.new_zeros(len(blocks), len(x), 1, 1, 1)
    for draw, probability in zip(draws, keep):
        if probability < 1:
            torch.rand(draw.shape, out=draw)
    probabilities = x.new_tensor(keep).view(-1, 1, 1)
    scales = (draws.flatten(2) + probabilities).floor() / at_least_float32(probabilities)
    return [scale if probability < 1 else None for scale, probability in zip(scales, keep)]


def _block(block: nn.Module, depthwise: Tensor, pointwise1: Tensor, pointwise2: Tensor, scale: Optional[Tensor],
           x: Tensor) -> Tensor:
    if block.gamma is not None:
        scale = block.gamma.expand(len(x), -1) if scale is None else block.gamma * scale
    elif scale is not None:
        scale = scale.expand(-1, x.shape[3])
    norm, grn = block.norm, block.grn
    response = (None, None, 0.) if grn is None else (grn.gamma, grn.beta, grn.eps)
    return fused.block(x, depthwise, block.depthwise_conv.bias, norm.weight, norm.bias, norm.eps, pointwise1.flatten(1),
                       block.pointwise_conv1.bias, *response, pointwise2.flatten(1), block.pointwise_conv2.bias, scale)
