"""Values of feature maps at places that differ by region, for what torchvision has no kernels.

Features (N, C, H, W) are laid out as a table (N * H * W, C), a pixel a row. Of K regions, bins (h, w) have S samples each.
"""
from typing import Iterator, List, Tuple

import torch
from torch import Tensor

CHUNK = 2**24  # how many values to sample at a time


def table(features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C)."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def chunks(counts: Tensor, channels: int) -> Iterator[Tensor]:
    """Indices of regions that fit in memory together, given the number of samples of each, (K,); the largest first."""
    counts, order = counts.sort(descending=True)
    counts, start = counts.tolist(), 0
    while start < len(counts):
        end = start + max(1, int(CHUNK // max(1, counts[start] * channels)))
        yield order[start:end]
        start = end


def samples(start: Tensor, size: Tensor, bins: int, ratio: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Where to take samples of K segments along an axis, evenly in each bin.

    Args:
        start (Tensor): (K,), as ``size``, in pixels.
        ratio (int): How many to take in each bin; 0 for as many as it has pixels.

    Returns:
        tuple: Positions (K, bins, S), which of them are used (K, 1, S), and how many those are (K, 1, 1).
    """
    start, width = start[:, None, None], size[:, None, None] / bins
    count = torch.full_like(width, ratio) if ratio > 0 else width.ceil().clamp(min=0)
    sample = torch.arange(int(count.max()) if count.numel() else 0, device=start.device)
    positions = start + torch.arange(bins, device=start.device)[:, None] * width + (
        sample + 0.5) * width / count.clamp(min=1)
    return positions, sample < count, count


def corners(y: Tensor, x: Tensor, height: int, width: int) -> List[Tuple[Tensor, Tensor]]:
    """The four pixels around every position, as places in the flattened (height, width), and their weights.

    A position within a pixel of the map counts as the nearest one on it; further away, weights are 0.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = (position.where(inside, 0).clamp(0, length - 1) for position, length in ((y, height), (x, width)))
    top, left = y.detach().floor(), x.detach().floor()
    rows = (top, 1 - (y - top)), ((top + 1).clamp(max=height - 1), y - top)
    columns = (left, 1 - (x - left)), ((left + 1).clamp(max=width - 1), x - left)
    return [(row.long() * width + column.long(), row_weight * column_weight * inside)
            for row, row_weight in rows for column, column_weight in columns]


def largest(values: Tensor, used: Tensor) -> Tuple[Tensor, Tensor]:
    """The largest used sample of every bin, the first of equal ones, and its index; 0 and -1 if there is none.

    Args:
        values (Tensor): (K, h, w, S, C).
        used (Tensor): (K, h, w, S).

    Returns:
        tuple: Values and indices, (K, C, h, w) both.
    """
    if not values.shape[3]:
        none = values.sum(3).permute(0, 3, 1, 2)
        return none, torch.full_like(none, -1, dtype=torch.long)
    values = values.where(used[..., None], -torch.inf)
    index = values.argmax(3, keepdim=True)
    found = used.any(3)[:, None]
    value, index = (tensor[:, :, :, 0].permute(0, 3, 1, 2) for tensor in (values.gather(3, index), index))
    return value.where(found, 0), index.where(found, -1)


def scatter(target: Tensor, images: Tensor, places: Tensor, values: Tensor) -> None:
    """Add values at places of the flattened (H, W) of a target (N, C, H, W), all (K, C, h, w), the images being (K,)."""
    n, c, height, width = target.shape
    first = (images.long()[:, None] * c + torch.arange(c, device=target.device)) * (height * width)
    target.view(-1).index_add_(0, (first[:, :, None, None] + places).flatten(), values.flatten())
