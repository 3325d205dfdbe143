#!/usr/bin/env python
"""Write a data set of tree crowns in aerial photographs, in the layout of COCO 2017: make_trees_coco.py OUT [--wheel FILE].

The photographs and boxes are those inside the wheel of deepforest 1.5.2, which pip downloads unless it is given. Train and
val are two places of Yellowstone; test are two photographs of other landscapes (Florida and California), one tile each.

Photographs are cut into tiles of about 400 px that do not overlap and leave no rest. A crown that a cut divides is an
object, up to the cut, of the tile that holds at least half of its box; in the others it is a crowd, which counts neither for
nor against a detector. Tiles without crowns stay; MMDetection's ``filter_empty_gt`` leaves them out of a training.
"""
import argparse
from pathlib import Path
from typing import Iterator, List, Tuple

import cv2
import numpy as np
from voc import Box, Photo, is_there, read_voc, write_coco

from liera_mm.engine.cli import exit_clearly
from liera_mm.engine.wheels import read_wheel

VERSION = '1.0'  # raise it when the same wheel gives another data set
REQUIREMENT = 'deepforest==1.5.2'
SHA256 = '705f08a80f33514044010865f61eefe5037d5492055c47574d213db74bebdf25'
PHOTOS = dict(
    train=('2019_YELL_2_528000_4978000_image_crop2', ),
    val=('2019_YELL_2_541000_4977000_image_crop', ),
    test=('OSBS_029', 'SOAP_061'))
CATEGORIES = dict(Tree='Tree', Alive='Tree', Dead='Tree')  # SOAP_061 tells them apart, the others don't
TILE = 400  # px
README = f"""# Tree crowns

Tiles of aerial photographs with boxes around tree crowns, in the layout of COCO 2017, made by make_trees_coco.py of
liera_mm from the files in deepforest/data of the wheel {REQUIREMENT} (sha256 {SHA256}).

The wheel is under the MIT License, Copyright (c) 2019, Ben Weinstein, and names no other terms for its data. The photographs
are of the airborne camera of the National Ecological Observatory Network (NEON), whose own terms for data ask for credit.
Cite Weinstein et al., DeepForest: A Python package for RGB deep learning tree crown delineation, Methods in Ecology and
Evolution 11 (2020), 1743-1751, https://doi.org/10.1111/2041-210X.13472.

train: {PHOTOS['train'][0]}; val: {PHOTOS['val'][0]}; test: {' and '.join(PHOTOS['test'])}.
A crown less than half in a tile is a crowd (iscrowd) there. Tiles are JPEG files of quality 95.
"""


def windows(width: int, height: int) -> List[Tuple[int, int, int, int]]:
    """Left, top, right and bottom of the tiles of a photograph: all of nearly one size, as close to `TILE` as can be."""
    columns, rows = (np.linspace(0, side, max(round(side / TILE), 1) + 1).round().astype(int).tolist()
                     for side in (width, height))
    return [(left, top, right, bottom) for top, bottom in zip(rows, rows[1:]) for left, right in zip(columns, columns[1:])]


def boxes_in(window: Tuple[int, int, int, int], boxes: List[Box]) -> List[Box]:
    """The boxes in a tile, in its coordinates; those less than half in it are crowds."""
    parts = [(box, box.within(*window)) for box in boxes]
    return [part._replace(iscrowd=box.iscrowd or part.area < box.area / 2) for box, part in parts if part.area]


def tiles(name: str, png: bytes, xml: bytes) -> Iterator[Photo]:
    """Cut one photograph."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    _, _, boxes = read_voc(f'{name}.xml', xml, CATEGORIES)
    for number, (left, top, right, bottom) in enumerate(windows(*image.shape[1::-1]), 1):
        _, jpeg = cv2.imencode('.jpg', image[top:bottom, left:right], [cv2.IMWRITE_JPEG_QUALITY, 95])
        yield Photo(f'{name}_{number:02d}.jpg', jpeg.tobytes(), right - left, bottom - top,
                    boxes_in((left, top, right, bottom), boxes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', metavar='OUT', type=Path, help='folder to write')
    parser.add_argument('--wheel', type=Path, help=f'the wheel of {REQUIREMENT}; downloaded by default')
    parser.add_argument('--force', action='store_true', help='replace what OUT holds')
    args = parser.parse_args()
    info = dict(description='tree crowns in the layout of COCO 2017', contributor='make_trees_coco.py', version=VERSION)
    if is_there(args.out, PHOTOS, info, args.force):
        return
    files = [f'deepforest/data/{name}.{kind}' for names in PHOTOS.values() for name in names for kind in ('png', 'xml')]
    content = read_wheel(REQUIREMENT, files, args.wheel, SHA256)
    splits = {split: [tile for name in names for tile in tiles(
        name, content[f'deepforest/data/{name}.png'], content[f'deepforest/data/{name}.xml'])]
              for split, names in PHOTOS.items()}
    write_coco(args.out, splits, {split: len(photos) for split, photos in splits.items()}, ['Tree'], info, README)


if __name__ == '__main__':
    exit_clearly(main)
