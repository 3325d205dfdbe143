"""Rows of a matrix scaled to given norms, and the gradients of that."""
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2
from .weight import DTYPES

# No square over- or underflows between these bounds, nor beyond them in these units, powers of two
SMALL, LARGE = tl.constexpr(2.**-32), tl.constexpr(2.**32)
TINY_UNIT, HUGE_UNIT = tl.constexpr(2.**-80), tl.constexpr(2.**80)


@triton.jit
def _tile(x, row, col, rows, cols):
    """Values in float32, and where they are."""
    at, mask = row[:, None] * cols + col[None, :], (row[:, None] < rows) & (col[None, :] < cols)
    return tl.load(x + at, mask, other=0.).to(tl.float32), at, mask


@triton.jit
def _norms(x, row, rows, cols, tiny, most, DTYPE: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Of every row: its norm, the norm as a magnitude can hold it, their unit, its reciprocal, and whether it is scaled."""
    largest = tl.zeros((BM, ), tl.float32)
    for start in range(0, cols, BN):
        value, _, _ = _tile(x, row, start + tl.arange(0, BN), rows, cols)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
    unit = tl.where(largest < SMALL, TINY_UNIT, tl.where(largest > LARGE, HUGE_UNIT, 1.))
    inverse = tl.where(largest < SMALL, HUGE_UNIT, tl.where(largest > LARGE, TINY_UNIT, 1.))
    squares = tl.zeros((BM, BN), tl.float32)
    for start in range(0, cols, BN):
        value, _, _ = _tile(x, row, start + tl.arange(0, BN), rows, cols)
        value *= inverse[:, None]
        squares += value * value
    norm = tl.sqrt(tl.sum(squares, 1))
    found = norm * unit
    held = tl.minimum(found, most).to(DTYPE).to(tl.float32) * inverse if ROUND else norm
    return norm, held, unit, inverse, (found >= tiny) & (found < float('inf'))


@triton.jit
def _rescaled(x, norms, out, found, rows, cols, tiny, most, DTYPE: tl.constexpr, ROUND: tl.constexpr, BM: tl.constexpr,
              BN: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    norm, held, unit, inverse, scaled = _norms(x, row, rows, cols, tiny, most, DTYPE, ROUND, BM, BN)
    wanted = tl.load(norms + row, row < rows, other=1.).to(tl.float32)
    ratio = tl.where(scaled, tl.div_rn(wanted, held), unit)
    tl.store(found + row, norm * unit, row < rows)
    for start in range(0, cols, BN):
        value, at, mask = _tile(x, row, start + tl.arange(0, BN), rows, cols)
        tl.store(out + at, value * inverse[:, None] * ratio[:, None], mask)


@triton.jit
def _rescaled_grad(x, norms, grad, dx, dnorms, rows, cols, tiny, most, DTYPE: tl.constexpr, ROUND: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    norm, held, unit, inverse, scaled = _norms(x, row, rows, cols, tiny, most, DTYPE, ROUND, BM, BN)
    wanted = tl.load(norms + row, row < rows, other=1.).to(tl.float32)
    products = tl.zeros((BM, BN), tl.float32)
    for start in range(0, cols, BN):
        value, at, mask = _tile(x, row, start + tl.arange(0, BN), rows, cols)
        products += tl.load(grad + at, mask, other=0.).to(tl.float32) * (value * inverse[:, None])
    dnorm = tl.where(scaled, tl.sum(products, 1) / held, 0.)
    ratio = tl.where(scaled, tl.div_rn(wanted, held) * inverse, 1.)
    pull = tl.where(scaled, dnorm * wanted / held / norm * inverse, 0.)
    tl.store(dnorms + row, dnorm, row < rows)
    for start in range(0, cols, BN):
        value, at, mask = _tile(x, row, start + tl.arange(0, BN), rows, cols)
        inward = tl.where(scaled[:, None], value * inverse[:, None] * pull[:, None], 0.)
        slope = tl.load(grad + at, mask, other=0.).to(tl.float32)
        tl.store(dx + at, slope * ratio[:, None] - inward, mask)


def _launch(rows: Tensor, precision: torch.dtype):
    """The grid, and what both kernels are given last."""
    info, bn = torch.finfo(precision), min(power_of_2(rows.shape[1]), 256)
    bm = 1024 // bn
    types = dict(DTYPE=DTYPES[precision], ROUND=precision != rows.dtype)
    return (cdiv(len(rows), bm), ), (*rows.shape, info.tiny, info.max), dict(types, BM=bm, BN=bn)


def rescaled(rows: Tensor, norms: Tensor, precision: torch.dtype) -> Tuple[Tensor, Tensor]:
    rows = rows.contiguous()
    out, found = torch.empty_like(rows), torch.empty_like(norms)
    grid, args, meta = _launch(rows, precision)
    _rescaled[grid](rows, norms.contiguous(), out, found, *args, **meta)
    return out, found


def rescaled_grad(rows: Tensor, norms: Tensor, precision: torch.dtype, grad: Tensor) -> Tuple[Tensor, Tensor]:
    rows = rows.contiguous()
    drows, dnorms = torch.empty_like(rows), torch.empty_like(norms)
    grid, args, meta = _launch(rows, precision)
    _rescaled_grad[grid](rows, norms.contiguous(), grad.contiguous(), drows, dnorms, *args, **meta)
    return drows, dnorms
