"""The Lie algebra side: parameterisations of the perturbation Δ of one weight.

Δ has the shape of the weight it perturbs and lives in a plain vector space. Every parameterisation is a small module that
holds the trained tensors; calling it gives Δ in float32 or better, and Δ is exactly zero at start.
"""
import functools
import math
from typing import Callable, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from .factors import (
    at_least_float32,
    atom_shapes,
    factor_shapes,
    is_intact,
    leading_factors,
    minor_factors,
    rounded,
    side_by_side,
    tucker_factors,
    tucker_sum,
)
from .kernels.weight import rescaled, row_norms
from .perturbation import Perturbation


class Dense(Perturbation):
    """``method='dense'``: Δ itself, in its unit, is the parameter, zero at start; rank and alpha are unused.

    For a depthwise kernel it has fewer parameters than the factors of any rank above 1, and contains all their Δ.
    """
    unrestricted = True

    def build(self, weight: Tensor) -> None:
        self.rank, self.scale = None, 1.
        self.delta = nn.Parameter(torch.zeros_like(weight))

    def forward(self) -> Tensor:
        return at_least_float32(self.delta) * self.factor

    @property
    def matrix(self) -> Tuple[int, int]:
        (_, columns), (rows, _) = factor_shapes(self.shape, self.groups, rank=1)
        return rows, columns

    @property
    def delta_rank(self) -> int:
        return min(self.matrix)

    def project(self, delta: Tensor, target: Tensor) -> None:
        self.delta.copy_(delta / self.factor)

    def combine(self, terms: Sequence[Tuple[float, Perturbation]], move: Callable[[Tensor], Tensor]) -> None:
        delta = sum(w * self.ratio(other) * other.delta.double() for w, other in terms)
        self.delta = nn.Parameter(delta.to(self.delta.dtype))


class LowRank(Perturbation):
    """``method='lora'``: Δ = (alpha / rank) · reshape(B A), A Kaiming-uniform (a = √5) and B zero at start."""
    view = staticmethod(factor_shapes)

    @classmethod
    def check(cls, shape: torch.Size) -> None:
        cls.view(shape, groups=1, rank=1)

    def build(self, weight: Tensor) -> None:
        a_shape, b_shape = self.view(weight.shape, self.groups, self.rank)
        self.A = nn.Parameter(weight.new_empty(a_shape))
        self.B = nn.Parameter(weight.new_zeros(b_shape))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def factors(self) -> Tuple[Tensor, Tensor]:
        return at_least_float32(self.A), at_least_float32(self.B)

    @property
    def oversized(self) -> bool:
        return len(self.A) > min(self.matrix)

    def project(self, delta: Tensor, target: Tensor) -> None:
        a, b = leading_factors(self.product(delta), len(self.A))
        self.A.zero_()[:len(a)] = a
        self.B.zero_()[:, :len(a)] = b

    def product(self, delta: Tensor) -> Tensor:
        """The B A that a Δ takes."""
        return (delta / self.factor).reshape(self.matrix)

    def combine(self, terms: Sequence[Tuple[float, Perturbation]], move: Callable[[Tensor], Tensor]) -> None:
        self.add_factors(terms, 'A', 'B')

    def add_factors(self, terms: Sequence[Tuple[float, Perturbation]], *names: str) -> None:
        """Put the factors of these names side by side."""
        terms = [(w, *(getattr(other, name) for name in names)) for w, other in self.add_ranks(terms)]
        (inner, _), _ = self.view(self.shape, self.groups, self.rank)
        for name, factor in zip(names, side_by_side(terms, inner)):
            setattr(self, name, nn.Parameter(factor) if name in self._parameters else factor)


class Pissa(LowRank):
    """``method='pissa'``: Δ = (alpha / rank) · reshape(B A - B0 A0), with A0 and B0 the leading singular triplets of W.

    A and B start at A0 and B0, which are kept beside them, so that Δ starts at zero under every update rule and never
    depends on repeating a decomposition. Where the factors have more rows than W has singular values, the rest of A is
    Kaiming-uniform and the rest of B zero.
    """
    start = staticmethod(leading_factors)

    def build(self, weight: Tensor) -> None:
        super().build(weight)
        self.register_buffer('A0', torch.zeros_like(self.A))
        self.register_buffer('B0', torch.zeros_like(self.B))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        if not is_intact(weight):
            return
        a, b = (factor.to(self.A.dtype) for factor in self.start(weight.detach().reshape(self.matrix), len(self.A)))
        self.A[:len(a)], self.B.zero_()[:, :len(a)] = a, b
        self.A0.copy_(self.A)
        self.B0.copy_(self.B)

    def factors(self) -> Tuple[Tensor, Tensor]:
        a, b, a0, b0 = map(at_least_float32, (self.A, self.B, self.A0, self.B0))
        # B A - B0 A0 as one product, such that it is zero bit for bit at the start
        return torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1)

    def product(self, delta: Tensor) -> Tensor:
        return super().product(delta) + self.B0 @ self.A0

    def combine(self, terms: Sequence[Tuple[float, Perturbation]], move: Callable[[Tensor], Tensor]) -> None:
        super().combine(terms, move)
        self.add_factors(terms, 'A0', 'B0')


class Milora(Pissa):
    """``method='milora'``: as ``pissa``, with the last singular triplets of W instead of the leading ones.

    MiLoRA (arXiv 2406.09044, Section 3) trains the minor singular components, and leaves to the principal ones what the
    pretrained weight knows. Triplets that are rounding errors are no start, and left out.
    """
    start = staticmethod(minor_factors)


class Dora(LowRank):
    """``method='dora'``: as ``lora``, then every output channel is scaled to a learned norm, ``magnitude``.

    The magnitude has one value an output channel and starts at the norm of the frozen weight. A relative one is in units of
    that norm and starts at one: an optimizer's step of a fixed size would otherwise multiply a small norm.

    Attributes:
        norms (Tensor | None): The norms of the frozen weight's output channels, of shape (out,), if Δ is relative.
    """
    rescales = True

    def build(self, weight: Tensor) -> None:
        super().build(weight)
        self.magnitude = nn.Parameter(self._channels(at_least_float32(weight.detach()))[:, 0].clone())
        self.register_buffer('norms', None if self.rms is None else torch.ones_like(self.magnitude))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        norm = rounded(self.norm(at_least_float32(weight)), self.magnitude.dtype)
        if self.norms is not None:
            self.norms.copy_(norm)
        self.magnitude.copy_(self._in_units(norm))

    @property
    def learned_norm(self) -> Tensor:
        """The norm of every output channel of the effective weight, of shape (out,)."""
        magnitude = at_least_float32(self.magnitude)
        return magnitude if self.norms is None else magnitude * at_least_float32(self.norms)

    @torch.no_grad()
    def at_start(self, weight: Tensor) -> bool:
        norm = rounded(self.norm(at_least_float32(weight)), self.magnitude.dtype)
        # Both may have been in bfloat16 since
        return super().at_start(weight) and torch.allclose(self.learned_norm, norm, rtol=2**-7, atol=0, equal_nan=True)

    def norm(self, weight: Tensor) -> Tensor:
        """Euclidean norm of every output channel, of shape (out,); where it overflows, the largest number there is."""
        norm = row_norms(self._channels(weight), self.magnitude.dtype)
        return norm.clamp(max=torch.finfo(norm.dtype).max)

    def finish(self, moved: Tensor) -> Tensor:
        rows = rescaled(self._channels(moved), self.learned_norm, self.magnitude.dtype)
        if not self.transposed:
            return rows.reshape(self.shape)
        return rows.unflatten(0, (self.groups, -1)).unflatten(2, (-1, *self.shape[2:])).transpose(1, 2).flatten(0, 1)

    def starts(self, weight: Tensor, target: Tensor) -> List[Tensor]:
        norm = self.norm(target)
        return [target * self._by_channel(torch.where(norm > 0, self.norm(weight) / norm, 1)), target]

    def project(self, delta: Tensor, target: Tensor) -> None:
        super().project(delta, target)
        self.magnitude.copy_(self._in_units(self.norm(target)))

    def _in_units(self, norm: Tensor) -> Tensor:
        """The magnitude that makes a norm; one where that of the frozen weight is zero, and no magnitude has an effect."""
        if self.norms is None:
            return norm
        return torch.where(self.norms > 0, norm / at_least_float32(self.norms), 1)

    def _channels(self, weight: Tensor) -> Tensor:
        """The weight as (out, values of an output channel)."""
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        return weight.flatten(1)

    def _by_channel(self, values: Tensor) -> Tensor:
        """Values of shape (out,) in a shape that multiplies every output channel of the weight by its own."""
        kernel = [1] * (len(self.shape) - 2)
        if self.transposed:
            values = values.view(self.groups, 1, -1).expand(-1, self.shape[0] // self.groups, -1)
            return values.reshape(self.shape[0], -1, *kernel)
        return values.view(-1, 1, *kernel)

    def combine(self, terms: Sequence[Tuple[float, Perturbation]], move: Callable[[Tensor], Tensor]) -> None:
        super().combine(terms, move)
        logarithm = 0
        for w, other in terms:
            if (other.magnitude <= 0).any():
                raise ValueError('a magnitude is not positive, and has no logarithm to sum')
            norm = self.norm(move(other()))
            logarithm = logarithm + w * torch.where(norm > 0, other.learned_norm / norm, 1).log()
        norm = self.norm(move(self())) * logarithm.exp()
        self.magnitude = nn.Parameter(self._in_units(norm).to(self.magnitude.dtype))


class Tucker(Perturbation):
    """``method='tucker'``, FLoRA (arXiv 2405.14739): Δ = (alpha / rank) · G ×₁ A1 ×₂ A2 ×₃ ..., in the shape of the weight.

    A factor is (size, rank) of its dimension, the core G of the shape of the ranks: ``rank`` for the channels, which is that
    of the scale, and ``kernel_rank`` for the kernel, or the size where that is less. G is zero at start. Factors begin as in
    the authors' code (Kaiming-normal, a = √3), those of full rank at the identity. For a linear layer Δ is A1 G A2ᵀ.
    """
    options = ('kernel_rank', )

    def build(self, weight: Tensor, kernel_rank: int = 2) -> None:
        ranks = [self.rank] * 2 + [kernel_rank] * (weight.dim() - 2)
        self.G = nn.Parameter(weight.new_zeros([min(pair) for pair in zip(ranks, weight.shape)]))
        for name, *shape in zip(self.modes, weight.shape, self.core):
            factor = nn.Parameter(weight.new_empty(shape))
            self.register_parameter(name, factor)
            if shape[0] == shape[1]:
                nn.init.eye_(factor)
            else:
                nn.init.kaiming_normal_(factor, a=math.sqrt(3))

    @property
    def modes(self) -> List[str]:
        """Names of the factors."""
        return [f'A{mode}' for mode in range(1, len(self.shape) + 1)]

    @property
    def core(self) -> Tuple[int, ...]:
        return tuple(self.G.shape)

    def factors(self) -> Tuple[Tensor, Tensor]:
        first, *others = (at_least_float32(getattr(self, name)) for name in self.modes)
        core, others = at_least_float32(self.G).flatten(1), functools.reduce(torch.kron, others)
        if core.shape[0] <= core.shape[1]:
            return core @ others.T, first
        return others.T, first @ core

    def project(self, delta: Tensor, target: Tensor) -> None:
        core, factors = tucker_factors(delta / self.factor, self.core)
        # All of one size, or a search from here would take many steps
        unit = core.norm()**(1 / (1 + len(factors))) or 1
        self.G.copy_(core / unit**len(factors))
        for name, factor in zip(self.modes, factors):
            getattr(self, name).copy_(factor * unit)

    def combine(self, terms: Sequence[Tuple[float, Perturbation]], move: Callable[[Tensor], Tensor]) -> None:
        core, factors = tucker_sum([(w, other.G, [getattr(other, name) for name in self.modes])
                                    for w, other in self.add_ranks(terms)])
        for name, tensor in zip(['G', *self.modes], [core, *factors]):
            setattr(self, name, nn.Parameter(tensor))


class Atom(LowRank):
    """``method='atom'``, filter subspace (arXiv 2403.00269): of a kernel as coefficients times few filters, these train.

    Δ = (alpha / rank) · reshape(B A) with A the change of the filters, called atoms, zero at start. Their coefficients B are
    B of :func:`~liera_mm.core.factors.leading_factors` of the frozen weight as the matrix of
    :func:`~liera_mm.core.factors.atom_shapes`, and are kept, so that Δ never depends on repeating a decomposition.
    """
    view = staticmethod(atom_shapes)
    needs_weight = True

    def build(self, weight: Tensor) -> None:
        a_shape, b_shape = self.view(weight.shape, self.groups, self.rank)
        self.A = nn.Parameter(weight.new_zeros(a_shape))
        self.register_buffer('B', weight.new_zeros(b_shape))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        if is_intact(weight):
            _, b = leading_factors(weight.detach().reshape(self.matrix), len(self.A))
            self.B.zero_()[:, :b.shape[1]] = b

    def project(self, delta: Tensor, target: Tensor) -> None:
        self.A.copy_(torch.linalg.pinv(self.B) @ self.product(delta))


class AtomPissa(Pissa):
    """``method='atom-pissa'``: as ``atom``, with coefficients that train too; as ``pissa``, of the matrix of ``atom``."""
    view = staticmethod(atom_shapes)


METHODS = {
    'lora': LowRank,
    'pissa': Pissa,
    'milora': Milora,
    'dora': Dora,
    'tucker': Tucker,
    'atom': Atom,
    'atom-pissa': AtomPissa,
    'dense': Dense,
}
