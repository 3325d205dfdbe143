"""The Lie algebra side: parameterisations of the perturbation Δ of one weight.

Δ has the shape of the weight it perturbs and lives in a plain vector space. Every parameterisation is a small module that
holds the trained tensors; calling it gives Δ in float32 or better, and Δ is exactly zero at start.
"""
import math
from typing import Callable, List, Optional, Sequence, Tuple, Union

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


def low_rank(a: Tensor, b: Tensor, scale: Union[float, Tensor], shape: torch.Size) -> Tensor:
    """Δ = scale · reshape(B A), the update of LoRA (Eq. 1 and 2) as an element of the Lie algebra."""
    return (b @ a).view(shape) * scale


def root_mean_square(weight: Tensor) -> Tensor:
    """The unit in which ``scale='relative'`` measures Δ, without dimensions and in float32 or better.

    It is 1 for a weight that has none: of zeros, which no multiplicative update moves, or with values that are not finite.
    """
    rms = weight.detach().double().square().mean().sqrt().to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where((rms >= torch.finfo(rms.dtype).tiny) & rms.isfinite(), rms, 1)


def leading_factors(matrix: Tensor, rank: int) -> Tuple[Tensor, Tensor]:
    """A = √S Vᵀ and B = U √S of a matrix's leading singular triplets, so that B A is its best approximation of that rank.

    See :func:`minor_factors`.
    """
    return _singular_factors(matrix, slice(0, rank))


def minor_factors(matrix: Tensor, rank: int) -> Tuple[Tensor, Tensor]:
    """A = √S Vᵀ and B = U √S of a matrix's last singular triplets, of those with a singular value that is no rounding error.

    By an eigendecomposition of the smaller Gram matrix in float64, many times faster than a singular value decomposition;
    on the CPU, where every process of a distributed training finds the same. A pair of singular vectors has the sign with
    which the largest entry of the shorter one is positive.

    Args:
        matrix: The matrix, ``(n, m)``.
        rank: Number of triplets; those with a singular value below 1e-6 of the largest are left out.

    Returns:
        A, ``(r, m)``, and B, ``(n, r)``, in float64 and on the matrix's device, with r at most ``rank``.
    """
    return _singular_factors(matrix, slice(-rank, None))


def _singular_factors(matrix: Tensor, chosen: slice) -> Tuple[Tensor, Tensor]:
    wide = matrix.double().cpu()
    tall = len(wide) > wide.shape[1]
    wide = wide.T if tall else wide
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    singular, vectors = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    count = int((singular > 1e-6 * singular[0]).sum())
    singular, vectors = singular[:count][chosen], vectors[:, :count][:, chosen]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    left = vectors * singular.sqrt()
    right = wide.T @ left / singular
    a, b = (left.T, right) if tall else (right.T, left)
    return a.to(matrix.device), b.to(matrix.device)


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

    Attributes:
        scale (float): alpha / rank.
        rms (Tensor | None): The root mean square of the frozen weight, by which a relative Δ is divided.
        unrestricted (bool): Whether every tensor is a Δ of this kind, by trained tensors that are known at once.
        rescales (bool): Whether :meth:`finish` has anything to do.
    """
    unrestricted = False
    rescales = False

    def __init__(self, weight: Tensor, groups: int, rank: int, alpha: float, transposed: bool = False,
                 relative: bool = False):
        super().__init__()
        self.shape, self.groups, self.rank, self.transposed = weight.shape, groups, rank, transposed
        self.scale = alpha / rank
        self.register_buffer('rms', at_least_float32(weight.new_ones(())) if relative else None)
        self.build(weight)
        self.reset(weight)

    def build(self, weight: Tensor) -> None:
        """Make the trained tensors, on the device and in the dtype of the weight, such that Δ is zero."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Compute again what is computed from the frozen weight, since that has changed."""
        if self.rms is not None:
            self.rms.copy_(root_mean_square(weight))

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
        delta = sum(w * other.delta.double() for w, other in terms)
        self.delta = nn.Parameter(delta.to(self.delta.dtype))


class LowRank(Perturbation):
    """``method='lora'``: Δ = (alpha / rank) · reshape(B A), A Kaiming-uniform (a = √5) and B zero at start."""

    def build(self, weight: Tensor) -> None:
        a_shape, b_shape = factor_shapes(weight.shape, self.groups, self.rank)
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
        factors = self.add_ranks(terms)
        self.A, self.B = map(nn.Parameter, side_by_side([(w, other.A, other.B) for w, other in factors]))

    def add_ranks(self, terms: Sequence[Tuple[float, Perturbation]]) -> List[Tuple[float, Perturbation]]:
        """Take the sum of the ranks for rank, and the scale that alpha / rank is, were alpha the sum too.

        Returns:
            The terms with their weights in units of the new scale.
        """
        self.rank = sum(other.rank for _, other in terms)
        self.scale = sum(other.scale * other.rank for _, other in terms) / self.rank
        return [(w * other.scale / self.scale, other) for w, other in terms]


class Pissa(LowRank):
    """``method='pissa'``: Δ = (alpha / rank) · reshape(B A - B0 A0), with A0 and B0 the leading singular triplets of W.

    A and B start at A0 and B0, which are kept beside them, so that Δ starts at zero under every update rule and never
    depends on repeating a decomposition. Where the factors have more rows than W has singular values, the rest of A is
    Kaiming-uniform and the rest of B zero.
    """
    start = staticmethod(leading_factors)

    def build(self, weight: Tensor) -> None:
        super().build(weight)
        self.register_buffer('A0', torch.empty_like(self.A))
        self.register_buffer('B0', torch.empty_like(self.B))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        if weight.is_meta or not torch.isfinite(weight).all():  # LieRAHook refuses to train on the latter, by name
            return
        a, b = (factor.to(self.A.dtype) for factor in self.start(weight.detach().reshape(self.matrix), len(self.A)))
        self.A[:len(a)], self.B[:, :len(a)] = a, b
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
        factors = self.add_ranks(terms)
        self.A0, self.B0 = side_by_side([(w, other.A0, other.B0) for w, other in factors])


class Milora(Pissa):
    """``method='milora'``: as ``pissa``, with the last singular triplets of W instead of the leading ones.

    MiLoRA (arXiv 2406.09044, Section 3) trains the minor singular components, and leaves to the principal ones what the
    pretrained weight knows. Triplets that are rounding errors are no start, and left out.
    """
    start = staticmethod(minor_factors)


class Dora(LowRank):
    """``method='dora'``: as ``lora``, then every output channel is scaled to a learned norm, ``magnitude``.

    The magnitude has one value an output channel and starts at the norm of the frozen weight.
    """
    rescales = True

    def build(self, weight: Tensor) -> None:
        super().build(weight)
        self.magnitude = nn.Parameter(torch.empty_like(self.norm(at_least_float32(weight))))

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        super().reset(weight)
        self.magnitude.copy_(self.norm(at_least_float32(weight)))

    def norm(self, weight: Tensor) -> Tensor:
        """Euclidean norm of every output channel, of shape (out,); where it overflows, the largest number there is."""
        norm, unit = _norm(self._channels(weight))
        return (norm * unit).clamp(max=torch.finfo(norm.dtype).max)

    def finish(self, moved: Tensor) -> Tensor:
        channels = self._channels(moved)
        norm, unit = _norm(channels.detach())
        # A channel whose norm is zero or no ordinary number stays as it is
        scaled = (norm * unit >= torch.finfo(norm.dtype).tiny) & (norm * unit).isfinite()
        # The derivative of the branch that where() does not take must be finite too
        norm, _ = _norm(torch.where(scaled[:, None], channels, 1))
        ratio = torch.where(scaled, at_least_float32(self.magnitude) / norm, unit)
        return moved / self._by_channel(unit) * self._by_channel(ratio)

    def project(self, delta: Tensor, target: Tensor) -> None:
        super().project(delta, target)
        self.magnitude.copy_(self.norm(target))

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
            logarithm = logarithm + w * torch.where(norm > 0, at_least_float32(other.magnitude) / norm, 1).log()
        self.magnitude = nn.Parameter((self.norm(move(self())) * logarithm.exp()).to(self.magnitude.dtype))


def _norm(rows: Tensor) -> Tuple[Tensor, Tensor]:
    """Euclidean norms of rows and the units they are in, powers of two in which no square over- or underflows.

    The unit is one for ordinary rows. Units have no derivative.
    """
    _, exponent = math.frexp(torch.finfo(rows.dtype).max)
    largest = rows.detach().abs().amax(1)
    unit = torch.where(largest < 2.**(-exponent // 4), 2.**(-exponent * 5 // 8), torch.ones_like(largest))
    unit = torch.where(largest > 2.**(exponent // 4), 2.**(exponent * 5 // 8), unit)
    return (rows / unit[:, None]).norm(dim=1), unit


def side_by_side(terms: Sequence[Tuple[float, Tensor, Tensor]]) -> Tuple[Tensor, Tensor]:
    """A and B such that B A = Σ w · B A over the terms ``(w, A, B)``: (Σ r, m) and (n, Σ r), in the dtype of the terms."""
    weights, a, b = zip(*terms)
    return torch.cat(a), torch.cat([(w * factor.double()).to(factor.dtype) for w, factor in zip(weights, b)], 1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own precision where that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


METHODS = dict(lora=LowRank, pissa=Pissa, milora=Milora, dora=Dora, dense=Dense)
