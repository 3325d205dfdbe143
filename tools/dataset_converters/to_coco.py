#!/usr/bin/env python
"""Convert annotations to COCO's format and split them: tools/dataset_converters/to_coco.py IMAGES ANNOTATIONS OUT [options].

IMAGES is a folder. ANNOTATIONS is a folder with a file of Pascal VOC (.xml) or YOLO (.txt) for each image, of the same name,
which globox reads, or a .json file of COCO. OUT is a folder, for train.json and val.json of a random split, or, for
annotations that are split already, one .json file. Images stay where they are: IMAGES is the data_prefix of the config.
"""
import argparse
import json
import random
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple
from xml.etree import ElementTree

import yaml
from PIL import Image, ImageOps

from liera_mm.core.checkpoint import write_atomically
from liera_mm.core.errors import SetupError
from liera_mm.engine.annotations import (
    check_annotations,
    check_categories,
    check_images,
    check_lists,
    check_unique,
    read_json,
)
from liera_mm.engine.cli import exit_clearly
from liera_mm.engine.datasets import listed

try:
    from globox import Annotation, AnnotationSet, BoundingBox
    from globox.errors import ParsingError
    from globox.image_utils import IMAGE_EXTENSIONS
except ImportError:
    raise SystemExit('globox, which reads annotations, is not installed\npip install globox==2.9.0') from None

ENCODING = 'utf-8-sig'  # UTF-8, with or without the mark that some programs put in front
SUFFIXES = IMAGE_EXTENSIONS | {'.webp'}
NAMES = ('classes.txt', 'obj.names', 'data.yaml', 'dataset.yaml')  # where YOLO's tools keep the names of the classes


def image_files(folder: Path) -> Dict[str, Path]:
    """The images in a folder and those below it, by their paths in it without suffix."""
    files = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.name[0] != '.')
    if not files:
        raise SetupError(f'There are no images in {folder}', f'Give one with images ({", ".join(sorted(SUFFIXES))})')
    known: Dict[str, Path] = {}
    for path in files:
        other = known.setdefault(key(path, folder), path)
        if other is not path:
            raise SetupError(f'{other} and {path} would have the same annotations', 'Take one away, or rename it')
    return known


def key(path: Path, folder: Path) -> str:
    """What an image and its annotations have in common: the path in their folder, without the suffix."""
    return str(path.relative_to(folder).with_suffix(''))


def image_sizes(path: Path) -> Tuple[Tuple[int, int], Tuple[int, int]]:
    """Width and height of an image as it is shown, turned as EXIF says; and as it is stored."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).size, image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise SetupError(f'{path} cannot be read as an image: {error}', 'Put an intact one there, or take it away') from None


def find_names(annotations: Path) -> Optional[Path]:
    """The file of the classes' names that lies beside YOLO's annotations, or in one of the two folders above."""
    folders = [annotations, *annotations.resolve().parents[:2]]
    return next((folder / name for folder in folders for name in NAMES if (folder / name).is_file()), None)


def read_names(path: Path) -> List[str]:
    """The names of classes, of a file with one in each line or of YOLO's YAML."""
    try:
        text = path.read_text(ENCODING)
        content = yaml.safe_load(text) if path.suffix in ('.yaml', '.yml') else None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise SetupError(f'{path} cannot be read: {" ".join(str(error).split())}',
                         'Give a text in UTF-8, with the name of a class in each line') from None
    if path.suffix not in ('.yaml', '.yml'):
        names = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        names = content.get('names') if isinstance(content, dict) else None
        if isinstance(names, dict):
            by_number = {str(number): name for number, name in names.items()}
            numbers = [str(number) for number in range(len(names))]
            if by_number.keys() != set(numbers):
                raise SetupError(f'{path} numbers its classes {listed(list(by_number))}', 'Number them 0, 1, 2, ...')
            names = [by_number[number] for number in numbers]
    if not names or not isinstance(names, list):
        raise SetupError(f'{path} has no names of classes', 'Write one in each line')
    names = [str(name) for name in names]
    check_unique(str(path), 'names of classes', names, 'Give each class a name of its own')
    return names


def read_yolo(path: Path, image_id: str, size: Tuple[int, int], names: List[str]) -> Annotation:
    """One of YOLO's files: a line for each object, with its box or its polygon, of which the box is taken."""
    boxes = []
    for line in filter(str.strip, path.read_text(ENCODING).splitlines()):
        read = BoundingBox.from_yolo_seg if len(line.split()) > 6 else BoundingBox.from_yolo_v5
        box = read(line, image_size=size)
        if not box.label.isdecimal() or int(box.label) >= len(names):
            raise SetupError(f'{path} has an object of class {box.label}, and the classes have {len(names)} names: '
                             f'{listed(names)}', 'Say with --classes which file names them, in the order of their numbers')
        boxes.append(BoundingBox.create(label=names[int(box.label)], coords=box.ltrb))
    return Annotation(image_id, size, boxes)


def read_voc(path: Path, image_id: str, sizes: Tuple[Tuple[int, int], Tuple[int, int]]) -> Tuple[Annotation, List[bool]]:
    """One of Pascal VOC's files, and which of its objects are difficult.

    Args:
        path: The file.
        image_id: What the annotation is called.
        sizes: Of :func:`image_sizes`; that which the file says counts.
    """
    root = ElementTree.parse(path).getroot()
    objects, size = list(root.iter('object')), root.find('size')
    if not objects and size is None:
        raise ValueError('it has neither an object nor a size')
    boxes = [BoundingBox.from_xml(entry) for entry in objects]
    boxes = [BoundingBox.create(label=box.label.strip(), coords=box.ltrb) for box in boxes]
    if not all(box.label for box in boxes):
        raise ValueError('an object has no name')
    said = size is not None and tuple(int(float(size.findtext(side) or 0)) for side in ('width', 'height'))
    # What boxes are said to be in, unless no number was put there
    if said and said not in sizes and boxes and all(box.xmax <= said[0] and box.ymax <= said[1] for box in boxes):
        raise ValueError(f'it is of an image of {said[0]}x{said[1]} pixels, and {image_id} has {sizes[0][0]}x{sizes[0][1]}')
    difficult = [entry.findtext('difficult', '0').strip() not in ('0', '') for entry in objects]
    return Annotation(image_id, said if said in sizes else sizes[0], boxes), difficult


def annotation_files(folder: Path) -> Dict[str, Path]:
    """The files of Pascal VOC in a folder and those below it, or if there are none, of YOLO; by :func:`key`."""
    for suffix in ('.xml', '.txt'):
        files = {key(path, folder): path for path in folder.rglob('*')
                 if path.suffix.lower() == suffix and path.name not in NAMES and path.name[0] != '.'}
        if files:
            return files
    raise SetupError(f'{folder} has no .xml or .txt file',
                     'Give a folder with .xml files of Pascal VOC or .txt files of YOLO, or a .json file of COCO')


def convert(images: Path, annotations: Path, file_of_names: Optional[Path] = None) -> Dict[str, Any]:
    """The annotations of VOC or YOLO in COCO's format.

    Args:
        images: Folder of images; those without a file of annotations have no object.
        annotations: Folder of the files.
        file_of_names: Names of the classes in their order; by default, those of the file that YOLO's tools write, and of
            VOC those that objects have, by the alphabet.

    Returns:
        The annotations. VOC's difficult objects are crowds, to be ignored as VOC does.

    Raises:
        SetupError: If there are no annotations for the images, or some cannot be read.
    """
    files = annotation_files(annotations)
    yolo = next(iter(files.values())).suffix.lower() == '.txt'
    file_of_names = file_of_names or (find_names(annotations) if yolo else None)
    if yolo and not file_of_names:
        raise SetupError(f'YOLO numbers its classes, and there is no {NAMES[0]} or {NAMES[2]} in {annotations} or above it',
                         'Give a file with a name in each line, or the YAML file of the data set: --classes FILE')
    names = file_of_names and read_names(file_of_names)
    known = image_files(images)
    if not files.keys() & known.keys():
        raise SetupError(f'None of the {len(files)} annotation files in {annotations} has the name of an image in {images}, '
                         f'such as {min(files)}', 'Give the folders of images and annotations that belong together')
    parsed, difficult = [], []
    for name, path in known.items():
        image_id, sizes, file = str(path.relative_to(images)), image_sizes(path), files.get(name)
        try:
            if file is None:
                annotation, theirs = Annotation(image_id, sizes[0]), []
            elif yolo:
                annotation = read_yolo(file, image_id, sizes[0], names)
                theirs = [False] * len(annotation.boxes)
            else:
                annotation, theirs = read_voc(file, image_id, sizes)
        except (ParsingError, ValueError, AssertionError, OSError, ElementTree.ParseError) as error:
            raise SetupError(f'{file} cannot be read as annotations of {"YOLO" if yolo else "Pascal VOC"}: '
                             f'{error}', 'Correct it, or take it away') from None
        parsed.append(annotation)
        difficult += theirs
    for what, ours, theirs in (('annotation files belong to no image', files, known),
                               ('images have no annotation file, and are taken to have no object', known, files)):
        alone = sorted(ours.keys() - theirs.keys())
        if alone:
            print(f'{len(alone)} of {len(ours)} {what}, such as {ours[alone[0]]}')
    labels = sorted({box.label for annotation in parsed for box in annotation.boxes})
    unknown = [label for label in labels if label not in (names or labels)]
    if unknown:
        raise SetupError(f'{annotations} has objects of {listed(unknown)}, which --classes does not name',
                         'Name all classes, or leave out --classes')
    content = AnnotationSet(parsed).to_coco(
        label_to_id={label: number for number, label in enumerate(names or labels, 1)},
        imageid_to_id={annotation.image_id: number for number, annotation in enumerate(parsed, 1)})
    for number, (entry, crowd) in enumerate(zip(content['annotations'], difficult), 1):
        entry.update(id=number, iscrowd=int(crowd))  # from 1, since COCO's evaluation takes an object with 0 for not found
    return content


def read_coco(path: Path, images: Path) -> Dict[str, Any]:
    """Annotations that are in COCO's format already, of which everything stays, masks too."""
    content = read_json(str(path))
    check_lists(str(path), content, ['images', 'annotations', 'categories'])
    check_images(str(path), content['images'], 'file_name')
    check_categories(str(path), content['categories'])
    check_annotations(str(path), content, [category['name'] for category in content['categories']])
    missing = [image['file_name'] for image in content['images'] if not (images / image['file_name']).is_file()]
    if missing:
        raise SetupError(f'{len(missing)} of {len(content["images"])} images of {path} are not in {images}, the first is '
                         f'{missing[0]}', 'Give the folder in which the paths of the annotations begin')
    return content


def split(content: Dict[str, Any], share: float, seed: int) -> Dict[str, Dict[str, Any]]:
    """Two parts of annotations in COCO's format, ``val`` with that share of the images, drawn at random.

    Raises:
        SetupError: If there are fewer than two images.
    """
    ids = [image['id'] for image in content['images']]
    if len(ids) < 2:
        raise SetupError(f'There is {len(ids)} image, which cannot be split', 'Give more images')
    count = min(max(round(share * len(ids)), 1), len(ids) - 1)
    val = set(random.Random(seed).sample(ids, count))
    return dict(train=part(content, set(ids) - val), val=part(content, val))


def part(content: Dict[str, Any], ids: Set[Any]) -> Dict[str, Any]:
    """The part of annotations in COCO's format that is of some images."""
    return dict(content, images=[image for image in content['images'] if image['id'] in ids],
                annotations=[annotation for annotation in content['annotations'] if annotation['image_id'] in ids])


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert annotations to COCO's format, and split them")
    parser.add_argument('images', metavar='IMAGES', type=Path, help='folder of images')
    parser.add_argument('annotations', metavar='ANNOTATIONS', type=Path,
                        help='folder of .xml files of Pascal VOC or .txt files of YOLO, or a .json file of COCO')
    parser.add_argument('out', metavar='OUT', type=Path, help='folder for train.json and val.json, or one .json file')
    parser.add_argument('--val', type=float, default=.2, help='share of the images to validate on; default: 0.2')
    parser.add_argument('--seed', type=int, default=0, help='of the split; default: 0')
    parser.add_argument('--classes', type=Path, metavar='FILE', help='names of the classes, one in each line or in the YAML '
                        f'file of YOLO; default: {" or ".join(NAMES)} near the annotations, of VOC those that objects have')
    parser.add_argument('--force', action='store_true', help='replace what is there')
    args = parser.parse_args()
    if not 0 < args.val < 1:
        parser.error(f'--val must be between 0 and 1, not {args.val:g}')
    whole = args.out.suffix == '.json'
    outs = dict(all=args.out) if whole else dict(train=args.out / 'train.json', val=args.out / 'val.json')
    there = [path for path in outs.values() if path.exists()]
    if there and not args.force:
        raise SetupError(f'{there[0]} is there already', 'Give another OUT, or pass --force')
    for path in filter(None, (args.images, args.annotations, args.classes)):
        if not path.exists():
            raise SetupError(f'There is no {path}', 'Give a folder or file that is there')
    if args.annotations.is_file():
        content = read_coco(args.annotations, args.images)
    else:
        content = convert(args.images, args.annotations, args.classes)
    for name, its_part in (dict(all=content) if whole else split(content, args.val, args.seed)).items():
        outs[name].parent.mkdir(parents=True, exist_ok=True)
        write_atomically(outs[name], json.dumps(its_part).encode())
        print(f'{outs[name]}: {len(its_part["images"])} images, {len(its_part["annotations"])} objects, of '
              f'{listed([category["name"] for category in content["categories"]])}')


if __name__ == '__main__':
    exit_clearly(main)
