"""Focal losses (Lin et al. 2017, eq. 5) of N samples and C classes; a target outside of 0 … C - 1 is of no class.

Where mmcv cuts off the logarithm of a probability that has underflowed, these are exact for any logit.
"""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import same_precision


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of the sigmoid p of every logit.

    Args:
        input (Tensor): (N, C), logits.
        target (Tensor): (N,) int64.
        weight (Tensor): (C,), factors of the losses of samples by their target; or empty.
        output (Tensor): (N, C), overwritten by -alpha (1 - p)^gamma log(p) at the targets, and by
            -(1 - alpha) p^gamma log(1 - p) elsewhere.
    """
    logits, is_target = _signed(input, target)
    losses = torch.sigmoid(-logits).pow_(gamma).mul_(F.logsigmoid(logits))
    losses.mul_(_choose(is_target, -alpha, alpha - 1, logits))
    output.copy_(_weighted(losses, target, weight))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by its input: overwrites ``grad_input`` (N, C)."""
    logits, is_target = _signed(input, target)
    miss = torch.sigmoid(-logits)
    slopes = F.logsigmoid(logits).mul_(1 - miss).mul_(gamma).sub_(miss)
    slopes.mul_(miss.pow_(gamma)).mul_(_choose(is_target, alpha, alpha - 1, logits))
    grad_input.copy_(_weighted(slopes, target, weight))


def softmax_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Focal loss of the softmax p of every sample's target; 0 for a target of no class.

    Args:
        input (Tensor): (N, C), probabilities.
        target (Tensor): (N,) int64.
        weight (Tensor): (C,), factors of the losses by their target; or empty.
        output (Tensor): (N,), overwritten by -alpha (1 - p)^gamma log(p).
    """
    p, valid = _probabilities(input, target)
    losses = (1 - p).pow_(gamma).mul_(p.log()).mul_(-alpha)
    output.copy_(_weighted(losses, target, weight) * valid)


def softmax_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Derivative of :func:`softmax_focal_loss_forward` by the logits.

    Args:
        buff (Tensor): (N,), overwritten by the derivative by log(p).
        grad_input (Tensor): (N, C), overwritten by the derivative by the logits.
    """
    p, valid = _probabilities(input, target)
    miss = 1 - p
    slopes = miss.pow(gamma).neg_()
    if gamma:
        # At p = 1 the limit for gamma > 0 is 0, where the power may be infinite.
        slopes += torch.where(miss > 0, gamma * miss.pow(gamma - 1) * p * p.log(), 0)
    slopes = _weighted(slopes.mul_(alpha), target, weight) * valid
    buff.copy_(slopes)
    is_target = target[:, None] == torch.arange(input.shape[1], device=input.device)
    grad_input.copy_((is_target.to(p.dtype) - input) * slopes[:, None])


def _signed(input: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Logits whose sigmoid should be 1, (N, C), and where the targets are."""
    logits, = same_precision(input)
    is_target = target[:, None] == torch.arange(input.shape[1], device=input.device)
    return torch.where(is_target, logits, -logits), is_target


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One of two numbers, in the precision of a tensor: between Python's own, torch would choose in float32."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def _probabilities(input: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Probability of every target, (N,), 1 for a target of no class; and which targets are of a class."""
    probabilities, = same_precision(input)
    valid = (target >= 0) & (target < input.shape[1])
    if not input.numel():
        return probabilities.new_ones(len(target)), valid
    p = probabilities.gather(1, target.where(valid, 0)[:, None])[:, 0]
    return p.clamp(min=torch.finfo(torch.float32).tiny).where(valid, 1), valid


def _weighted(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Values (N,) or (N, C), multiplied by their targets' weights; by 1 where the target is of no class."""
    if not weight.numel():
        return values
    valid = (target >= 0) & (target < len(weight))
    weights = weight[target.where(valid, 0)].to(values.dtype).where(valid, 1)
    return values.mul_(weights.view(-1, *[1] * (values.dim() - 1)))
