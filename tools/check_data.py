#!/usr/bin/env python
"""Show what a detector is to learn from, and what is odd about it: tools/check_data.py CONFIG [--out DIR].

Prints objects by class and size, and oddities such as images that are there twice. Draws images with their boxes and masks,
DIR/train.jpg and so on.
"""
import argparse
from pathlib import Path
from typing import List

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data, exit_clearly, load_config
from liera_mm.engine.data_report import Split, content_digest, duplicates, findings, image_path, read_splits, table
from liera_mm.engine.options import add_cfg_options
from liera_mm.engine.sheet import draw_annotations

# isort: split
from rich.progress import track


def draw(split: Split, out: Path, count: int) -> None:
    """Draw so many of the images that have annotations, from the first to the last."""
    images = split.content['images']
    with_boxes = sorted(set(split.boxes.image))
    count = min(count, len(with_boxes))
    chosen = [with_boxes[index * len(with_boxes) // count] for index in range(count)]
    entries: List[list] = [[entry for entry, image in zip(split.boxes.entries, split.boxes.image) if image == index]
                           for index in chosen]
    labels = {category['id']: split.classes.index(category['name']) for category in split.content['categories']
              if category['name'] in split.classes}
    draw_annotations([images[index] for index in chosen], [image_path(split, images[index]) for index in chosen], entries,
                     labels, split.classes, out)


def main() -> None:
    parser = argparse.ArgumentParser(description='Show what a detector is to learn from, and what is odd about it')
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('--out', type=Path, default=Path('data_check'), help='folder of the pictures; default: data_check')
    parser.add_argument('--images', type=int, default=9, help='how many are drawn of each data set; default: 9')
    add_cfg_options(parser)
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f'--images must be at least 1, not {args.images}')
    cfg = load_config(args.config, args.cfg_options)
    check_data(cfg, ['train', 'val'])
    names = ['train', 'val', 'test']
    try:
        check_data(cfg, ['test'])
    except SetupError as error:  # a training does without
        print(f'test is left out: {str(error).splitlines()[0]}')
        names.remove('test')
    splits = read_splits(cfg, names)
    digests = [[content_digest(image_path(split, image)) for image in track(split.content['images'], split.name)]
               for split in splits]
    for split in splits:
        print('\n'.join([f'\n{split.name}: {split.ann_file}', *table(split)]))
        odd = findings(split)
        print('\n'.join(f'  odd: {sentence}' for sentence in odd) or '  nothing odd')
        draw(split, args.out / f'{split.name}.jpg', args.images)
    for sentence in duplicates(splits, digests):
        print(f'odd: {sentence}')
    print(f'\nImages with their boxes: {", ".join(str(args.out / f"{split.name}.jpg") for split in splits)}')


if __name__ == '__main__':
    exit_clearly(main)
