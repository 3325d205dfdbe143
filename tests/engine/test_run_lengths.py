"""Run lengths as pycocotools writes them, and what are none."""
import numpy as np
import pytest
from pycocotools import mask as rle

from liera_mm.engine.masks import pixels_of


@pytest.mark.parametrize('share', [0, .001, .1, .5, 1])
def test_pixels_are_those_of_the_mask(share):
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random(rng.integers(1, 300, 2)) < share
        counts = rle.encode(np.asfortranarray(mask, np.uint8))['counts'].decode()
        assert pixels_of(counts) == mask.size
        assert pixels_of(counts[:-1]) != mask.size


@pytest.mark.parametrize('counts', [
    '', 'df4X', 'hello world', 'é', '~', 'X' * 9 + '0', 'O', 5, None, [3, -1], ['3'], [[1]], [None], [1, float('nan')],
    [float('inf')]], ids=repr)
def test_what_cannot_be_decoded(counts):
    assert pixels_of(counts) is None


def test_a_list():
    assert pixels_of([3, 4]) == pixels_of([3., 4.]) == 7
