"""Pascal VOC's annotations as data sets in COCO's format, for the tools that make them.

There are boxes only: no masks.
"""
import json
import os
import shutil
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple
from xml.etree import ElementTree

from coco import is_complete, json_path, progress, summary

from liera_mm.core.errors import SetupError


class Box(NamedTuple):
    """One object; corners in pixels as VOC's file has them."""
    category: str
    left: float
    top: float
    right: float
    bottom: float
    iscrowd: bool = False

    @property
    def area(self) -> float:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)

    def within(self, left: float, top: float, right: float, bottom: float) -> 'Box':
        """The part of it in a window, in the coordinates of that window; without an area if there is none."""
        return self._replace(left=max(self.left, left) - left, top=max(self.top, top) - top,
                             right=min(self.right, right) - left, bottom=min(self.bottom, bottom) - top)


class Photo(NamedTuple):
    """One image of a data set: name and content of its file, size in pixels, objects."""
    name: str
    content: bytes
    width: int
    height: int
    boxes: Sequence[Box]


def read_voc(name: str, content: bytes, categories: Mapping[str, str]) -> Tuple[int, int, List[Box]]:
    """Width, height and objects of one of VOC's XML files; difficult ones are crowds, to be ignored as VOC does.

    Args:
        name: Name of the file, for errors.
        content: What is in it.
        categories: For each name of a category in it, that of the data set.

    Raises:
        SetupError: If it is damaged, or has an object of another category.
    """
    try:
        root = ElementTree.fromstring(content)
        width, height = (int(root.find(f'size/{side}').text) for side in ('width', 'height'))
        boxes = [Box(item.find('name').text.strip(), *(float(item.find(f'bndbox/{side}').text)
                                               for side in ('xmin', 'ymin', 'xmax', 'ymax')),
                     iscrowd=item.findtext('difficult', '0').strip() == '1') for item in root.iter('object')]
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise SetupError(f'{name} is no annotation file of Pascal VOC, or a damaged one: {error}',
                         'Fetch the data set again') from None
    unknown = sorted({box.category for box in boxes} - set(categories))
    if unknown:
        raise SetupError(f'{name} has objects of the unknown category {unknown[0]}; known: {", ".join(categories)}',
                         'Fetch the data set again: this file belongs to another one')
    return width, height, [box._replace(category=categories[box.category]) for box in boxes]


def is_there(out: Path, splits: Iterable[str], info: Dict[str, str], force: bool) -> bool:
    """Whether a data set is in a folder already, which is said, before anything is fetched to make it.

    Args:
        out: The folder.
        splits: Names of its splits.
        info: As of :func:`write_coco`.
        force: Whether what the folder holds may be replaced.

    Raises:
        SetupError: If the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise SetupError(f'{out} is not a folder', 'Name another')
    if force:
        return False
    if all(is_complete(out, split, info) for split in splits):
        print(f'{out} is up to date')
        return True
    if out.exists() and any(out.iterdir()):
        raise SetupError(f'{out} is not empty and holds something else', 'Name another folder or pass --force')
    return False


def write_coco(out: Path, splits: Dict[str, Iterator[Photo]], counts: Dict[str, int], categories: Sequence[str],
               info: Dict[str, str], readme: str) -> None:
    """Write a data set in the place of what is there. It appears whole or not at all.

    Objects are clipped to their image; those without an area are left out. Images without any object stay: a detector can
    be wrong in them.

    Args:
        out: Folder to write.
        splits: Images of each split.
        counts: Their numbers, for the progress bars.
        categories: Names, in the order of their ids from 1.
        info: What determines the data, for the ``info`` of the JSON files.
        readme: Text of the README.md, the licence in it.
    """
    partial = out.with_name(f'{out.name}.partial')
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
    (partial / 'annotations').mkdir(parents=True)
    (partial / 'README.md').write_text(readme)
    lines = []
    for split, photos in splits.items():
        (partial / f'{split}2017').mkdir()
        coco = dict(info=info, licenses=[], images=[], annotations=[],
                    categories=[dict(id=i, name=name, supercategory='none') for i, name in enumerate(categories, 1)])
        dropped = 0
        for image_id, photo in enumerate(progress(photos, split, counts[split]), 1):
            (partial / f'{split}2017' / photo.name).write_bytes(photo.content)
            coco['images'].append(dict(id=image_id, file_name=photo.name, width=photo.width, height=photo.height))
            for box in photo.boxes:
                box = box.within(0, 0, photo.width, photo.height)
                dropped += not box.area
                if box.area:
                    coco['annotations'].append(dict(
                        id=len(coco['annotations']) + 1, image_id=image_id,
                        category_id=categories.index(box.category) + 1,
                        bbox=[box.left, box.top, box.right - box.left, box.bottom - box.top], area=box.area,
                        iscrowd=int(box.iscrowd)))
        json_path(partial, split).write_text(json.dumps(coco))
        lines.append(summary(coco, split) + (f'; {dropped} without an area left out' if dropped else ''))
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
    print('\n'.join(lines))
