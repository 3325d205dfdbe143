"""The 7x7 depthwise convolution of tensors with the channels last, and the gradient by its weight.

A program is one warp, which takes a strip of a few columns and goes down its rows. Each row of pixels is read once, and is
asked for before anything is written, or it would wait for that; the sums of the seven rows of the output that it belongs to,
or of the 49 taps, stay in registers, as tuples of tensors of BC channels.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2, processors

COLUMNS = 4


@triton.jit
def _row(x, row, first, last, col, W, ch, C, N: tl.constexpr):
    """Columns col to col + N - 1 of a row; zeros where there is no such column, or the row is not of first to last - 1."""
    pixels = ()
    for j in tl.static_range(N):
        channels = tl.where((col + j >= 0) & (col + j < W), C, 0)
        inside = (row >= first) & (row < last) & (ch < channels)
        pixels = pixels + (tl.load(x + (row * W + col + j) * C + ch, inside, other=0.), )
    return pixels


@triton.jit
def _floats(tensors, N: tl.constexpr):
    result = ()
    for j in tl.static_range(N):
        result = result + (tensors[j].to(tl.float32), )
    return result


@triton.jit
def _strip(W, ROWS, COLS: tl.constexpr, BC: tl.constexpr):
    """The first row and column of a program's strip, and its channels."""
    blocks = tl.cdiv(W, COLS)
    ch = tl.program_id(0) * BC + tl.arange(0, BC)
    # For every channel, since Triton 3.9's interpreter takes no mask of a scalar and a tensor; hence where() elsewhere
    row = tl.program_id(1) // blocks * ROWS + tl.zeros_like(ch)
    return row, tl.program_id(1) % blocks * COLS, ch


@triton.jit
def _depthwise(x, w, b, add, out, H, W, C, ROWS, K: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
               COLS: tl.constexpr, BC: tl.constexpr):
    top, col, ch = _strip(W, ROWS, COLS, BC)
    base = tl.program_id(2).to(tl.int64) * H * W * C
    x, add, out = x + base, add + base, out + base
    weights = ()
    for tap in tl.static_range(K * K):
        weights = weights + (tl.load(w + (K * K - 1 - tap if FLIP else tap) * C + ch, ch < C, other=0.).to(tl.float32), )
    zero = tl.zeros((BC, ), tl.float32)
    bias = zero
    if BIAS:
        bias += tl.load(b + ch, ch < C, other=0.).to(tl.float32)
    acc = (zero, ) * ((K - 1) * COLS)
    ahead = _row(x, top - K // 2, 0, H, col - K // 2, W, ch, C, COLS + K - 1)
    if ADD:
        ahead_others = _row(add, top - K + 1, top, H, col, W, ch, C, COLS)
    for i in range(ROWS + K - 1):
        row, pixels = top + i - K + 1, _floats(ahead, COLS + K - 1)  # of the output, whose last pixels these are
        ahead = _row(x, top + i + 1 - K // 2, 0, H, col - K // 2, W, ch, C, COLS + K - 1)
        if ADD:
            others = _floats(ahead_others, COLS)
            ahead_others = _row(add, row + 1, top, H, col, W, ch, C, COLS)
        sums = ()
        for kh in tl.static_range(K):
            for c in tl.static_range(COLS):
                total = bias if kh == 0 else acc[(kh - 1) * COLS + c]
                for kw in tl.static_range(K):
                    total = tl.fma(pixels[c + kw], weights[kh * K + kw], total)
                sums = sums + (total, )
        for c in tl.static_range(COLS):
            total = sums[(K - 1) * COLS + c]
            if ADD:
                total += others[c]
            inside = (row >= top) & (row < H) & (ch < tl.where(col + c < W, C, 0))
            tl.store(out + (row * W + col + c) * C + ch, total.to(out.dtype.element_ty), inside)
        acc = ()
        for j in tl.static_range((K - 1) * COLS):
            acc = acc + (sums[j], )


@triton.jit
def _depthwise_weight_grad(x, dy, dw, H, W, C, ROWS, K: tl.constexpr, COLS: tl.constexpr, BC: tl.constexpr):
    top, col, ch = _strip(W, ROWS, COLS, BC)
    base = tl.program_id(2).to(tl.int64) * H * W * C
    x, dy = x + base, dy + base
    last = tl.minimum(top + ROWS, H)
    zero = tl.zeros((BC, ), tl.float32)
    acc, above = (zero, ) * (K * K), (zero, ) * ((K - 1) * COLS)
    ahead = _row(x, top - K // 2, 0, H, col - K // 2, W, ch, C, COLS + K - 1)
    below = _row(dy, top, top, last, col, W, ch, C, COLS)
    for start in range(0, ROWS + K - 1, 2):
        for i in tl.static_range(2):  # half as many moves between registers
            # The rows of dy that these pixels are summed with: the lowest by the first row of taps
            pixels, grads = _floats(ahead, COLS + K - 1), _floats(below, COLS) + above
            ahead = _row(x, top + start + i + 1 - K // 2, 0, H, col - K // 2, W, ch, C, COLS + K - 1)
            below = _row(dy, top + start + i + 1, top, last, col, W, ch, C, COLS)
            sums, above = (), ()
            for kh in tl.static_range(K):
                for kw in tl.static_range(K):
                    total = acc[kh * K + kw]
                    for c in tl.static_range(COLS):
                        total = tl.fma(grads[kh * COLS + c], pixels[c + kw], total)
                    sums = sums + (total, )
            for j in tl.static_range((K - 1) * COLS):
                above = above + (grads[j], )
            acc = sums
    part = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    for tap in tl.static_range(K * K):
        tl.store(dw + (part * K * K + tap) * C + ch, acc[tap], ch < C)


@triton.jit
def _sum_taps(sums, grad, parts, C, TAPS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    tap, ch = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(0, parts, BP):
        part = start + tl.arange(0, BP)
        at = (part[:, None] * TAPS + tap) * C + ch[None, :]
        total += tl.load(sums + at, (part < parts)[:, None] & (ch < C)[None, :], other=0.)
    tl.store(grad + ch * TAPS + tap, tl.sum(total, 0).to(grad.dtype.element_ty), ch < C)


def _tiles(shape: torch.Size, device: torch.device):
    """The grid, and what it says of a program: 64 rows, or fewer where that would leave processors idle."""
    images, height, width, channels = shape
    bc, rows = min(power_of_2(channels), 64), 64
    while True:
        grid = cdiv(channels, bc), cdiv(height, rows) * cdiv(width, COLUMNS), images
        if rows == 16 or math.prod(grid) >= 6 * processors(device):
            return grid, dict(ROWS=min(height, rows), K=7, COLS=COLUMNS, BC=bc, num_warps=1)
        rows //= 2


def depthwise(x: Tensor, taps: Tensor, bias, add, flip: bool) -> Tensor:
    out = torch.empty_like(x)
    grid, meta = _tiles(x.shape, x.device)
    _depthwise[grid](x, taps, taps if bias is None else bias, x if add is None else add, out, *x.shape[1:],
                     FLIP=flip, BIAS=bias is not None, ADD=add is not None, **meta)
    return out


def depthwise_weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    channels = x.shape[3]
    grid, meta = _tiles(x.shape, x.device)
    parts = grid[1] * grid[2]
    sums = torch.empty(parts, 49, channels, dtype=torch.float32, device=x.device)
    _depthwise_weight_grad[grid](x, dy, sums, *x.shape[1:], **meta)
    grad = torch.empty(channels, 49, dtype=x.dtype, device=x.device)
    _sum_taps[(49, cdiv(channels, 32))](sums, grad, parts, channels, TAPS=49, BP=32, BC=32, num_warps=4)
    return grad
