"""The Lie group side: how a perturbation Δ of the Lie algebra moves a frozen weight W.

The group is the set of tensors without zeros under the element-wise product ⊙ (Section 4.1 of the paper); its exponential
map is element-wise (Eq. 4). Every rule maps Δ = 0 to W, bit for bit; its inverse gives the Δ between two weights.
"""
import torch
from torch import Tensor


def additive(weight: Tensor, delta: Tensor) -> Tensor:
    """W + Δ: LoRA and its relatives (Eq. 1 and 2), which do not stay in the group."""
    return weight + delta


def taylor(weight: Tensor, delta: Tensor) -> Tensor:
    """W ⊙ (1 + Δ): LieRA, the first order of :func:`exp` (Eq. 8); leaves the group where Δ ≤ -1."""
    return weight * (1 + delta)


def exp(weight: Tensor, delta: Tensor) -> Tensor:
    """W ⊙ exp(Δ): the exact group update (Eq. 5 and 6), which never changes a sign."""
    return weight * torch.exp(delta)


def additive_inverse(weight: Tensor, moved: Tensor) -> Tensor:
    """The Δ of :func:`additive` between two weights."""
    return moved - weight


def taylor_inverse(weight: Tensor, moved: Tensor) -> Tensor:
    """The Δ of :func:`taylor` between two weights; zero where ``weight`` is, which no Δ moves."""
    return torch.where(weight == 0, 0, moved / weight - 1)


def exp_inverse(weight: Tensor, moved: Tensor) -> Tensor:
    """The Δ of :func:`exp` between two weights, the logarithm of the group.

    Zero where ``weight`` is, which no Δ moves. Where the sign changes, which no Δ does, it takes the weight as near to
    zero as float32 tells apart from it.
    """
    smallest = torch.finfo(torch.float32).eps
    return torch.where(weight == 0, 0, torch.log((moved / weight).clamp(min=smallest)))


UPDATES = dict(additive=additive, taylor=taylor, exp=exp)
INVERSES = dict(additive=additive_inverse, taylor=taylor_inverse, exp=exp_inverse)
# Derivatives of the moved weight by Δ, all element-wise
SLOPES = dict(additive=lambda weight, delta: 1, taylor=lambda weight, delta: weight, exp=exp)
MULTIPLICATIVE = ('taylor', 'exp')
