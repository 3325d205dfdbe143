"""Suppression of overlapping boxes."""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, power_of_2


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
    blocks = cdiv(count, 64)
    overlaps = torch.empty(rows, count, blocks, dtype=torch.int64, device=boxes.device)
    kept = torch.empty(rows, blocks, dtype=torch.int64, device=boxes.device)
    if rows and count:
        _overlaps[(blocks, blocks, rows)](boxes.contiguous(), overlaps, count, blocks, threshold)
        width = power_of_2(blocks)
        _kept[(rows, )](overlaps, kept, count, blocks, BLOCKS=width, ROWS=max(1, min(64, 16384 // width)), num_warps=16)
    lane = torch.arange(64, device=boxes.device)
    return (kept[..., None] >> lane & 1).bool().flatten(1)[:, :count]


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    order = scores.sort(stable=True, descending=True)[1]
    return order[nms_kept(boxes[order][None], threshold)[0]]
