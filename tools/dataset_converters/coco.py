"""The layout of COCO 2017, which the data sets made here have.

Images lie in folders ``SPLIT2017``, what is known of them in ``annotations/instances_SPLIT2017.json``.
"""
import json
from pathlib import Path

import numpy as np

SMALL, LARGE = 32**2, 96**2  # px, the area ranges of COCO


def json_path(out, split):
    """Name the annotation file of a split."""
    return Path(out, 'annotations', f'instances_{split}2017.json')


def read_split(out, split):
    """Read the COCO dictionary of a split; empty where there is none."""
    try:
        return json.loads(json_path(out, split).read_text())
    except (OSError, ValueError):
        return {}


def is_complete(out, split, info):
    """Tell whether a split was made as `info` says and has all its images."""
    coco = read_split(out, split)
    return coco.get('info') == info and all(
        Path(out, f'{split}2017', image['file_name']).is_file() for image in coco['images'])


def summary(coco, split):
    """Count a split in one line."""
    areas = np.array([item['area'] for item in coco['annotations'] if not item['iscrowd']])
    small, large = (areas < SMALL).sum(), (areas >= LARGE).sum()
    return (f'{split}: {len(coco["images"])} images, {len(areas)} instances ({small} small, '
            f'{len(areas) - small - large} medium, {large} large), {len(coco["annotations"]) - len(areas)} crowds')


def progress(results, split, total):
    """Show count and remaining time on stderr."""
    try:
        from tqdm import tqdm
    except ImportError:  # only mmdet needs it: a bare host goes without
        return results
    return tqdm(results, desc=split, total=total, unit='image', mininterval=1)
