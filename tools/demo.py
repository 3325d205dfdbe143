#!/usr/bin/env python
"""Train the digits detector with LieRA and with a frozen backbone, test both, and show what came out.

Needs data/digits (tools/dataset_converters/make_digits_coco.py). Writes demo/sheet.png, ground truth beside predictions,
and prints a table.
"""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Dict, Optional

import liera_mm  # before MMDetection, which may need the operators that liera_mm stands in for

# isort: split
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from liera_mm.engine.sheet import draw_sheet

CONFIGS = dict(LieRA='configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py',
               frozen='configs/digits/mask-rcnn_convnextv2-mini_frozen_digits.py')
OUT = Path('demo')


def train_and_test(config: str, work_dir: Path, output: Optional[IO] = None) -> Dict[str, Any]:
    """Run the two tools on one config; returns a row of the table, with the test's own metrics."""

    def run(*command: Any) -> None:
        subprocess.run([sys.executable, '-u', *command], check=True, env=environment, stdout=output, stderr=output)

    # On half of the cores each, side by side, they are done in three quarters of the time that they take in turn
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // len(CONFIGS))))
    run('tools/train.py', config, '--work-dir', work_dir)
    checkpoint = work_dir / Path((work_dir / 'last_checkpoint').read_text()).name
    run('tools/test.py', config, checkpoint, '--work-dir', work_dir / 'test', '--out', work_dir / 'predictions.pkl')
    metrics = json.loads(max((work_dir / 'test').glob('*/*.json')).read_text())
    counts = liera_mm.summary(MODELS.build(Config.fromfile(config).model))
    return dict(
        trainable=counts.trainable,
        total=counts.total,
        checkpoint_mib=checkpoint.stat().st_size / 2**20,
        bbox=metrics['coco/bbox_mAP'],
        segm=metrics['coco/segm_mAP'])


def main() -> None:
    init_default_scope('mmdet')
    OUT.mkdir(exist_ok=True)
    with open(OUT / 'frozen.txt', 'w') as output, ThreadPoolExecutor(len(CONFIGS)) as pool:
        print(f'What you see is LieRA; the frozen backbone is trained beside it and prints to {output.name}', flush=True)
        futures = {name: pool.submit(train_and_test, config, OUT / name, output if name == 'frozen' else None)
                   for name, config in CONFIGS.items()}
        rows = {name: future.result() for name, future in futures.items()}
    draw_sheet(OUT / 'LieRA/predictions.pkl', Path('data/digits'), OUT / 'sheet.png')
    print(f'\n{"backbone":10}{"trainable":>12}{"total":>12}{"checkpoint":>14}{"bbox mAP":>10}{"segm mAP":>10}')
    for name, row in rows.items():
        print(f'{name:10}{row["trainable"]:12,}{row["total"]:12,}{row["checkpoint_mib"]:10.1f} MiB'
              f'{row["bbox"]:10.3f}{row["segm"]:10.3f}')
    print(f'\nGround truth and predictions, side by side: {OUT / "sheet.png"}')


if __name__ == '__main__':
    main()
