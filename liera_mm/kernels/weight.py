"""From factors to effective weights in one pass, and from their gradients straight to those of the factors.

Nothing of a weight's size is kept for the backward pass: Δ is computed again from the factors.
"""
from typing import List, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import low_rank
from ..group import UPDATES
from . import ops_for


def moved_weights(weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float, update: str,
                  dtype: torch.dtype) -> List[Tensor]:
    """Weights moved by their Δ = scale · reshape(B A): ``UPDATES[update](weight, Δ)``, computed in float32 or better.

    Args:
        weights: Frozen weights of one shape and dtype.
        a, b: Their factors, in float32 or better: ``(inner, columns)`` and ``(rows, inner)`` of a weight's matrix view.
        scale: Factor of every Δ.
        update: Name of the update rule.
        dtype: Of the results, for instance that of autocast.

    Returns:
        The moved weights, in the shape of the frozen ones and contiguous.
    """
    return list(_MovedWeights.apply(scale, update, dtype, *weights, *a, *b))


class _MovedWeights(torch.autograd.Function):

    @staticmethod
    def forward(ctx, scale, update, dtype, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.update = scale, update
        weights, a, b = _split(tensors)
        return ops_for(*weights, a, b).moved_weights(weights, a, b, scale, update, dtype).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        weights, a, b = _split(ctx.saved_tensors)
        layers, grads = len(weights), _stack(grads)
        weight_grads = [None] * layers
        if any(ctx.needs_input_grad[3:3 + layers]):
            weight_grads = [_weight_grad(*args, ctx.scale, ctx.update) for args in zip(weights, a, b, grads)]
        slopes = ops_for(*weights, a, b).delta_grads(weights, a, b, ctx.scale, ctx.update, grads)
        return None, None, None, *weight_grads, *(ctx.scale * (b.mT @ slopes)), *(ctx.scale * (slopes @ a.mT))


def _split(tensors):
    layers = len(tensors) // 3
    weights = [weight.contiguous() for weight in tensors[:layers]]
    return weights, _stack(tensors[layers:2 * layers]), _stack(tensors[2 * layers:])


def _stack(tensors):
    return torch.stack(tensors).contiguous() if len(tensors) > 1 else tensors[0][None].contiguous()


def _weight_grad(weight, a, b, grad, scale, update):
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        moved = UPDATES[update](leaf, low_rank(a, b, scale, weight.shape))
    return torch.autograd.grad(moved, leaf, grad.to(moved.dtype))[0]
