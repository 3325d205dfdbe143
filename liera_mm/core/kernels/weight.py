"""From factors to effective weights in one pass, and from their gradients straight to those of the factors.

Nothing of a weight's size is kept for the backward pass: Δ is computed again from the factors.
"""
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from ..factors import low_rank
from ..group import UPDATES
from . import builtin_only, ops_for, torch_ops


def moved_weights(weights: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scale: float, update: str,
                  dtype: torch.dtype, rms: Optional[Sequence[Tensor]] = None) -> List[Tensor]:
    """Weights moved by their Δ = scale / rms · reshape(B A): ``UPDATES[update](weight, Δ)``, in float32 or better.

    Args:
        weights: Frozen weights of one shape and dtype.
        a, b: Their factors, in float32 or better: ``(inner, columns)`` and ``(rows, inner)`` of a weight's matrix view.
        scale: Factor of every Δ.
        update: Name of the update rule.
        dtype: Of the results, for instance that of autocast.
        rms: The unit of every weight's Δ, without dimensions and in the factors' precision; None for 1.

    Returns:
        The moved weights, in the shape of the frozen ones and contiguous.
    """
    return list(_MovedWeights.apply(scale, update, dtype, len(weights), *weights, *a, *b, *rms or ()))


class _MovedWeights(torch.autograd.Function):

    @staticmethod
    def forward(ctx, scale, update, dtype, layers, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.update, ctx.layers = scale, update, layers
        weights, a, b, rms = _split(layers, tensors)
        return ops_for(*weights, a, b).moved_weights(weights, a, b, scale, rms, update, dtype).unbind()

    @staticmethod
    def backward(ctx, *grads):
        weights, a, b, rms = _split(ctx.layers, ctx.saved_tensors)
        grads = _stack(grads)
        weight_grads = [None] * ctx.layers
        if any(ctx.needs_input_grad[4:4 + ctx.layers]):
            weight_grads = [_weight_grad(*args, ctx.scale / unit, ctx.update)
                            for *args, unit in zip(weights, a, b, grads, rms or [1] * ctx.layers)]
        ops = torch_ops if _twice() else ops_for(*weights, a, b)
        products = ops.product_grads(weights, a, b, ctx.scale, rms, ctx.update, grads)
        return None, None, None, None, *weight_grads, *(b.mT @ products), *(products @ a.mT), *[None] * len(rms or ())


def rescaled(rows: Tensor, norms: Tensor, precision: torch.dtype) -> Tensor:
    """Rows of a matrix, scaled to norms of their own.

    A row whose norm is zero or no ordinary number stays as it is.

    Args:
        rows: Of shape (out, values), in float32 or better.
        norms: Of shape (out,), in the precision of the rows.
        precision: In which :func:`row_norms` were stored: rows that are scaled to those again stay as they are, bit for bit.
    """
    return torch_ops.rescaled(rows, norms, precision)[0] if builtin_only() else _Rescaled.apply(rows, norms, precision)


@torch.no_grad()
def row_norms(rows: Tensor, precision: torch.dtype) -> Tensor:
    """The Euclidean norms that rows have for :func:`rescaled`, of shape (out,)."""
    ones = rows.new_ones(len(rows), dtype=torch.promote_types(rows.dtype, precision))
    return ops_for(rows, ones).rescaled(rows, ones, precision)[1]


class _Rescaled(torch.autograd.Function):

    @staticmethod
    def forward(ctx, rows, norms, precision):
        ctx.save_for_backward(rows, norms)
        ctx.precision = precision
        return ops_for(rows, norms).rescaled(rows, norms, precision)[0]

    @staticmethod
    def backward(ctx, grad):
        rows, norms = ctx.saved_tensors
        if _twice():
            wanted = [tensor for tensor in (rows, norms) if tensor.requires_grad]
            result, _ = torch_ops.rescaled(rows, norms, ctx.precision)
            grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
            return *(next(grads) if tensor.requires_grad else None for tensor in (rows, norms)), None
        return *ops_for(rows, norms).rescaled_grad(rows, norms, ctx.precision, grad), None


def _twice() -> bool:
    """Whether gradients will be differentiated (``create_graph``), for which they are made of operators of torch alone."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _split(layers, tensors):
    weights = [weight.contiguous() for weight in tensors[:layers]]
    a, b = (_stack(tensors[start:start + layers]) for start in (layers, 2 * layers))
    return weights, a, b, tensors[3 * layers:] or None


def _stack(tensors):
    return torch.stack(tensors).contiguous() if len(tensors) > 1 else tensors[0][None].contiguous()


def _weight_grad(weight, a, b, grad, scale, update):
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        moved = UPDATES[update](leaf, low_rank(a, b, scale, weight.shape))
    return torch.autograd.grad(moved, leaf, grad.to(moved.dtype), create_graph=_twice())[0]
