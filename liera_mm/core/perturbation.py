"""What every parameterisation of the perturbation Δ of a weight has."""
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .factors import at_least_float32, low_rank, root_mean_square


class Perturbation(nn.Module):
    """What is learned about one weight; calling it gives Δ, in the shape of the weight and in float32 or better.

    Args:
        weight: The frozen weight, ``(out, in / groups, *kernel)`` (of a transposed convolution: in and out exchanged).
        groups: Groups of the convolution, 1 for a linear layer.
        rank: Rank r of the factors.
        alpha: Numerator of the scale alpha / rank of Δ.
        transposed: Whether the weight is of a transposed convolution.
        relative: Whether Δ is in units of the weight's root mean square, such that a multiplicative update moves the
            weight as far as an additive one would.
        options: What the parameterisation takes beside these, by the names in ``options``.

    Attributes:
        options (tuple[str]): Settings of :func:`liera_mm.adapt` for this parameterisation alone.
        scale (float): alpha / rank.
        rms (Tensor | None): The root mean square of the frozen weight, by which a relative Δ is divided.
        unrestricted (bool): Whether every tensor is a Δ of this kind, by trained tensors that are known at once.
        rescales (bool): Whether :meth:`finish` has anything to do.
        needs_weight (bool): Whether Δ can only be zero where all of the frozen weight is.
    """
    options: Tuple[str, ...] = ()
    unrestricted = False
    rescales = False
    needs_weight = False

    def __init__(self, weight: Tensor, groups: int, rank: int, alpha: float, transposed: bool = False,
                 relative: bool = False, **options: Any):
        super().__init__()
        self.shape, self.groups, self.rank, self.transposed = weight.shape, groups, rank, transposed
        self.scale, self.relative, self.given = alpha / rank, relative, options
        self.begin(weight)

    def begin(self, weight: Tensor) -> None:
        """Make all tensors, on the device and in the dtype of the weight."""
        self.register_buffer('rms', at_least_float32(weight.new_ones(())) if self.relative else None)
        self.build(weight, **self.given)
        self.reset(weight)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        rms = self.rms
        super()._apply(*args, **kwargs)
        if rms is not None and not rms.is_meta:  # half precision could take it for zero
            self.rms = rms.to(self.rms.device, torch.promote_types(self.rms.dtype, torch.float32))
        return self

    @classmethod
    def check(cls, shape: torch.Size) -> None:
        """Raise a TypeError if there is no such perturbation of weights of a shape."""

    def build(self, weight: Tensor, **options: Any) -> None:
        """Make the trained tensors, on the device and in the dtype of the weight, such that Δ is zero."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Compute again what is computed from the frozen weight, since that has changed."""
        if self.rms is not None:
            self.rms.copy_(root_mean_square(weight))

    @torch.no_grad()
    def at_start(self, weight: Tensor) -> bool:
        """Whether nothing was trained, and all is as :meth:`reset` leaves it, up to rounding."""
        return not self().any()

    @property
    def is_meta(self) -> bool:
        """Whether its tensors have no values, as those of a model on the meta device."""
        return next(self.parameters()).is_meta

    @property
    def factor(self) -> Union[float, Tensor]:
        """What Δ is multiplied by: alpha / rank, and divided by the weight's root mean square if Δ is relative to it."""
        return self.scale if self.rms is None else self.scale / at_least_float32(self.rms)

    def factors(self) -> Optional[Tuple[Tensor, Tensor]]:
        """A and B such that Δ = factor · reshape(B A), in float32 or better; None if Δ is not of that form."""
        return None

    def forward(self) -> Tensor:
        return low_rank(*self.factors(), self.factor, self.shape)

    def finish(self, moved: Tensor) -> Tensor:
        """The effective weight, from the weight that the update rule has moved by Δ; for most they are the same."""
        return moved

    def starts(self, weight: Tensor, target: Tensor) -> List[Tensor]:
        """Weights that :meth:`finish` can make the target of: where a search for Δ begins."""
        return [target]

    @property
    def matrix(self) -> Tuple[int, int]:
        """Rows and columns of Δ as the matrix that the parameterisation is about."""
        a, b = self.factors()
        return len(b), a.shape[1]

    @property
    def delta_rank(self) -> int:
        """The largest rank that Δ can have as that matrix."""
        return min(*self.matrix, len(self.factors()[0]))

    @property
    def oversized(self) -> bool:
        """Whether its rank is above the dimensions of Δ, which then can be every tensor, and there are fewer weights."""
        return False

    @property
    def core(self) -> Optional[Tuple[int, ...]]:
        """The rank of every dimension of the weight, where each has one of its own."""
        return None

    def project(self, delta: Tensor, target: Tensor) -> None:
        """Take the Δ that is nearest to another, in Euclidean norm.

        Args:
            delta: The other, in the shape of the weight.
            target: The weight that it leads to.
        """
        raise NotImplementedError

    def combine(self, terms: Sequence[Tuple[float, 'Perturbation']], move: Callable[[Tensor], Tensor]) -> None:
        """Become Σ w · Δ of other perturbations of the same weight, of any rank; what trains has other tensors then.

        Args:
            terms: Each w, and its perturbation.
            move: The weight as the update rule moves it by a Δ.

        Raises:
            ValueError: If there is no such sum.
        """
        raise ValueError(f'perturbations of the kind {type(self).__name__} have no sum')

    def add_ranks(self, terms: Sequence[Tuple[float, 'Perturbation']]) -> List[Tuple[float, 'Perturbation']]:
        """Take the sum of the ranks for rank, and the scale that alpha / rank is, were alpha the sum too.

        Returns:
            The terms with their weights in units of the new scale.
        """
        self.rank = sum(other.rank for _, other in terms)
        self.scale = sum(other.scale * other.rank for _, other in terms) / self.rank
        return [(w * self.ratio(other), other) for w, other in terms]

    def ratio(self, other: 'Perturbation') -> float:
        """The factor of another's Δ as a multiple of that of its own; both are relative, or neither.

        Units differ where a weight was in another precision when an adapter started.
        """
        units = 1. if self.rms is None else (self.rms.double() / other.rms.double()).item()
        return other.scale / self.scale * units
