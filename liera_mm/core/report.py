"""Reports on trained perturbations: how far they have gone, and which rank the change of each weight has."""
import copy
import functools
import math
from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .adapted import adapted_layers
from .group import MULTIPLICATIVE, UPDATES
from .layers import AdaptedLayer
from .summary import kind_of, scale_of
from .wrappers import through_wrappers

QUANTILES = (.5, .9, .99, 1.)


class RangeReport(NamedTuple):
    """How far the perturbations of a model have gone.

    Attributes:
        max_delta: Largest absolute value in any Δ; 0 if there is none.
        max_delta_layer: Name of the layer that has it.
        sign_change_share: Share of the weights under ``taylor`` with Δ <= -1, where the update leaves the group.
        zero_weights: Number of frozen weights that are zero, which no multiplicative update can move.
    """
    max_delta: float
    max_delta_layer: str
    sign_change_share: float
    zero_weights: int


@functools.partial(through_wrappers, does='reads')
@torch.no_grad()
def range_report(model: nn.Module) -> RangeReport:
    """The state of every Δ in one report; see :class:`RangeReport`."""
    largest, where, changed, taylor_weights, zeros = -1.0, '', 0, 0, 0
    for name, layer in adapted_layers(model):
        delta = layer.adapter()
        peak = delta.abs().max().item()
        if not (peak <= largest or math.isnan(largest)):  # a NaN is the largest of all
            largest, where = peak, name
        if layer.update == 'taylor':
            changed += int((delta <= -1).sum())
            taylor_weights += delta.numel()
        if layer.update in MULTIPLICATIVE:
            zeros += int((layer.frozen_weight == 0).sum())
    return RangeReport(max(largest, 0.), where, changed / max(taylor_weights, 1), zeros)


@functools.partial(through_wrappers, does='reads')
@torch.no_grad()
def delta_histograms(model: nn.Module, exponents: List[float]) -> List[Tuple[str, List[float]]]:
    """For every adapted layer its name, and the shares of the entries of Δ by their size.

    Args:
        model: The adapted model.
        exponents: Edges of the bins of |Δ|, as powers of ten in rising order; the outermost bins take what lies beyond.

    Returns:
        Shares of all bins, which sum to 1; those of entries that are not finite are in the last.
    """
    inner, histograms = torch.tensor(exponents[1:-1], dtype=torch.float64), []
    for name, layer in adapted_layers(model):
        sizes = layer.adapter().abs().double().log10().nan_to_num(torch.inf, neginf=-torch.inf).flatten().cpu()
        counts = torch.bincount(torch.bucketize(sizes, inner, right=True), minlength=len(exponents) - 1)
        histograms.append((name, (counts / sizes.numel()).tolist()))
    return histograms


class LayerReport(NamedTuple):
    """What training has done to one layer's weight W. Norms are Frobenius norms.

    Attributes:
        layer: Name of the layer.
        kind: Its kind, see :func:`~liera_mm.core.summary.kind_of`.
        method: Name of the parameterisation of Δ.
        update: Name of the rule that applies Δ.
        scale: What Δ is measured in, see :func:`~liera_mm.core.summary.scale_of`.
        matrix: Rows n and columns m of the weight as the matrix that the method is about: for ``dense`` and low-rank factors
            the matrix view of :func:`~liera_mm.core.factors.factor_shapes`, for atoms that of
            :func:`~liera_mm.core.factors.atom_shapes`, for ``tucker`` a row for each index of the first dimension.
        delta_rank: Largest rank that Δ can have as a matrix: the rows of A, rank · k (PiSSA's two products: twice that), or
            min(n, m) where that is less. Under ``additive`` it is the rank capacity of the paper's Section 4.4.
        rank: Numerical rank of the weight's change, as a matrix, see :func:`numerical_rank`; 0 where nothing has changed,
            None where it is not finite. A multiplicative update can give more than ``delta_rank``, up to min(n, m).
        relative_change: ‖W' - W‖ / ‖W‖ with the updated weight W', by which updates can be compared; None where it is not
            finite, as with a weight of zeros.
        delta_quantiles: |Δ| that the shares ``QUANTILES`` of its entries do not exceed; the last is the largest. In units of
            the weight under ``additive``, without a unit otherwise.
        taylor_error: ‖exp(Δ) - 1 - Δ‖, what the Taylor form (Eq. 8) leaves out; None under ``additive``.
        relative_taylor_error: The same as a share of ‖Δ‖; None under ``additive``.
        sign_change_share: Share of the weights with Δ <= -1, where ``taylor`` leaves the group; None under other updates.
        parameters: Number of trained parameters of the perturbation.
        weights: Number of weights that they perturb.
        core: The rank of each dimension of the weight, for ``tucker``; None for methods without.
    """
    layer: str
    kind: str
    method: str
    update: str
    scale: str
    matrix: Tuple[int, int]
    delta_rank: int
    rank: Optional[int]
    relative_change: Optional[float]
    delta_quantiles: Tuple[float, ...]
    taylor_error: Optional[float]
    relative_taylor_error: Optional[float]
    sign_change_share: Optional[float]
    parameters: int
    weights: int
    core: Optional[Tuple[int, ...]]


@functools.partial(through_wrappers, does='reads')
def layer_reports(model: nn.Module) -> List[LayerReport]:
    """A :class:`LayerReport` of every adapted layer, in the model's order; computed in float64, on the layer's device."""
    return [_layer_report(name, layer) for name, layer in adapted_layers(model)]


def numerical_rank(matrix: Tensor) -> int:
    """Number of singular values above 1e-6 of the largest; 0 for a matrix of zeros.

    They are the square roots of the smaller Gram matrix's eigenvalues, many times faster to have than a singular value
    decomposition. The price is resolution: in float64 an eigenvalue is off by about 1e-16 of the largest, times up to the
    size of the matrix, so that singular values below 1e-6 of the largest cannot safely be told from zero.

    Args:
        matrix: The matrix, ``(n, m)``; finite.
    """
    wide = matrix.double()
    wide = wide.T if len(wide) > wide.shape[1] else wide
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return int((eigenvalues > 1e-12 * eigenvalues[-1]).sum())


@torch.no_grad()
def _layer_report(name: str, layer: AdaptedLayer) -> LayerReport:
    adapter, weight = copy.deepcopy(layer.adapter).double(), layer.frozen_weight.double()
    delta = adapter()
    change = adapter.finish(UPDATES[layer.update](weight, delta)) - weight
    if layer.untrained:
        change.zero_()  # in float64, DoRA's magnitude differs from the norm it was set to in the layer's precision
    change = change.reshape(adapter.matrix)
    taylor_error = relative_error = None
    if layer.update in MULTIPLICATIVE:
        taylor_error = (torch.expm1(delta) - delta).norm().item()
        relative_error = taylor_error / norm if (norm := delta.norm().item()) else 0.
    return LayerReport(
        name,
        kind_of(layer),
        layer.method,
        layer.update,
        scale_of(layer),
        matrix=adapter.matrix,
        delta_rank=adapter.delta_rank,
        rank=numerical_rank(change) if torch.isfinite(change).all() else None,
        relative_change=share if math.isfinite(share := (change.norm() / weight.norm()).item()) else None,
        delta_quantiles=tuple(_quantile(delta.abs().flatten(), share) for share in QUANTILES),
        taylor_error=taylor_error,
        relative_taylor_error=relative_error,
        sign_change_share=(delta <= -1).double().mean().item() if layer.update == 'taylor' else None,
        parameters=sum(p.numel() for p in adapter.parameters()),
        weights=weight.numel(),
        core=adapter.core)


def _quantile(values: Tensor, share: float) -> float:
    """The smallest value that is not below this share of the values; torch.quantile takes no more than 16 million."""
    return values.kthvalue(math.ceil(share * len(values))).values.item()
