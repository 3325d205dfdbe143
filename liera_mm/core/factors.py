"""Shapes, products and decompositions of the tensors that a perturbation Δ is made of: pure functions."""
import math
from typing import List, Sequence, Tuple, Union

import torch
from torch import Tensor


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


def atom_shapes(weight_shape: torch.Size, groups: int, rank: int) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Shapes of the atoms A and their coefficients B, of a kernel as a matrix with a row for each pair of channels.

    A weight of shape ``(d0, d1, *kernel)`` is viewed as a matrix of ``d0 * d1`` rows and as many columns as the kernel has
    positions. There are no more atoms than the matrix has rows or columns.

    Args:
        weight_shape: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` for a transposed convolution.
        groups: Groups of the convolution; the shapes don't depend on them.
        rank: Number of atoms, at least 1.

    Returns:
        The shapes of A and B, as of :func:`factor_shapes`.

    Raises:
        TypeError: If the weight has no spatial extent.
    """
    d0, d1, *kernel = weight_shape
    rows, columns = d0 * d1, math.prod(kernel)
    if columns == 1:
        raise TypeError('it has no spatial extent, and atoms are filters in space')
    inner = min(rank, rows, columns)
    return (inner, columns), (rows, inner)


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


def side_by_side(terms: Sequence[Tuple[float, Tensor, Tensor]], inner: int) -> Tuple[Tensor, Tensor]:
    """A and B such that B A = Σ w · B A over the terms ``(w, A, B)``: (inner, m) and (n, inner), in the dtype of the terms.

    Args:
        terms: Weights and factors.
        inner: The sum of the inner dimensions; or n or m, where these are less.
    """
    weights, a, b = zip(*terms)
    a, b = torch.cat(a), torch.cat([w * factor.double() for w, factor in zip(weights, b)], 1)
    identity = torch.eye(inner, dtype=a.dtype, device=a.device)
    if len(a) > inner:
        a, b = (identity, b @ a.double()) if a.shape[1] == inner else (b @ a.double(), identity)
    return a.to(identity.dtype), b.to(identity.dtype)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """The tensor with each of its fibres along a dimension multiplied by a matrix ``(n, m)``: m becomes n there."""
    return torch.tensordot(matrix, tensor, ([1], [mode])).movedim(0, mode)


def tucker_factors(tensor: Tensor, ranks: Sequence[int]) -> Tuple[Tensor, List[Tensor]]:
    """Core and factors of a tensor's Tucker decomposition, truncated mode by mode (HOSVD).

    Its distance from the tensor, of d dimensions, is at most √d times that of the nearest one of these ranks. The factors
    have orthonormal columns. (Vannieuwenhoven et al., SIAM J. Sci. Comput. 34 (2012) A1027.)

    Args:
        tensor: The tensor, in float64.
        ranks: Of each of its modes, none above its size.

    Returns:
        The core, of the shape ``ranks``, and the factors, (size, rank) each.
    """
    core, factors = tensor, []
    for mode, rank in enumerate(ranks):
        unfolded = core.movedim(mode, 0).flatten(1)
        factors.append(torch.linalg.eigh(unfolded @ unfolded.T).eigenvectors[:, -rank:])
        core = mode_product(core, factors[-1].T, mode)
    return core, factors


def tucker_sum(terms: Sequence[Tuple[float, Tensor, Sequence[Tensor]]]) -> Tuple[Tensor, List[Tensor]]:
    """Core and factors such that core ×₁ A1 ×₂ A2 ... = Σ w · core ×₁ A1 ×₂ A2 ... over the terms ``(w, core, factors)``.

    The ranks of a mode add up, to the mode's size at most.
    """
    weights, cores, factors = zip(*terms)
    factors = [torch.cat(parts, 1).double() for parts in zip(*factors)]
    core = factors[0].new_zeros([factor.shape[1] for factor in factors])
    start = [0] * core.dim()
    for weight, part in zip(weights, cores):
        stop = [at + size for at, size in zip(start, part.shape)]
        core[tuple(map(slice, start, stop))] = weight * part.double()
        start = stop
    for mode, factor in enumerate(factors):
        size, rank = factor.shape
        if rank > size:
            core, factors[mode] = mode_product(core, factor, mode), torch.eye(size).to(factor)
    return core.to(cores[0].dtype).contiguous(), [factor.to(cores[0].dtype) for factor in factors]


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as another dtype can hold them, where what is above its largest number becomes that."""
    return values.clamp(max=torch.finfo(dtype).max).to(dtype).to(values.dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own precision where that is higher."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def is_intact(weight: Tensor) -> bool:
    """Whether a weight has values, all of them finite. LieRAHook refuses to train on those that are not, by name."""
    return not weight.is_meta and bool(torch.isfinite(weight).all())
