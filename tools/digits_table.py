#!/usr/bin/env python
"""The table of methods on the digits: tools/digits_table.py [--seeds N] [--jobs N] [--out FOLDER].

Trains and tests every variant with every seed, at the schedule of the configs, and writes FOLDER/table.md. Called again, it
leaves out what is finished and resumes what was interrupted, from the last whole epoch. Needs data/digits
(tools/make_digits_coco.py).
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine.cli import check_data, exit_clearly, load_config
from liera_mm.errors import SetupError

# isort: split
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

CONFIG = 'configs/digits/mask-rcnn_convnextv2-mini_{}_digits.py'
VARIANTS = ('lora', 'liera', 'liera-exp', 'pissa', 'pissa-liera', 'dora', 'dora-liera', 'liera-compact')
# Checkpoints to resume from, two since MMEngine deletes the old one before it writes the new; tools/test.py validates
RUN_OPTIONS = {
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.max_keep_ckpts': 2,
    'train_cfg.val_begin': 1_000_000
}


def train_command(config: str, work_dir: Path, *options: str) -> List[str]:
    return [sys.executable, '-u', 'tools/train.py', config, '--work-dir', str(work_dir), *options]


def test_command(config: str, work_dir: Path, *options: str) -> List[str]:
    """Tests the last checkpoint of a training; logs go to the folder ``test`` in its work dir."""
    return [sys.executable, '-u', 'tools/test.py', config, str(last_checkpoint(work_dir)), '--work-dir',
            str(work_dir / 'test'), *options]


def last_checkpoint(work_dir: Path) -> Optional[Path]:
    """The latest checkpoint that was written to its end, None before there is one."""
    file = work_dir / 'last_checkpoint'
    return work_dir / Path(file.read_text()).name if file.is_file() else None


def test_metrics(work_dir: Path) -> Optional[Dict[str, float]]:
    """The metrics of the latest test of a training, None before there is one."""
    files = sorted((work_dir / 'test').glob('*/*.json'))
    return json.loads(files[-1].read_text()) if files else None


class Run(NamedTuple):
    """One variant with one seed. How far it has come is seen from its work dir alone."""
    variant: str
    work_dir: Path
    cfg: Config
    options: List[str]

    def next_command(self) -> Optional[List[str]]:
        """What is to be done next, None if nothing."""
        config, checkpoint = CONFIG.format(self.variant), last_checkpoint(self.work_dir)
        if checkpoint is None or checkpoint.name != f'epoch_{self.cfg.train_cfg.max_epochs}.pth':
            return train_command(config, self.work_dir, '--resume', '--cfg-options', *self.options)
        if test_metrics(self.work_dir) is None:
            return test_command(config, self.work_dir, '--cfg-options', *self.options)
        return None


def make_run(out: Path, variant: str, seed: int, overrides: Dict[str, Any]) -> Run:
    """A run of the table.

    Raises:
        SetupError: If data are missing, or its work dir has a run of another config.
    """
    options = {**RUN_OPTIONS, **overrides, 'randomness.seed': seed}
    cfg = load_config(CONFIG.format(variant), options)
    check_data(cfg, ['train', 'test'])
    work_dir = out / variant / f'seed_{seed}'
    work_dir.mkdir(parents=True, exist_ok=True)
    written, ours = work_dir / 'config.json', json.loads(json.dumps(cfg.to_dict()))
    if written.is_file():
        theirs = json.loads(written.read_text())
        different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
        if different:
            raise SetupError(f'{work_dir} has a run of another config, with other {", ".join(different)}',
                             'Choose another folder with --out, or delete that one')
    else:
        partial = written.with_suffix('.partial')
        partial.write_text(json.dumps(ours))
        partial.replace(written)  # MMEngine's own record of the config is written anew, and torn, by an interrupted start
    return Run(variant, work_dir, cfg, [f'{key}={value}' for key, value in options.items()])


def finish(runs: Sequence[Run], jobs: int) -> List[Run]:
    """Do what is left of the runs, ``jobs`` at a time on one thread each; returns those that failed."""
    waiting, failed, processes = [run for run in runs if run.next_command()], [], {}
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                run = waiting.pop(0)
                processes[start(run)] = run
            time.sleep(.5)
            for process in [process for process in processes if process.poll() is not None]:
                run = processes.pop(process)
                if process.returncode:
                    failed.append(run)
                elif run.next_command():
                    waiting.insert(0, run)
                else:
                    print(f'{run.work_dir}: bbox mAP {test_metrics(run.work_dir)["coco/bbox_mAP"]:.3f}', flush=True)
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGTERM)  # with its data workers, which would wait for it forever
        for process in processes:
            process.wait()
    return failed


def start(run: Run) -> subprocess.Popen:
    with open(run.work_dir / 'output.txt', 'a') as output:
        return subprocess.Popen(run.next_command(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                env=dict(os.environ, OMP_NUM_THREADS='1'))


def table(runs: Sequence[Run]) -> str:
    """The finished runs in Markdown, a row a variant."""
    lines = ['| variant | trainable in the backbone | bbox mAP | segm mAP | seeds |', '| --- | --- | --- | --- | --- |']
    for variant in dict.fromkeys(run.variant for run in runs):
        ours = [run for run in runs if run.variant == variant]
        metrics = [found for run in ours if (found := test_metrics(run.work_dir))]
        columns = [spread([row[f'coco/{kind}_mAP'] for row in metrics]) for kind in ('bbox', 'segm')]
        lines.append(f'| {variant} | {trainable(ours[0].cfg):,} | {" | ".join(columns)} | {len(metrics)} |')
    return '\n'.join([*lines, '', 'Mean of the seeds (lowest to highest).'])


def spread(values: Sequence[float]) -> str:
    return f'{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})' if values else '-'


def trainable(cfg: Config) -> int:
    """Trainable parameters of a config's backbone."""
    return sum(p.numel() for p in MODELS.build(cfg.model.backbone).parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description='Train and test the methods on the digits, and print a table')
    parser.add_argument('--variants', nargs='+', default=VARIANTS, help='of configs/digits; default: ' + ' '.join(VARIANTS))
    parser.add_argument('--seeds', type=int, default=3, help='seeds of each variant: 0, 1, ...')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time, on one thread each')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/digits_table'), help='folder of the runs and table.md')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='for all runs: key=value ...')
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        parser.error('--seeds and --jobs must be at least 1')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('interrupted: call it again to go on'))  # ends the runs, too
    init_default_scope('mmdet')
    runs = [make_run(args.out, variant, seed, args.cfg_options) for seed in range(args.seeds) for variant in args.variants]
    failed = finish(runs, args.jobs)
    text = table(runs)
    (args.out / 'table.md').write_text(text + '\n')
    print(text)
    if failed:
        raise SetupError(f'{len(failed)} of {len(runs)} runs failed, such as {failed[0].work_dir}',
                         f'See the end of {failed[0].work_dir / "output.txt"}, then call this again')


if __name__ == '__main__':
    exit_clearly(main)
