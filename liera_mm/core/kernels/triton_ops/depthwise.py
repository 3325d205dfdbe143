"""The 7x7 depthwise convolution of tensors with the channels last, and the gradient by its weight."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2, processors, sum_parts


@triton.jit
def _tap(x, base, row, col, ch, H, W, C):
    inside = (row >= 0) & (row < H) & (col >= 0) & (col < W)
    return tl.load(x + base + (row * W + col)[:, None] * C + ch[None, :], inside[:, None] & (ch < C)[None, :],
                   other=0.).to(tl.float32)


@triton.jit
def _weight(w, kh, kw, ch, C, K: tl.constexpr, FLIP: tl.constexpr):
    tap = kh * K + kw
    if FLIP:
        tap = K * K - 1 - tap
    return tl.load(w + tap * C + ch, ch < C, other=0.).to(tl.float32)[None, :]


@triton.jit
def _depthwise(x, w, b, add, out, H, W, C, K: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
               BW: tl.constexpr, BC: tl.constexpr):
    """Four rows of the output: every loaded pixel serves up to four of them."""
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    blocks = tl.cdiv(W, BW)
    top, col = tl.program_id(1) // blocks * 4, tl.program_id(1) % blocks * BW + tl.arange(0, BW)
    base = tl.program_id(2).to(tl.int64) * H * W * C
    acc0, acc1 = tl.zeros((BW, BC), tl.float32), tl.zeros((BW, BC), tl.float32)
    acc2, acc3 = tl.zeros((BW, BC), tl.float32), tl.zeros((BW, BC), tl.float32)
    for i in tl.static_range(K + 3):
        for kw in range(K):
            tap = _tap(x, base, top + i - K // 2, col + kw - K // 2, ch, H, W, C)
            if i < K:
                acc0 += tap * _weight(w, i, kw, ch, C, K, FLIP)
            if i >= 1 and i - 1 < K:
                acc1 += tap * _weight(w, i - 1, kw, ch, C, K, FLIP)
            if i >= 2 and i - 2 < K:
                acc2 += tap * _weight(w, i - 2, kw, ch, C, K, FLIP)
            if i >= 3:
                acc3 += tap * _weight(w, i - 3, kw, ch, C, K, FLIP)
    _store_row(out, acc0, b, add, base, top, col, ch, H, W, C, BIAS, ADD)
    _store_row(out, acc1, b, add, base, top + 1, col, ch, H, W, C, BIAS, ADD)
    _store_row(out, acc2, b, add, base, top + 2, col, ch, H, W, C, BIAS, ADD)
    _store_row(out, acc3, b, add, base, top + 3, col, ch, H, W, C, BIAS, ADD)


@triton.jit
def _store_row(out, acc, b, add, base, row, col, ch, H, W, C, BIAS: tl.constexpr, ADD: tl.constexpr):
    at = base + (row * W + col)[:, None] * C + ch[None, :]
    mask = ((row < H) & (col < W))[:, None] & (ch < C)[None, :]
    if BIAS:
        acc += tl.load(b + ch, ch < C, other=0.).to(tl.float32)[None, :]
    if ADD:
        acc += tl.load(add + at, mask, other=0.).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


@triton.jit
def _depthwise_weight_grad(x, dy, dw, H, W, C, images, K: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """One row of the kernel: seven taps, summed over every parts-th row of all images."""
    tl.static_assert(K == 7)
    ch, kh = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    part, parts = tl.program_id(2), tl.num_programs(2)
    acc0, acc1 = tl.zeros((BW, BC), tl.float32), tl.zeros((BW, BC), tl.float32)
    acc2, acc3 = tl.zeros((BW, BC), tl.float32), tl.zeros((BW, BC), tl.float32)
    acc4, acc5 = tl.zeros((BW, BC), tl.float32), tl.zeros((BW, BC), tl.float32)
    acc6 = tl.zeros((BW, BC), tl.float32)
    for line in range(part, images * H, parts):
        base, row = (line // H).to(tl.int64) * H * W * C, line % H
        for start in range(0, W, BW):
            col = start + tl.arange(0, BW)
            grad = _tap(dy, base, row, col, ch, H, W, C)
            source = row + kh - K // 2
            acc0 += grad * _tap(x, base, source, col - 3, ch, H, W, C)
            acc1 += grad * _tap(x, base, source, col - 2, ch, H, W, C)
            acc2 += grad * _tap(x, base, source, col - 1, ch, H, W, C)
            acc3 += grad * _tap(x, base, source, col, ch, H, W, C)
            acc4 += grad * _tap(x, base, source, col + 1, ch, H, W, C)
            acc5 += grad * _tap(x, base, source, col + 2, ch, H, W, C)
            acc6 += grad * _tap(x, base, source, col + 3, ch, H, W, C)
    at = dw + ((part * K + kh) * K) * C + ch
    tl.store(at, tl.sum(acc0, 0), ch < C)
    tl.store(at + C, tl.sum(acc1, 0), ch < C)
    tl.store(at + 2 * C, tl.sum(acc2, 0), ch < C)
    tl.store(at + 3 * C, tl.sum(acc3, 0), ch < C)
    tl.store(at + 4 * C, tl.sum(acc4, 0), ch < C)
    tl.store(at + 5 * C, tl.sum(acc5, 0), ch < C)
    tl.store(at + 6 * C, tl.sum(acc6, 0), ch < C)


def depthwise(x: Tensor, taps: Tensor, bias, add, flip: bool) -> Tensor:
    images, height, width, channels = x.shape
    bc, bw = min(power_of_2(channels), 32), 32
    out = torch.empty_like(x)
    grid = cdiv(channels, bc), cdiv(height, 4) * cdiv(width, bw), images
    _depthwise[grid](x, taps, taps if bias is None else bias, x if add is None else add, out, height, width, channels,
                     K=7, FLIP=flip, BIAS=bias is not None, ADD=add is not None, BW=bw, BC=bc, num_warps=2)
    return out


def depthwise_weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    bc, bw = min(power_of_2(channels), 64), 16
    columns = cdiv(channels, bc)
    parts = max(1, min(images * height, 4 * processors(x.device) // (7 * columns)))
    out = torch.empty(parts, 49, channels, dtype=torch.float32, device=x.device)
    _depthwise_weight_grad[(columns, 7, parts)](x, dy, out, height, width, channels, images, K=7, BW=bw, BC=bc,
                                               num_warps=4)
    grad = torch.empty(channels, 49, dtype=x.dtype, device=x.device)
    _sum_taps[(channels, )](out, grad, parts, channels, TAPS=64)
    return grad


@triton.jit
def _sum_taps(sums, grad, parts, C, TAPS: tl.constexpr):
    ch, tap = tl.program_id(0), tl.arange(0, TAPS)
    total = sum_parts(sums + tap * C + ch, 49 * C, parts, tap < 49, TAPS)
    tl.store(grad + ch * 49 + tap, total.to(grad.dtype.element_ty), tap < 49)
