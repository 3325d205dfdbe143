"""The operators of :mod:`torch_ops` as Triton kernels for CUDA: same names, same arguments, same results to rounding.

Shapes: N images, T tokens (pixels) an image, C channels, J hidden channels. Statistics and sums are float32 throughout.
"""
import functools
from typing import Optional, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

ADDITIVE, TAYLOR, EXP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UPDATES = dict(additive=0, taylor=1, exp=2)
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


# Triton's own cdiv() and next_power_of_2() take longer on the host than a kernel on the device


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 4


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
    return (_cdiv(rows, bm), _cdiv(cols, bn), layers), dict(BM=bm, BN=bn, BK=16, num_warps=4)


def _pointers(weights: Sequence[Tensor], rms: Optional[Sequence[Tensor]]):
    """What the kernels of weights are given of a group of layers: tables of addresses, and how to read them."""
    dtype = dict(MANY=len(weights) > 1, DTYPE=DTYPES[weights[0].dtype], RELATIVE=rms is not None)
    if len(weights) == 1:
        return (weights[0], rms[0] if rms else None), dtype
    rows = [tensors for tensors in (weights, rms) if tensors]
    table = torch.tensor([[tensor.data_ptr() for tensor in tensors] for tensors in rows])
    table = table.to(weights[0].device, non_blocking=True)  # made on the device, it would wait for all that is queued
    return (table[0], table[1] if rms else None), dtype


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
    bc = _power_of_2(channels)
    bt = max(1, 2048 // bc)
    return dict(BT=bt, BC=bc, num_warps=4 if bc <= 2048 else 8)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    y = torch.empty_like(x)
    mean, rstd = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
    meta = _norm_tile(channels)
    _layer_norm[(_cdiv(tokens, meta['BT']), )](x, weight, bias, y, mean, rstd, tokens, channels, eps, **meta)
    return y, mean, rstd


def layer_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, params: bool,
                    output: bool):
    tokens, channels = x.numel() // x.shape[-1], x.shape[-1]
    meta = _norm_tile(channels)
    blocks = _cdiv(tokens, meta['BT'])
    programs = min(blocks, 16 * _processors(x.device)) if params else blocks
    dx = torch.empty_like(x)
    dw, db = torch.empty(2, programs if params else 1, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x) if output else None
    _layer_norm_grad[(programs, )](dy, x, weight, bias, mean, rstd, dx, dw, db, y if output else dx, tokens, channels,
                                   blocks, PARAMS=params, OUTPUT=output, **meta)
    return dx, dw.sum(0) if params else None, db.sum(0) if params else None, y


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
        value = (.5 * value * (1 + tl.erf(value * 0.7071067811865476))).to(g.dtype.element_ty)
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
        cdf = .5 * (1 + tl.erf(value * 0.7071067811865476))
        if GRN:
            grad += pull[None, :] * (value * cdf)
        grad *= cdf + value * 0.3989422804014327 * tl.exp(-.5 * value * value)
        tl.store(dh + at, grad.to(dh.dtype.element_ty), mask)
        if SUMS:
            total += tl.where(mask, grad, 0.)
    if SUMS:
        tl.store(sums + (image * parts + part) * J + col, tl.sum(total, 0), col < J)


def _hidden_grid(hidden: Tensor):
    """Programs over (hidden channels, parts of an image, images), enough of them to fill the card a few times."""
    images, tokens, channels = hidden.shape
    bj = min(_power_of_2(channels), 128)
    bt = 16
    columns = _cdiv(channels, bj)
    parts = max(1, min(_cdiv(tokens, bt), 8 * _processors(hidden.device) // (columns * images)))
    chunk = _cdiv(_cdiv(tokens, parts), bt) * bt
    return (columns, _cdiv(tokens, chunk), images), chunk, dict(BT=bt, BJ=bj, num_warps=4)


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
def _sum_parts(at, stride, parts, mask, BJ: tl.constexpr):
    total = tl.zeros((BJ, ), tl.float32)
    for _ in range(parts):
        total += tl.load(at, mask, other=0.)
        at += stride
    return total


@triton.jit
def _response(squares, w, norms, gains, parts, J, eps, BJ: tl.constexpr):
    image, col = tl.program_id(0), tl.arange(0, BJ)
    mask = col < J
    norm = tl.sqrt(_sum_parts(squares + image * parts * J + col, J, parts, mask, BJ))
    weight = tl.load(w + col, mask, other=0.).to(tl.float32)
    tl.store(norms + image * J + col, norm, mask)
    tl.store(gains + image * J + col, 1 + weight * norm / (tl.sum(norm, 0) / J + eps), mask)


@triton.jit
def _response_grad(parts_grad, w, norms, pull, grads, parts, images, J, eps, BJ: tl.constexpr):
    image, col = tl.program_id(0), tl.arange(0, BJ)
    mask = col < J
    grad = _sum_parts(parts_grad + image * J + col, images * J, parts, mask, BJ)
    norm = tl.load(norms + image * J + col, mask, other=0.)
    mean = tl.sum(norm, 0) / J + eps
    scaled = grad * tl.load(w + col, mask, other=0.).to(tl.float32)
    value = (scaled - tl.sum(scaled * norm, 0) / J / mean) / mean
    tl.store(pull + image * J + col, tl.where(norm > 0, value / norm, 0.), mask)
    tl.store(grads + image * J + col, grad * norm / mean, mask)


def _row_meta(channels: int):
    bj = _power_of_2(channels)
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
        tl.store(sums + tl.program_id(0) * C + row, tl.sum(value * shift[None, :], 1), (row < C) & (image == 0))
    if COLS:
        value *= tl.load(cols + image * J + col, col < J, other=0.)[None, :]
    if ROWS:
        value *= tl.load(rows + image * row_image + row * row_channel, row < C, other=0.).to(tl.float32)[:, None]
    tl.store(out + image.to(tl.int64) * C * J + at, value.to(out.dtype.element_ty), mask)


def _strides(rows: Optional[Tensor]):
    return (0, 0) if rows is None else rows.stride()


def scaled_weights(images: int, weight: Tensor, rows: Optional[Tensor], cols: Optional[Tensor], beta: Optional[Tensor]):
    channels, hidden = weight.shape
    parts = _cdiv(hidden, 128)
    out = torch.empty(images, channels, hidden, dtype=weight.dtype, device=weight.device)
    sums = None if beta is None else torch.empty(parts, channels, dtype=torch.float32, device=weight.device)
    rest = [out if tensor is None else tensor for tensor in (rows, cols, beta)]
    _scaled_weights[(parts, _cdiv(channels, 16), images)](
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
    parts = _cdiv(channels, 32)
    out = torch.empty_like(weight)
    sums = None if cols is None else torch.empty(parts, images, hidden, dtype=torch.float32, device=weight.device)
    rest = [out if tensor is None else tensor for tensor in (rows, cols, tokens, beta)]
    _weight_grad[(_cdiv(hidden, 64), parts)](
        products, weight, *rest, out, out if sums is None else sums, *_strides(rows), channels, hidden, images,
        ROWS=rows is not None, COLS=cols is not None, BETA=beta is not None, BC=32, BJ=64)
    return out, sums


@triton.jit
def _residual(x, z, bias, sums, rows, out, row_image, row_channel, tokens, C, parts, ROWS: tl.constexpr, BT: tl.constexpr,
              BC: tl.constexpr):
    row, col, image = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC), tl.program_id(2)
    at = (image * tokens + row).to(tl.int64)[:, None] * C + col[None, :]
    mask = (row[:, None] < tokens) & (col[None, :] < C)
    constant = tl.load(bias + col, col < C).to(tl.float32) + _sum_parts(sums + col, C, parts, col < C, BC)
    if ROWS:
        constant *= tl.load(rows + image * row_image + col * row_channel, col < C).to(tl.float32)
    value = tl.load(x + at, mask).to(tl.float32) + tl.load(z + at, mask).to(tl.float32) + constant[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


def residual(x: Tensor, z: Tensor, bias: Tensor, sums: Optional[Tensor], rows: Optional[Tensor]) -> Tensor:
    images, height, width, channels = x.shape
    tokens = height * width
    bc = min(_power_of_2(channels), 256)
    bt = 4096 // bc
    out = torch.empty_like(x)
    _residual[(_cdiv(tokens, bt), _cdiv(channels, bc), images)](
        x, z, bias, bias if sums is None else sums, z if rows is None else rows, out, *_strides(rows), tokens, channels,
        0 if sums is None else len(sums), ROWS=rows is not None, BT=bt, BC=bc)
    return out


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
    bc, bw = min(_power_of_2(channels), 32), 32
    out = torch.empty_like(x)
    grid = _cdiv(channels, bc), _cdiv(height, 4) * _cdiv(width, bw), images
    _depthwise[grid](x, taps, taps if bias is None else bias, x if add is None else add, out, height, width, channels,
                     K=7, FLIP=flip, BIAS=bias is not None, ADD=add is not None, BW=bw, BC=bc, num_warps=2)
    return out


def depthwise_weight_grad(x: Tensor, dy: Tensor) -> Tensor:
    images, height, width, channels = x.shape
    bc, bw = min(_power_of_2(channels), 64), 16
    columns = _cdiv(channels, bc)
    parts = max(1, min(images * height, 4 * _processors(x.device) // (7 * columns)))
    out = torch.empty(parts, 49, channels, dtype=torch.float32, device=x.device)
    _depthwise_weight_grad[(columns, 7, parts)](x, dy, out, height, width, channels, images, K=7, BW=bw, BC=bc,
                                               num_warps=4)
    grad = torch.empty(channels, 49, dtype=x.dtype, device=x.device)
    _sum_taps[(channels, )](out, grad, parts, channels, TAPS=64)
    return grad


@triton.jit
def _sum_taps(sums, grad, parts, C, TAPS: tl.constexpr):
    ch, tap = tl.program_id(0), tl.arange(0, TAPS)
    total = _sum_parts(sums + tap * C + ch, 49 * C, parts, tap < 49, TAPS)
    tl.store(grad + ch * 49 + tap, total.to(grad.dtype.element_ty), tap < 49)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _overlaps(boxes, overlaps, count, blocks, threshold):
    """Bit c of overlaps[r, block]: whether box r hides the c-th box of the block, which comes after it. In each row."""
    lane = tl.arange(0, 64)
    boxes += tl.program_id(2) * count * 4
    overlaps += tl.program_id(2).to(tl.int64) * count * blocks
    row, col = tl.program_id(0) * 64 + lane, tl.program_id(1) * 64 + lane
    if tl.program_id(1) >= tl.program_id(0):
        left, top = tl.load(boxes + row * 4, row < count, 0.), tl.load(boxes + row * 4 + 1, row < count, 0.)
        right, bottom = tl.load(boxes + row * 4 + 2, row < count, 0.), tl.load(boxes + row * 4 + 3, row < count, 0.)
        x1, y1 = tl.load(boxes + col * 4, col < count, 0.), tl.load(boxes + col * 4 + 1, col < count, 0.)
        x2, y2 = tl.load(boxes + col * 4 + 2, col < count, 0.), tl.load(boxes + col * 4 + 3, col < count, 0.)
        width = tl.maximum(tl.minimum(right[:, None], x2[None, :]) - tl.maximum(left[:, None], x1[None, :]), 0.)
        height = tl.maximum(tl.minimum(bottom[:, None], y2[None, :]) - tl.maximum(top[:, None], y1[None, :]), 0.)
        shared = width * height
        total = ((right - left) * (bottom - top))[:, None] + ((x2 - x1) * (y2 - y1))[None, :] - shared
        hides = (tl.div_rn(shared, total) > threshold) & (col[None, :] > row[:, None]) & (col[None, :] < count)
        bits = tl.sum(tl.where(hides, tl.full((64, 64), 1, tl.int64) << lane.to(tl.int64)[None, :], 0), 1)
        tl.store(overlaps + row * blocks + tl.program_id(1), bits, row < count)


@triton.jit
def _kept(overlaps, kept, count, blocks, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """A program walks down the boxes of a row, 64 at a time: first among themselves, then what they hide further down."""
    col = tl.arange(0, BLOCKS)
    overlaps += tl.program_id(0).to(tl.int64) * count * blocks
    kept += tl.program_id(0) * blocks
    hidden = tl.zeros((BLOCKS, ), tl.int64)
    for block in range(blocks):
        alive = ~tl.sum(tl.where(col == block, hidden, 0), 0)
        for i in range(64):
            row = block * 64 + i
            hides = tl.load(overlaps + row * blocks + block, row < count, other=0)
            alive = tl.where((alive >> i) & 1 == 1, alive & ~hides, alive)
        tl.store(kept + block, alive)
        for start in range(0, 64, ROWS):
            lane = start + tl.arange(0, ROWS)
            row = block * 64 + lane
            use = ((alive >> lane.to(tl.int64)) & 1 == 1) & (row < count)
            at, mask = row[:, None] * blocks + col[None, :], use[:, None] & (col > block)[None, :] & (col < blocks)[None, :]
            hidden |= tl.reduce(tl.load(overlaps + at, mask, other=0), 0, _either)


def nms_kept(boxes: Tensor, threshold: float) -> Tensor:
    rows, count, _ = boxes.shape
    blocks = _cdiv(count, 64)
    overlaps = torch.empty(rows, count, blocks, dtype=torch.int64, device=boxes.device)
    kept = torch.empty(rows, blocks, dtype=torch.int64, device=boxes.device)
    if rows and count:
        _overlaps[(blocks, blocks, rows)](boxes.contiguous(), overlaps, count, blocks, threshold)
        width = _power_of_2(blocks)
        _kept[(rows, )](overlaps, kept, count, blocks, BLOCKS=width, ROWS=max(1, min(64, 16384 // width)), num_warps=16)
    lane = torch.arange(64, device=boxes.device)
    return (kept[..., None] >> lane & 1).bool().flatten(1)[:, :count]


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    order = scores.sort(stable=True, descending=True)[1]
    return order[nms_kept(boxes[order][None], threshold)[0]]
