"""The pieces of a ConvNeXt block as autograd functions that save little and move little memory.

All work on tensors with the channels last, (N, H, W, C), in one dtype for activations and weights of matrix products; norms
and biases may be in float32. Stock blocks are memory-bound, so what counts is how often a tensor of the hidden width passes
through memory: here the block saves its hidden tensor once, before the activation, and computes the rest again.
"""
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops_for


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the channels of (..., C), in the dtype of ``x`` with statistics in float32."""
    return _LayerNorm.apply(x.contiguous(), weight, bias, eps)


def block(x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
          norm_eps: float, weight1: Tensor, bias1: Tensor, grn_weight: Optional[Tensor], grn_bias: Optional[Tensor],
          grn_eps: float, weight2: Tensor, bias2: Tensor, scale: Optional[Tensor]) -> Tensor:
    """A ConvNeXt block: 7x7 depthwise convolution, norm, expansion, GELU, response normalisation, projection, shortcut.

    ``x + scale · (GRN(GELU(LayerNorm(depthwise(x)) W1ᵀ + b1)) W2ᵀ + b2)``

    The response normalisation multiplies every hidden channel of an image by one number, and so is applied to the columns
    of that image's copy of W2 instead of the hidden tensor; layer scale and stochastic depth to its rows.

    Args:
        x: Input, (N, H, W, C).
        depthwise_weight, depthwise_bias: Of the depthwise convolution, (C, 1, 7, 7) and (C,).
        norm_weight, norm_bias, norm_eps: Of the layer norm, (C,).
        weight1, bias1: Of the expansion, (J, C) and (J,).
        grn_weight, grn_bias, grn_eps: Of the global response normalisation of ConvNeXt-V2, (J,); None without it.
        weight2, bias2: Of the projection, (C, J) and (C,).
        scale: Layer scale times stochastic depth, (N, C); None for 1.

    Returns:
        The output, (N, H, W, C).
    """
    return _Block.apply(x.contiguous(), depthwise_weight, depthwise_bias, norm_weight, norm_bias, norm_eps, weight1, bias1,
                        grn_weight, grn_bias, grn_eps, weight2, bias2, scale)


class _LayerNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, rstd = ops_for(x).layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        params = any(ctx.needs_input_grad[1:3])
        x, *saved = ctx.saved_tensors
        return *ops_for(x).layer_norm_grad(dy.contiguous(), x, *saved, params, False)[:3], None


class _Block(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, depthwise_weight, depthwise_bias, norm_weight, norm_bias, norm_eps, weight1, bias1, grn_weight,
                grn_bias, grn_eps, weight2, bias2, scale):
        ops = ops_for(x)
        images, height, width, channels = x.shape
        taps = depthwise_weight.flatten(1).T.contiguous()
        u = ops.depthwise(x, taps, depthwise_bias, None, False)
        normed, mean, rstd = ops.layer_norm(u, norm_weight, norm_bias, norm_eps)
        hidden = torch.mm(normed.view(-1, channels), weight1.T).view(images, height * width, -1)
        activated, squares = ops.gelu(hidden, bias1, grn_weight is not None)
        norms, gains = (None, None) if grn_weight is None else ops.response(squares, grn_weight, grn_eps)
        weights, shift = ops.scaled_weights(images, weight2, scale, gains, grn_bias)
        projected = torch.bmm(activated, weights.mT).view_as(x)
        out = ops.residual(x, projected, bias2, shift, scale)
        ctx.save_for_backward(x, u, mean, rstd, hidden, norms, gains, weights, taps, norm_weight, norm_bias, weight1, bias1,
                              grn_weight, grn_bias, weight2, bias2, scale)
        ctx.grn_eps = grn_eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, u, mean, rstd, hidden, norms, gains, weights, taps, norm_weight, norm_bias, weight1, bias1, grn_weight, grn_bias,
         weight2, bias2, scale) = ctx.saved_tensors
        ops, needs, grads = ops_for(x), dict(zip(_BLOCK_INPUTS, ctx.needs_input_grad)), {}
        images, channels = len(x), x.shape[3]
        grad = grad.contiguous()
        dout = grad.view(images, -1, channels)

        # Projection and response normalisation: the gradients of both come from one product over the tokens
        pull = tokens = None
        if grn_bias is not None or needs['bias2'] or needs['scale']:
            tokens = dout.sum(1, dtype=mean.dtype)
        if needs['weight2'] or needs['scale'] or grn_weight is not None:
            products = torch.bmm(dout.mT, ops.gelu(hidden, bias1, False)[0])
            grads['weight2'], dgains = ops.weight_grad(products, weight2, scale, gains, tokens, grn_bias)
            if grn_weight is not None:
                pull, by_image = ops.response_grad(dgains, grn_weight, norms, ctx.grn_eps)
                grads['grn_weight'] = by_image.sum(0) if needs['grn_weight'] else None
            if needs['scale']:
                constants = bias2 if grn_bias is None else bias2 + (weight2 * grn_bias).sum(1)
                scaled = weight2 if gains is None else weight2 * gains[:, None]
                grads['scale'] = (products * scaled).sum(2) + tokens * constants
            del products
        if needs['bias2'] or needs['grn_bias']:
            grads['bias2'] = (tokens if scale is None else tokens * scale).sum(0)
            grads['grn_bias'] = grads['bias2'] @ weight2.to(tokens.dtype)

        # Expansion
        dhidden, grads['bias1'] = ops.gelu_grad(torch.bmm(dout, weights), hidden, bias1, pull, needs['bias1'])
        dhidden = dhidden.view(-1, dhidden.shape[2])

        # Norm, depthwise convolution and shortcut
        du, grads['norm_weight'], grads['norm_bias'], normed = ops.layer_norm_grad(
            torch.mm(dhidden, weight1).view_as(u), u, norm_weight, norm_bias, mean, rstd,
            needs['norm_weight'] or needs['norm_bias'], needs['weight1'])
        if needs['weight1']:
            grads['weight1'] = torch.mm(dhidden.T, normed.view(-1, channels))
        if needs['depthwise_weight']:
            grads['depthwise_weight'] = ops.depthwise_weight_grad(x, du).view(-1, 1, 7, 7)
        if needs['depthwise_bias']:
            grads['depthwise_bias'] = du.sum((0, 1, 2))
        if needs['x']:
            grads['x'] = ops.depthwise(du, taps, None, grad, True)
        return tuple(grads.get(name) if need else None for name, need in needs.items())


_BLOCK_INPUTS = ('x', 'depthwise_weight', 'depthwise_bias', 'norm_weight', 'norm_bias', 'norm_eps', 'weight1', 'bias1',
                 'grn_weight', 'grn_bias', 'grn_eps', 'weight2', 'bias2', 'scale')
