#!/usr/bin/env python
"""Detect objects in pictures: tools/predict.py CONFIG CHECKPOINT IMAGES... [--adapter FILE] [--out DIR].

IMAGES are files, folders and globs. Writes into DIR the pictures with their detections, vis/, and all detections as COCO's
results, predictions.json, with images.json for their images and categories.
"""
import argparse
import json
from pathlib import Path
from typing import Dict, List

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_checkpoint, exit_clearly, load_config
from liera_mm.engine.options import add_cfg_options
from liera_mm.engine.predict import Predictor, coco_results, find_images, picture_names

# isort: split
import cv2
import mmcv
from mmengine.logging import MMLogger
from rich.progress import track


def named(adapters: List[str]) -> Dict[str, str]:
    """Adapter files by name: ``NAME=FILE``, or by their own names."""
    pairs = [('', given) if Path(given).is_file() or '=' not in given else given.split('=', 1) for given in adapters]
    files: Dict[str, str] = {}
    for name, path in pairs:
        name = name or Path(path).stem
        if name in files:
            raise SetupError(f'Two adapters are called {name}: {files[name]} and {path}',
                             'Give them names: --adapter NAME=FILE')
        files[name] = path
    return files


def predict(predictor: Predictor, images: List[str], out: Path, score_thr: float, title: str) -> None:
    """Write pictures and results of images; those that cannot be read are left out, and named at the end."""
    classes = predictor.model.dataset_meta['classes']
    categories = list(range(1, len(classes) + 1))
    entries, results, problems = [], [], []
    for image_id, (path, name) in enumerate(track([*zip(images, picture_names(images))], title), 1):
        try:
            found = predictor([dict(img_path=path)], return_vis=True, pred_score_thr=score_thr)
        except SetupError as error:
            problems.append(str(error).splitlines()[0])
            continue
        except cv2.error as error:
            problems.append(f'{path} cannot be resized as the config says: {error.err or error}')
            continue
        prediction, picture = found['predictions'][0], found['visualization'][0]
        mmcv.imwrite(picture[..., ::-1], str(out / 'vis' / name))
        entries.append(dict(id=image_id, file_name=path, width=picture.shape[1], height=picture.shape[0]))
        results += coco_results(image_id, prediction, categories)
    out.mkdir(parents=True, exist_ok=True)
    named_categories = [dict(id=number, name=name) for number, name in zip(categories, classes)]
    (out / 'images.json').write_text(json.dumps(dict(images=entries, categories=named_categories, annotations=[])))
    (out / 'predictions.json').write_text(json.dumps(results))
    drawn = sum(result['score'] > score_thr for result in results)
    print(f'{len(entries)} pictures in {out / "vis"}, with {drawn} detections above {score_thr:g}; '
          f'all {len(results)} are in {out / "predictions.json"}')
    if problems:
        raise SetupError(f'{len(problems)} of {len(images)} images were left out: {problems[0]}',
                         f'Put intact ones there; the detections in the others are in {out}')


def main() -> None:
    parser = argparse.ArgumentParser(description='Detect objects in pictures')
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', help='checkpoint of tools/train.py or tools/merge.py; with --adapter, the detector '
                        'that the adapters belong to')
    parser.add_argument('images', nargs='+', help='image files, folders of them, or quoted globs')
    parser.add_argument('--adapter', action='append', default=[], metavar='[NAME=]FILE',
                        help='adapter file for the backbone; of several, each writes into a folder of its name')
    parser.add_argument('--out', type=Path, default=Path('predictions'), help='folder to write; default: predictions')
    parser.add_argument('--score-thr', type=float, default=.3, help='draw detections of higher scores; default: 0.3')
    parser.add_argument('--device', help='as cpu or cuda:0; default: the best that there is')
    add_cfg_options(parser)
    args = parser.parse_args()
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be between 0 and 1, not {args.score_thr:g}')
    images, adapters = find_images(args.images), named(args.adapter)
    outs = [args.out / name for name in adapters] if len(adapters) > 1 else [args.out]
    pictures = {(out / 'vis' / name).resolve() for out in outs for name in picture_names(images)}
    overwritten = [path for path in images if Path(path).resolve() in pictures]
    if overwritten:
        raise SetupError(f'{overwritten[0]} would be overwritten by its own picture', 'Give another folder as --out')
    if args.out.exists() and not args.out.is_dir():
        raise SetupError(f'{args.out} is not a folder', 'Give another one as --out')
    check_checkpoint(args.checkpoint)
    MMLogger.get_current_instance().setLevel('WARNING')  # MMEngine logs what it loads
    predictor = Predictor(load_config(args.config, args.cfg_options), args.checkpoint, adapters, args.device)
    for name, out in zip(adapters or [''], outs):
        if len(adapters) > 1:
            predictor.use(name)
        predict(predictor, images, out, args.score_thr, name or 'Detecting')


if __name__ == '__main__':
    exit_clearly(main)
