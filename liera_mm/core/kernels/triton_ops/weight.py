"""Weights moved by their Δ, and the gradients of the products of the factors."""
from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..constants import constant
from .common import cdiv

ADDITIVE, TAYLOR, EXP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UPDATES = dict(additive=0, taylor=1, exp=2)
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _delta(a, b, row, col, rows, cols, inner, scale, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A tile of scale · B A."""
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(b + row[:, None] * inner + k[None, :], (row[:, None] < rows) & (k[None, :] < inner), other=0.)
        right = tl.load(a + k[:, None] * cols + col[None, :], (k[:, None] < inner) & (col[None, :] < cols), other=0.)
        acc += tl.dot(left, right, input_precision='ieee')
    return acc * scale


@triton.jit
def _at(tensors, layer, MANY: tl.constexpr, DTYPE: tl.constexpr):
    """The address of a layer's tensor: from a table, or given itself where there is only one."""
    return tl.load(tensors + layer).to(tl.pointer_type(DTYPE)) if MANY else tensors


@triton.jit
def _scale_of(rms, layer, scale, MANY: tl.constexpr, RELATIVE: tl.constexpr):
    return scale / tl.load(_at(rms, layer, MANY, tl.float32)) if RELATIVE else scale


@triton.jit
def _moved_weights(weights, rms, a, b, out, rows, cols, inner, scale, MANY: tl.constexpr, DTYPE: tl.constexpr,
                   RELATIVE: tl.constexpr, UPDATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    layer = tl.program_id(2)
    scale = _scale_of(rms, layer, scale, MANY, RELATIVE)
    row, col = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    delta = _delta(a + layer * inner * cols, b + layer * rows * inner, row, col, rows, cols, inner, scale, BM, BN, BK)
    at, mask = row[:, None] * cols + col[None, :], (row[:, None] < rows) & (col[None, :] < cols)
    weight = tl.load(_at(weights, layer, MANY, DTYPE) + at, mask).to(tl.float32)
    if UPDATE == ADDITIVE:
        moved = weight + delta
    elif UPDATE == TAYLOR:
        moved = weight * (1 + delta)
    else:
        moved = weight * tl.exp(delta)
    tl.store(out + layer.to(tl.int64) * rows * cols + at, moved.to(out.dtype.element_ty), mask)


@triton.jit
def _product_grads(weights, rms, a, b, grad, out, rows, cols, inner, scale, MANY: tl.constexpr, DTYPE: tl.constexpr,
                   RELATIVE: tl.constexpr, UPDATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    layer = tl.program_id(2)
    scale = _scale_of(rms, layer, scale, MANY, RELATIVE)
    row, col = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    at, mask = row[:, None] * cols + col[None, :], (row[:, None] < rows) & (col[None, :] < cols)
    start = layer.to(tl.int64) * rows * cols
    slope = tl.load(grad + start + at, mask).to(tl.float32)
    if UPDATE != ADDITIVE:
        slope *= tl.load(_at(weights, layer, MANY, DTYPE) + at, mask).to(tl.float32)
    if UPDATE == EXP:
        a, b = a + layer * inner * cols, b + layer * rows * inner
        slope *= tl.exp(_delta(a, b, row, col, rows, cols, inner, scale, BM, BN, BK))
    tl.store(out + start + at, slope * scale, mask)


def _tiles(layers: int, rows: int, cols: int):
    bm, bn = 16 if rows <= 16 else 32, 64
    return (cdiv(rows, bm), cdiv(cols, bn), layers), dict(BM=bm, BN=bn, BK=16, num_warps=4)


def _pointers(weights: Sequence[Tensor], rms: Optional[Sequence[Tensor]]):
    """What the kernels of weights are given of a group of layers: tables of addresses, and how to read them."""
    dtype = dict(MANY=len(weights) > 1, DTYPE=DTYPES[weights[0].dtype], RELATIVE=rms is not None)
    if len(weights) == 1:
        return (weights[0], rms[0] if rms else None), dtype
    addresses = [tensor.data_ptr() for tensors in (weights, rms or ()) for tensor in tensors]
    table = constant(addresses, torch.int64, weights[0].device)
    return (table, table[len(weights):] if rms else None), dtype


def moved_weights(weights: Sequence[Tensor], a: Tensor, b: Tensor, scale: float, rms: Optional[Sequence[Tensor]],
                  update: str, dtype: torch.dtype) -> Tensor:
    layers, rows, inner = b.shape
    out = torch.empty(layers, *weights[0].shape, dtype=dtype, device=b.device)
    grid, meta = _tiles(layers, rows, a.shape[2])
    pointers, types = _pointers(weights, rms)
    _moved_weights[grid](*pointers, a, b, out, rows, a.shape[2], inner, scale, UPDATE=UPDATES[update], **types, **meta)
    return out


def product_grads(weights: Sequence[Tensor], a: Tensor, b: Tensor, scale: float, rms: Optional[Sequence[Tensor]],
                  update: str, grad: Tensor) -> Tensor:
    layers, rows, inner = b.shape
    out = torch.empty(layers, rows, a.shape[2], dtype=torch.float32, device=b.device)
    grid, meta = _tiles(layers, rows, a.shape[2])
    pointers, types = _pointers(weights, rms)
    _product_grads[grid](*pointers, a, b, grad, out, rows, a.shape[2], inner, scale, UPDATE=UPDATES[update], **types, **meta)
    return out
