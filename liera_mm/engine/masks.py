"""Masks in COCO's format: polygons, or run lengths."""
import math
from typing import Any, Dict, List, Optional

import numpy as np


def is_mask(segmentation: Any) -> bool:
    """Whether MMDetection takes it for a mask, as far as one sees without decoding it."""
    if isinstance(segmentation, dict):
        return bool(segmentation.get('counts')) and bool(segmentation.get('size'))
    return bool(polygons_of(segmentation))


def polygons_of(segmentation: Any) -> List[List[float]]:
    """The polygons of a segmentation that MMDetection takes; none if it is of another kind."""
    parts = segmentation if isinstance(segmentation, list) else ()
    return [part for part in parts if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and are_finite(part)]


def are_finite(values: List[Any]) -> bool:
    """Whether all values are finite numbers. For one that is not, pycocotools takes memory until there is none."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def runs_fit(segmentation: Dict[str, Any], width: float, height: float) -> bool:
    """Whether run lengths can be decoded to a mask of an image of that size."""
    return segmentation['size'] == [height, width] and pixels_of(segmentation['counts']) == height * width


def pixels_of(counts: Any) -> Optional[int]:
    """The number of pixels that run lengths are of; None if they cannot be decoded.

    pycocotools reads and writes beyond its memory where they are none, or too many for their mask.

    Args:
        counts: A list of them, or COCO's compressed text: of each its difference from the one before the last, from the
            fourth on, as a two's complement of 5 bits a letter, the lowest first; all letters but the last have a sixth bit.
    """
    if isinstance(counts, list):
        lengths = counts if set(map(type, counts)) <= {int, float} else [-1]
        return int(sum(lengths)) if min(lengths, default=0) >= 0 and math.isfinite(sum(lengths)) else None
    letters = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48 if isinstance(counts, str) else np.array([-1])
    last = np.flatnonzero(letters < 32)
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or not len(last) or last[-1] < len(letters) - 1:
        return None
    sizes = np.diff(last, prepend=-1)
    first = last - sizes + 1
    if sizes.max() > 7:
        return None
    lengths = np.add.reduceat((letters & 31) << 5 * (np.arange(len(letters)) - np.repeat(first, sizes)), first)
    lengths -= np.where(letters[last] & 16, 1 << 5 * sizes, 0)
    for parity in (1, 2):
        lengths[parity::2] = lengths[parity::2].cumsum()
    return int(lengths.sum()) if lengths.min() >= 0 else None
