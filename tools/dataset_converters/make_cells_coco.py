#!/usr/bin/env python
"""Convert the blood cells of BCCD_Dataset to the layout of COCO 2017: tools/dataset_converters/make_cells_coco.py SRC OUT.

SRC is a checkout of the public repository Shenggan/BCCD_Dataset (MIT License): 364 photographs of 640x480 with boxes around
red cells, white cells and platelets. Its list ``trainval`` is train here, its ``test`` val. Some red cells are not labelled.
"""
import argparse
from pathlib import Path
from typing import Iterator, List

import cv2
from voc import Photo, is_there, read_voc, write_coco

from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import exit_clearly

VERSION = '1.0'  # raise it when the same checkout gives another data set
LISTS = dict(train='trainval', val='test')
CATEGORIES = ('RBC', 'WBC', 'Platelets')
README = """# Blood cells

Photographs of BCCD_Dataset (https://github.com/Shenggan/BCCD_Dataset, MIT License) with its boxes, in the layout of COCO
2017, made by make_cells_coco.py of liera_mm. Its list trainval is train here, its test val. Boxes without an area are
left out. Some red cells are not labelled.
"""


def find_root(src: Path) -> Path:
    """The folder of a checkout that has VOC's folders: itself or its ``BCCD``.

    Raises:
        SetupError: If there is none.
    """
    for root in (src / 'BCCD', src):
        if (root / 'ImageSets/Main').is_dir():
            return root
    raise SetupError(f'{src} is no checkout of BCCD_Dataset: there is no {src / "BCCD/ImageSets/Main"}',
                     'git clone https://github.com/Shenggan/BCCD_Dataset, and give that folder')


def read_list(root: Path, split: str) -> List[str]:
    return read(root / f'ImageSets/Main/{LISTS[split]}.txt').decode().split()


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f'{path} cannot be read: {error.strerror}', 'Check out the repository again') from None


def photos(root: Path, names: List[str]) -> Iterator[Photo]:
    for name in names:
        path = root / f'JPEGImages/{name}.jpg'
        content, image = read(path), cv2.imread(str(path))
        if image is None:
            raise SetupError(f'{path} cannot be read as an image', 'Check out the repository again')
        _, _, boxes = read_voc(f'{name}.xml', read(root / f'Annotations/{name}.xml'),
                               dict(zip(CATEGORIES, CATEGORIES)))
        yield Photo(path.name, content, image.shape[1], image.shape[0], boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('src', metavar='SRC', type=Path, help='checkout of BCCD_Dataset')
    parser.add_argument('out', metavar='OUT', type=Path, help='folder to write')
    parser.add_argument('--force', action='store_true', help='replace what OUT holds')
    args = parser.parse_args()
    info = dict(description='BCCD_Dataset in the layout of COCO 2017', contributor='make_cells_coco.py', version=VERSION)
    if is_there(args.out, LISTS, info, args.force):
        return
    root = find_root(args.src)
    names = {split: read_list(root, split) for split in LISTS}
    write_coco(args.out, {split: photos(root, names[split]) for split in LISTS},
               {split: len(names[split]) for split in LISTS}, CATEGORIES, info, README)


if __name__ == '__main__':
    exit_clearly(main)
