"""The Lie algebra side: parameterisations of the perturbation Δ of one weight.

Δ has the shape of the weight it perturbs and lives in a plain vector space. Every parameterisation is a small module that
holds the trained tensors; calling it gives Δ in float32 or better, and Δ is exactly zero at start.
"""
import math
from typing import Tuple

import torch
from torch import Tensor, nn


def factor_shapes(weight_shape: torch.Size, groups: int, rank: int) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Shapes of the low-rank factors A and B of a weight's matrix view.

    A weight of shape ``(d0, d1, *kernel)`` is viewed as a matrix of ``d0 / groups * p`` rows and ``d1 * groups * q``
    columns, with ``q`` the last kernel dimension and ``p`` the product of the others. For a square kernel ``p = q = k``
    this is the view behind the parameter counts of the paper's Tables 1 and 2: A is ``(rank * k, in * k)`` and B is
    ``(out / groups * k, rank * k)``. Linear and 1x1 weights reduce to ``(rank, in)`` and ``(out, rank)``. The inner
    dimension of kernels that are not square is ``rank * min(p, q)``: the rank that one ``p x q`` block can have.

    Args:
        weight_shape: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` for a transposed convolution.
        groups: Groups of the convolution, 1 for a linear layer.
        rank: Rank r of the factors, at least 1.

    Returns:
        The shapes of A and B; the product of their outer dimensions is the number of weights.
    """
    d0, d1, *kernel = weight_shape
    q = kernel[-1] if kernel else 1
    p = math.prod(kernel[:-1])
    inner = rank * min(p, q)
    return (inner, d1 * groups * q), (d0 // groups * p, inner)


def low_rank(a: Tensor, b: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Δ = scale · reshape(B A), the update of LoRA (Eq. 1 and 2) as an element of the Lie algebra."""
    return (b @ a).view(shape) * scale


class LowRank(nn.Module):
    """``method='lora'``: Δ = (alpha / rank) · reshape(B A), A Kaiming-uniform (a = √5) and B zero at start."""

    def __init__(self, weight: Tensor, groups: int, rank: int, alpha: float):
        super().__init__()
        a_shape, b_shape = factor_shapes(weight.shape, groups, rank)
        self.shape, self.rank, self.scale = weight.shape, rank, alpha / rank
        self.A = nn.Parameter(weight.new_empty(a_shape))
        self.B = nn.Parameter(weight.new_zeros(b_shape))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self) -> Tensor:
        return low_rank(at_least_float32(self.A), at_least_float32(self.B), self.scale, self.shape)


class Dense(nn.Module):
    """``method='dense'``: Δ itself is the parameter, in the shape of the weight, zero at start; rank and alpha are unused.

    For a depthwise kernel it has fewer parameters than the factors of any rank above 1, and contains all their Δ.
    """
    rank = None

    def __init__(self, weight: Tensor, groups: int, rank: int, alpha: float):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self) -> Tensor:
        return at_least_float32(self.delta)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own precision where that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


METHODS = dict(lora=LowRank, dense=Dense)
