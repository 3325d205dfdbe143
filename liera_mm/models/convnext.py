"""ConvNeXt with adapted layers and a fast forward pass, for MMEngine's registry."""
import functools
import inspect
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import Sequential
from mmengine.registry import MODELS
from mmpretrain.models.backbones import ConvNeXt
from mmpretrain.models.backbones.convnext import ConvNeXtBlock
from mmpretrain.models.utils import LayerNorm2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.factors import at_least_float32
from ..core.kernels import builtin_only
from ..core.kernels import convnext as fused
from ..core.kernels.constants import constant
from ..core.layers import autocast_dtype, effective_weights
from .backbones import adapt_or_freeze, refuse_leftovers
from .pretrained import PretrainedBackbone


@MODELS.register_module()
class LieRAConvNeXt(PretrainedBackbone, ConvNeXt):
    """ConvNeXt v1 or v2, frozen and adapted.

    The fast forward pass computes what mmpretrain's does, to rounding: with the channels last from the first layer to the
    outputs, in the dtype of autocast throughout, with statistics in float32. It calls stages and blocks, but not the layers
    in them, so hooks on these do not run.

    Args:
        liera: Arguments of :func:`liera_mm.adapt`; None for a backbone that is frozen and nothing else.
        fast: Whether to use the fast forward pass, except for an empty batch, in transforms of torch.func and where torch
            traces, as to count FLOPs. Norms other than ``LN2d`` and activations other than the exact
            ``GELU`` never do.
        **kwargs: Arguments of mmpretrain's ``ConvNeXt``.
    """

    added = ('fast', )

    def __init__(self, liera: Optional[Dict[str, Any]] = None, fast: bool = True, **kwargs: Any):
        known = inspect.signature(ConvNeXt).parameters
        refuse_leftovers('LieRAConvNeXt', [name for name in kwargs if name not in known], ('liera', 'fast', *known))
        super().__init__(**kwargs)
        adapt_or_freeze(self, liera)
        for stage in self.stages:
            stage.__class__ = Stage
            for block in stage:
                block.__class__ = Block
        norm, act = self.stages[0][0].norm, self.stages[0][0].act
        self.fast = fast and isinstance(norm, LayerNorm2d) and isinstance(act, nn.GELU) and act.approximate == 'none'

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        if not self.fast or not isinstance(x, Tensor) or not x.numel() or builtin_only():
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
    def sharding_units(self) -> Iterable[nn.Module]:
        return (block for stage in self.stages for block in stage)


class Stage(Sequential):
    """The blocks of a stage. Given what stochastic depth scales them by, it runs the fast forward pass."""

    def forward(self, x: Tensor, scales: Optional[Sequence[Optional[Tensor]]] = None) -> Tensor:
        if scales is None:
            return super().forward(x)
        weights = [None] * len(self)
        if not hasattr(self[0], 'unshard'):  # as blocks in shards have, which are whole only while they compute
            flat = iter(effective_weights([layer for block in self for layer in block.kernels], x.dtype))
            weights = zip(flat, flat, flat)
        for block, *args in zip(self, scales, weights):
            x = block(x, *args)
        return x


class Block(ConvNeXtBlock):
    """A block. Given the scale of its branch, and its effective weights or None, it runs the fast forward pass."""

    @property
    def kernels(self) -> List[nn.Module]:
        return [self.depthwise_conv, self.pointwise_conv1, self.pointwise_conv2]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if not args:
            return super().forward(x)
        again = self.with_cp and torch.is_grad_enabled()
        # Nothing in it is random
        checkpointed = functools.partial(checkpoint, self._fast, use_reentrant=False, preserve_rng_state=False)
        return (checkpointed if again else self._fast)(x, *args)

    def _fast(self, x: Tensor, scale: Optional[Tensor], weights: Optional[Sequence[Tensor]]) -> Tensor:
        depthwise, pointwise1, pointwise2 = weights or effective_weights(self.kernels, x.dtype)
        if self.gamma is not None:
            scale = self.gamma.expand(len(x), -1) if scale is None else self.gamma * scale
        elif scale is not None:
            scale = scale.expand(-1, x.shape[3])
        norm, grn = self.norm, self.grn
        response = (None, None, 0.) if grn is None else (grn.gamma, grn.beta, grn.eps)
        return fused.block(x, depthwise, self.depthwise_conv.bias, norm.weight, norm.bias, norm.eps, pointwise1.flatten(1),
                           self.pointwise_conv1.bias, *response, pointwise2.flatten(1), self.pointwise_conv2.bias, scale)


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
    probabilities = constant(keep, x.dtype, x.device).view(-1, 1, 1)
    scales = (draws.flatten(2) + probabilities).floor() / at_least_float32(probabilities)
    return [scale if probability < 1 else None for scale, probability in zip(scales, keep)]
