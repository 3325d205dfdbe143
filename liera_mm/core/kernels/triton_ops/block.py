"""What a ConvNeXt block consists of, but for its depthwise convolution."""
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2, processors, sum_parts


@triton.jit
def _layer_norm(x, w, b, y, mean, rstd, tokens, C, eps, BT: tl.constexpr, BC: tl.constexpr):
    row, col = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC)
    at, mask = row.to(tl.int64)[:, None] * C + col[None, :], (row[:, None] < tokens) & (col[None, :] < C)
    value = tl.load(x + at, mask, other=0.).to(tl.float32)
    centre = tl.sum(value, 1) / C
    centred = tl.where(mask, value - centre[:, None], 0.)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(w + col, col < C).to(tl.float32)
    bias = tl.load(b + col, col < C).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(y + at, normed.to(y.dtype.element_ty), mask)
    tl.store(mean + row, centre, row < tokens)
    tl.store(rstd + row, scale, row < tokens)


@triton.jit
def _layer_norm_grad(dy, x, w, b, mean, rstd, dx, dw, db, y, tokens, C, blocks, PARAMS: tl.constexpr,
                     OUTPUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    program, programs, col = tl.program_id(0), tl.num_programs(0), tl.arange(0, BC)
    weight = tl.load(w + col, col < C, other=0.).to(tl.float32)
    bias = tl.load(b + col, col < C, other=0.).to(tl.float32)
    weight_grad, bias_grad = tl.zeros((BT, BC), tl.float32), tl.zeros((BT, BC), tl.float32)
    for block in range(program, blocks, programs):
        row = block * BT + tl.arange(0, BT)
        at, mask = row.to(tl.int64)[:, None] * C + col[None, :], (row[:, None] < tokens) & (col[None, :] < C)
        grad = tl.load(dy + at, mask, other=0.).to(tl.float32)
        scale = tl.load(rstd + row, row < tokens, other=0.)
        normed = (tl.load(x + at, mask, other=0.).to(tl.float32)
                  - tl.load(mean + row, row < tokens, other=0.)[:, None]) * scale[:, None]
        normed = tl.where(mask, normed, 0.)
        inner = grad * weight[None, :]
        mean_grad, mean_product = tl.sum(inner, 1) / C, tl.sum(inner * normed, 1) / C
        value = (inner - mean_grad[:, None] - normed * mean_product[:, None]) * scale[:, None]
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask)
        if OUTPUT:
            tl.store(y + at, (normed * weight[None, :] + bias[None, :]).to(y.dtype.element_ty), mask)
        if PARAMS:
            weight_grad += grad * normed
            bias_grad += grad
    if PARAMS:
        tl.store(dw + program * C + col, tl.sum(weight_grad, 0), col < C)
        tl.store(db + program * C + col, tl.sum(bias_grad, 0), col < C)


def _norm_tile(channels: int):
    bc = power_of_2(channels)
    bt = max(1, 2048 // bc)
    return dict(BT=bt, BC=bc, num_warps=4 if bc <= 2048 else 8)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty_like(x)
    mean, rstd = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
    meta = _norm_tile(channels)
    _layer_norm[(cdiv(tokens, meta['BT']), )](x, weight, bias, y, mean, rstd, tokens, channels, eps, **meta)
    return y, mean, rstd


def layer_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, params: bool,
                    output: bool):
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    meta = _norm_tile(channels)
    blocks = cdiv(tokens, meta['BT'])
    programs = min(blocks, 16 * processors(x.device)) if params else blocks
    dx = torch.empty_like(x)
    dw, db = torch.empty(2, programs if params else 1, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x) if output else None
    _layer_norm_grad[(programs, )](dy, x, weight, bias, mean, rstd, dx, dw, db, y if output else dx, tokens, channels,
                                   blocks, PARAMS=params, OUTPUT=output, **meta)
    return dx, dw.sum(0) if params else None, db.sum(0) if params else None, y


@triton.jit
def _normal(x):
    """The normal distribution function Φ(x), and exp(-x² / 2), by one exponential.

    Within 1e-7 (Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26), where ``tl.erf`` takes as long as to
    read and write the numbers.
    """
    t = 1 / (1 + 0.2316418882 * tl.abs(x))
    e = tl.exp(-.5 * x * x)
    tail = .5 * e * t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tl.where(x < 0, tail, 1 - tail), e


@triton.jit
def _gelu(h, b, g, squares, tokens, chunk, J, SQUARES: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr):
    image, part, parts = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BJ + tl.arange(0, BJ)
    bias = tl.load(b + col, col < J, other=0.).to(tl.float32)[None, :]
    total = tl.zeros((BT, BJ), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BT):
        row = start + tl.arange(0, BT)
        at = (image * tokens + row).to(tl.int64)[:, None] * J + col[None, :]
        mask = (row[:, None] < tokens) & (row[:, None] < (part + 1) * chunk) & (col[None, :] < J)
        value = tl.load(h + at, mask, other=0.).to(tl.float32) + bias
        value = (value * _normal(value)[0]).to(g.dtype.element_ty)
        tl.store(g + at, value, mask)
        if SQUARES:
            total += tl.where(mask, value.to(tl.float32) * value.to(tl.float32), 0.)
    if SQUARES:
        tl.store(squares + (image * parts + part) * J + col, tl.sum(total, 0), col < J)


@triton.jit
def _gelu_grad(dg, h, b, k, dh, sums, tokens, chunk, J, GRN: tl.constexpr, SUMS: tl.constexpr,
               BT: tl.constexpr, BJ: tl.constexpr):
    image, part, parts = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BJ + tl.arange(0, BJ)
    if GRN:
        pull = tl.load(k + image * J + col, col < J, other=0.)
    bias = tl.load(b + col, col < J, other=0.).to(tl.float32)[None, :]
    total = tl.zeros((BT, BJ), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), BT):
        row = start + tl.arange(0, BT)
        at = (image * tokens + row).to(tl.int64)[:, None] * J + col[None, :]
        mask = (row[:, None] < tokens) & (row[:, None] < (part + 1) * chunk) & (col[None, :] < J)
        value = tl.load(h + at, mask, other=0.).to(tl.float32) + bias
        grad = tl.load(dg + at, mask, other=0.).to(tl.float32)
        cdf, e = _normal(value)
        if GRN:
            grad += pull[None, :] * (value * cdf)
        grad *= cdf + value * 0.3989422804014327 * e
        tl.store(dh + at, grad.to(dh.dtype.element_ty), mask)
        if SUMS:
            total += tl.where(mask, grad, 0.)
    if SUMS:
        tl.store(sums + (image * parts + part) * J + col, tl.sum(total, 0), col < J)


def _hidden_grid(hidden: Tensor):
    """Programs over (hidden channels, parts of an image, images), enough of them to fill the card a few times."""
    images, tokens, channels = hidden.shape
    bj = min(power_of_2(channels), 128)
    bt = 16
    columns = cdiv(channels, bj)
    parts = max(1, min(cdiv(tokens, bt), 8 * processors(hidden.device) // (columns * images)))
    chunk = cdiv(cdiv(tokens, parts), bt) * bt
    return (columns, cdiv(tokens, chunk), images), chunk, dict(BT=bt, BJ=bj, num_warps=4)


def gelu(hidden: Tensor, bias: Tensor, squares: bool):
    grid, chunk, meta = _hidden_grid(hidden)
    out = torch.empty_like(hidden)
    sums = torch.empty(len(hidden), grid[1], hidden.shape[2], dtype=torch.float32, device=hidden.device) if squares else out
    _gelu[grid](hidden, bias, out, sums, hidden.shape[1], chunk, hidden.shape[2], SQUARES=squares, **meta)
    return out, sums if squares else None


def gelu_grad(dg: Tensor, hidden: Tensor, bias: Tensor, pull: Optional[Tensor], bias_grad: bool):
    grid, chunk, meta = _hidden_grid(hidden)
    shape = len(hidden), grid[1], hidden.shape[2]
    sums = torch.empty(shape, dtype=torch.float32, device=hidden.device) if bias_grad else dg
    _gelu_grad[grid](dg, hidden, bias, dg if pull is None else pull, dg, sums, hidden.shape[1], chunk, hidden.shape[2],
                     GRN=pull is not None, SUMS=bias_grad, **meta)
    return dg, sums.sum((0, 1)) if bias_grad else None


@triton.jit
def _response(squares, w, norms, gains, parts, J, eps, BJ: tl.constexpr):
    image, col = tl.program_id(0), tl.arange(0, BJ)
    mask = col < J
    norm = tl.sqrt(sum_parts(squares + image * parts * J + col, J, parts, mask, BJ))
    weight = tl.load(w + col, mask, other=0.).to(tl.float32)
    tl.store(norms + image * J + col, norm, mask)
    tl.store(gains + image * J + col, 1 + weight * norm / (tl.sum(norm, 0) / J + eps), mask)


@triton.jit
def _response_grad(parts_grad, w, norms, pull, grads, parts, images, J, eps, BJ: tl.constexpr):
    image, col = tl.program_id(0), tl.arange(0, BJ)
    mask = col < J
    grad = sum_parts(parts_grad + image * J + col, images * J, parts, mask, BJ)
    norm = tl.load(norms + image * J + col, mask, other=0.)
    mean = tl.sum(norm, 0) / J + eps
    scaled = grad * tl.load(w + col, mask, other=0.).to(tl.float32)
    value = (scaled - tl.sum(scaled * norm, 0) / J / mean) / mean
    tl.store(pull + image * J + col, tl.where(norm > 0, value / norm, 0.), mask)
    tl.store(grads + image * J + col, grad * norm / mean, mask)


def _row_meta(channels: int):
    bj = power_of_2(channels)
    return dict(BJ=bj, num_warps=max(4, min(16, bj // 512)))


def response(squares: Tensor, weight: Tensor, eps: float):
    images, parts, hidden = squares.shape
    norms, gains = torch.empty(2, images, hidden, dtype=torch.float32, device=squares.device)
    _response[(images, )](squares, weight, norms, gains, parts, hidden, eps, **_row_meta(hidden))
    return norms, gains


def response_grad(dgains: Tensor, weight: Tensor, norms: Tensor, eps: float):
    parts, images, hidden = dgains.shape
    pull, grads = torch.empty(2, images, hidden, dtype=torch.float32, device=norms.device)
    _response_grad[(images, )](dgains, weight, norms, pull, grads, parts, images, hidden, eps, **_row_meta(hidden))
    return pull, grads


@triton.jit
def _scaled_weights(w, rows, cols, beta, out, sums, row_image, row_channel, C, J, ROWS: tl.constexpr, COLS: tl.constexpr,
                    SUMS: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr):
    row, col, image = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BJ + tl.arange(0, BJ), tl.program_id(2)
    at, mask = row[:, None] * J + col[None, :], (row[:, None] < C) & (col[None, :] < J)
    value = tl.load(w + at, mask, other=0.).to(tl.float32)
    if SUMS:
        shift = tl.load(beta + col, col < J, other=0.).to(tl.float32)
        tl.store(sums + tl.program_id(0) * C + row, tl.sum(value * shift[None, :], 1), row < tl.where(image == 0, C, 0))
    if COLS:
        value *= tl.load(cols + image * J + col, col < J, other=0.)[None, :]
    if ROWS:
        value *= tl.load(rows + image * row_image + row * row_channel, row < C, other=0.).to(tl.float32)[:, None]
    tl.store(out + image.to(tl.int64) * C * J + at, value.to(out.dtype.element_ty), mask)


def _strides(rows: Optional[Tensor]):
    return (0, 0) if rows is None else rows.stride()


def scaled_weights(images: int, weight: Tensor, rows: Optional[Tensor], cols: Optional[Tensor], beta: Optional[Tensor]):
    channels, hidden = weight.shape
    parts = cdiv(hidden, 128)
    out = torch.empty(images, channels, hidden, dtype=weight.dtype, device=weight.device)
    sums = None if beta is None else torch.empty(parts, channels, dtype=torch.float32, device=weight.device)
    rest = [out if tensor is None else tensor for tensor in (rows, cols, beta)]
    _scaled_weights[(parts, cdiv(channels, 16), images)](
        weight, *rest, out, out if sums is None else sums, *_strides(rows), channels, hidden, ROWS=rows is not None,
        COLS=cols is not None, SUMS=beta is not None, BC=16, BJ=128)
    return out, sums


@triton.jit
def _weight_grad(p, w, rows, cols, tokens, beta, dw, sums, row_image, row_channel, C, J, images, ROWS: tl.constexpr,
                 COLS: tl.constexpr, BETA: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr):
    row, col = tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(0) * BJ + tl.arange(0, BJ)
    at, mask = row[:, None] * J + col[None, :], (row[:, None] < C) & (col[None, :] < J)
    weight = tl.load(w + at, mask, other=0.).to(tl.float32)
    total, shift = tl.zeros((BC, BJ), tl.float32), tl.zeros((BC, ), tl.float32)
    for image in range(images):
        value = tl.load(p + at, mask, other=0.).to(tl.float32)
        p += C * J
        if ROWS:
            scale = tl.load(rows + image * row_image + row * row_channel, row < C, other=0.).to(tl.float32)
            value *= scale[:, None]
        if BETA:
            grad = tl.load(tokens + image * C + row, row < C, other=0.)
            if ROWS:
                grad *= scale
            shift += grad
        if COLS:
            tl.store(sums + (tl.program_id(1) * images + image) * J + col, tl.sum(value * weight, 0), col < J)
            value *= tl.load(cols + image * J + col, col < J, other=0.)[None, :]
        total += value
    if BETA:
        total += shift[:, None] * tl.load(beta + col, col < J, other=0.).to(tl.float32)[None, :]
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask)


def weight_grad(products: Tensor, weight: Tensor, rows: Optional[Tensor], cols: Optional[Tensor], tokens: Optional[Tensor],
                beta: Optional[Tensor]):
    images, channels, hidden = products.shape
    parts = cdiv(channels, 32)
    out = torch.empty_like(weight)
    sums = None if cols is None else torch.empty(parts, images, hidden, dtype=torch.float32, device=weight.device)
    rest = [out if tensor is None else tensor for tensor in (rows, cols, tokens, beta)]
    _weight_grad[(cdiv(hidden, 64), parts)](
        products, weight, *rest, out, out if sums is None else sums, *_strides(rows), channels, hidden, images,
        ROWS=rows is not None, COLS=cols is not None, BETA=beta is not None, BC=32, BJ=64)
    return out, sums


@triton.jit
def _residual(x, z, bias, sums, rows, out, row_image, row_channel, tokens, C, parts, ROWS: tl.constexpr, BT: tl.constexpr,
              BC: tl.constexpr):
    row, col, image = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2)
    at = (image * tokens + row).to(tl.int64)[:, None] * C + col[None, :]
    mask = (row[:, None] < tokens) & (col[None, :] < C)
    constant = tl.load(bias + col, col < C).to(tl.float32) + sum_parts(sums + col, C, parts, col < C, BC)
    if ROWS:
        constant *= tl.load(rows + image * row_image + col * row_channel, col < C).to(tl.float32)
    value = tl.load(x + at, mask).to(tl.float32) + tl.load(z + at, mask).to(tl.float32) + constant[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


def residual(x: Tensor, z: Tensor, bias: Tensor, sums: Optional[Tensor], rows: Optional[Tensor]) -> Tensor:
    images, height, width, channels = x.shape
    tokens = height * width
    bc = min(power_of_2(channels), 256)
    bt = 4096 // bc
    out = torch.empty_like(x)
    _residual[(cdiv(tokens, bt), cdiv(channels, bc), images)](
        x, z, bias, bias if sums is None else sums, z if rows is None else rows, out, *_strides(rows), tokens, channels,
        0 if sums is None else len(sums), ROWS=rows is not None, BT=bt, BC=bc)
    return out
