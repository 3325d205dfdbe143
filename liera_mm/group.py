"""The Lie group side: how a perturbation Δ of the Lie algebra moves a frozen weight W.

The group is the set of tensors without zeros under the element-wise product ⊙ (Section 4.1 of the paper); its exponential
map is element-wise (Eq. 4). Every rule maps Δ = 0 to W, bit for bit.
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


UPDATES = dict(additive=additive, taylor=taylor, exp=exp)
MULTIPLICATIVE = ('taylor', 'exp')
