#!/usr/bin/env python
"""Compare methods on small worlds: study.py run|report|sheet [options].

``run`` trains and validates every combination of --worlds, --methods, --ranks, --lrs, --alphas and --seeds, several at a
time, and leaves a file for each in OUT/results. Called again, it leaves out what is finished and resumes what was
interrupted, from the last whole epoch. ``report`` makes tables and pictures of all results there are, and leaves them in one
file, OUT/results.jsonl, which can be gone on with in place of OUT/results. ``sheet`` makes a picture of predictions.

    study.py run --worlds cells trees --methods full liera --lrs 5e-4 1e-3 --alphas 8 32 128   # tuning
    study.py run --worlds cells trees --methods full liera --best --seeds 0 1 2                # each at its best
    study.py run --methods liera --ranks 2 8 32 --alphas 4r                                    # alpha = 4 * rank
    study.py report

Data and weights are made by tools/dataset_converters/make_*_coco.py and tools/model_converters/make_mobilenetv2_weights.py.
Worlds and methods are listed in tools/analysis_tools/study_run.py. On a GPU four or five trainings at a time are best.
"""
import argparse
import collections
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence

from liera_mm.core.adapt import ALPHA
from liera_mm.core.checkpoint import write_atomically
from liera_mm.core.errors import SetupError

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.engine.cli import check_data, check_weights, exit_clearly
from liera_mm.engine.options import OptionsAction

# isort: split
import torch
from study_run import (
    ADAPTERS,
    LIERA,
    METHODS,
    WORLDS,
    Run,
    config_of,
    differences,
    kept_checkpoint,
    options_of,
    read_config,
    result_file,
    work,
    work_dir,
)

METRIC = 'coco/bbox_mAP'
SETTINGS = {'optim_wrapper.optimizer.lr': '--lrs', f'{LIERA}.rank': '--ranks', f'{LIERA}.alpha': '--alphas',
            'randomness.seed': '--seeds'}
TOGETHER = 'results.jsonl'  # all results there are, one a line
CONTEXT = multiprocessing.get_context('spawn')  # CUDA does not survive a fork


# What to run

def plan(args: argparse.Namespace) -> List[Run]:
    """The runs that were asked for, each once: seeds outermost, methods innermost, so that all have results early.

    Raises:
        SetupError: If the best setting of a method is asked for and none is finished; or if a key of the config is set that
            has an option of its own here.
    """
    for key in args.cfg_options:
        if key in SETTINGS:
            raise SetupError(f'--cfg-options {key} would be in no table', f'Set it by {SETTINGS[key]}')
    runs = []
    for seed in args.seeds:
        if args.best:
            runs += [best(args, world, method)._replace(seed=seed) for world in args.worlds for method in args.methods]
        else:
            runs += settings(args, seed, args.worlds, args.methods)
    return list(dict.fromkeys(runs))


def settings(args: argparse.Namespace, seed: int, worlds: Sequence[str], methods: Sequence[str]) -> Iterator[Run]:
    """The runs of one seed; what was not asked for is as in a world's config."""
    for rank, lr, alpha in itertools.product(args.ranks or [None], args.lrs or [None], args.alphas or [None]):
        for world, method in itertools.product(worlds, methods):
            cfg = read_config(world)
            liera = cfg.model.backbone.liera
            ours = rank or liera.rank if method in ADAPTERS else None
            options = options_of({key: value for key, value in args.cfg_options.items()
                                  if method in ADAPTERS or not key.startswith(LIERA)})
            yield Run(world, method, lr or cfg.optim_wrapper.optimizer.lr, ours,
                      ours and (number(alpha, ours) if alpha else liera.get('alpha', ALPHA)), options, seed)


def number(alpha: str, rank: int) -> float:
    """An alpha as it was given: a number, a multiple of the rank (``4r``) or of its root (``12sqrtr``)."""
    match = re.fullmatch(r'([\d.e+-]+?)(r|sqrtr)?', alpha)
    return float(match[1]) * {None: 1, 'r': rank, 'sqrtr': math.sqrt(rank)}[match[2]]


def best(args: argparse.Namespace, world: str, method: str) -> Run:
    """The best setting of a method with the first seed so far, of those that were asked for or of all."""
    options = next(settings(args, 0, [world], [method])).options
    candidates = [result for result in read_results(args.out)
                  if (result['world'], result['method'], result['seed']) == (world, method, args.seeds[0])
                  and to_run(result).options == options and was_wanted(args, result)]
    if not candidates:
        raise SetupError(f'{args.out} has no finished run of {method} in the world {world} with seed {args.seeds[0]}, the '
                         'first, to take the best setting of',
                         'Try some settings first: the same without --best, with --lrs and --alphas')
    return to_run(max(candidates, key=lambda result: result['metrics'][METRIC]))


def was_wanted(args: argparse.Namespace, result: Dict[str, Any]) -> bool:
    """Whether a result is of the learning rates, ranks and alphas that were asked for, where any were."""
    rank = result['rank']
    alphas = rank and args.alphas and [number(alpha, rank) for alpha in args.alphas]
    return ((not args.lrs or result['lr'] in args.lrs) and (not rank or not args.ranks or rank in args.ranks)
            and (not alphas or result['alpha'] in alphas))


# Results

def read_results(out: Path) -> List[Dict[str, Any]]:
    """All results, in the order of their names: from their own files, or else from the one that ``report`` leaves.

    Raises:
        SetupError: If one of them cannot be read.
    """
    together = out / TOGETHER
    texts = {f'{together}, line {number},': line for number, line in enumerate(
        together.read_text(errors='replace').splitlines() if together.is_file() else (), 1)}
    texts.update({f'{file}': file.read_text(errors='replace') for file in out.glob('results/*/*.json')})
    by_run = {}
    for where, text in texts.items():
        try:
            result = json.loads(text)
            float(result['metrics'][METRIC])
            by_run[to_run(result)] = result
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SetupError(f'{where} is no result of a run', 'Take it out, and call study.py run again') from None
    return [by_run[run] for run in sorted(by_run, key=lambda run: (run.world, run.name))]


def to_run(result: Dict[str, Any]) -> Run:
    fields = {name: result[name] for name in Run._fields}
    return Run(**dict(fields, options=options_of(result['options'])))


def finished(out: Path, runs: Sequence[Run]) -> List[Run]:
    """Those that have a result.

    Raises:
        SetupError: If one has a result of another config.
    """
    results = {to_run(result): result for result in read_results(out)}
    found = [run for run in runs if run in results]
    for run in found:
        different = differences(run, results[run]['fingerprint'])
        if different:
            raise SetupError(f'{result_file(out, run)} is the result of another config, with other {", ".join(different)}',
                             f'Choose another folder with --out, or delete that file, or its line in {TOGETHER}')
    return found


# Running

class Worker(NamedTuple):
    """A process that trains, and the end of the connection to it."""
    process: multiprocessing.Process
    connection: Any

    @classmethod
    def start(cls, index: int, devices: Sequence[str], *args: Any) -> 'Worker':
        """Start one that sees one of the devices; it must not see the others before it imports torch."""
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=work, args=(theirs, *args), name=f'worker {index}')
        before = {name: os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS')}
        os.environ.update(CUDA_VISIBLE_DEVICES=devices[index % len(devices)] if devices else '', OMP_NUM_THREADS='1')
        try:
            process.start()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        theirs.close()
        return cls(process, ours)

    def end(self) -> None:
        """End it at once, and the processes that load its data."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            self.process.kill()
        self.process.join()


class Pool:
    """Trains runs, ``jobs`` at a time. Runs are given up that would not end before the deadline (of ``time.monotonic``)."""

    def __init__(self, args: argparse.Namespace, deadline: float):
        self.args, self.deadline, self.devices = args, deadline, visible_devices(args.gpus)
        self.seconds = collections.defaultdict(list)  # of the runs of this call, in each world
        self.earlier = collections.defaultdict(list)
        for result in read_results(args.out):
            self.earlier[result['world']].append(result['seconds'])
        self.failed: Dict[Run, str] = {}

    def run_all(self, runs: Sequence[Run]) -> List[Run]:
        """Returns what was left since the time was up."""
        waiting, left, busy, idle, total = collections.deque(runs), [], {}, [], len(runs)
        try:
            while True:
                while waiting and len(busy) < self.args.jobs:
                    run = waiting.popleft()
                    if time.monotonic() + self.typical(run.world) > self.deadline:
                        left.append(run)
                        continue
                    worker = idle.pop() if idle else self.start_worker(len(busy))
                    worker.connection.send(run)
                    busy[worker] = (run, time.monotonic())
                if not busy:
                    return left
                timeout = max(self.deadline - time.monotonic(), 0)
                ready = wait([worker.connection for worker in busy], None if timeout == math.inf else timeout)
                if not ready:
                    print('the time is up', flush=True)
                    return left + [run for run, _ in busy.values()]
                for worker in [worker for worker in busy if worker.connection in ready]:
                    run, start = busy.pop(worker)
                    if self.finish(worker, run, start):
                        idle.append(worker)
                    done = total - len(waiting) - len(left) - len(busy)
                    print(f'[{done}/{total}] {run}: {self.outcome(run)}{self.remaining(waiting, busy)}', flush=True)
        finally:
            for worker in [*busy, *idle]:
                worker.end()

    def start_worker(self, index: int) -> Worker:
        args = self.args
        return Worker.start(index, self.devices, args.out, args.data, args.keep, args.jobs)

    def finish(self, worker: Worker, run: Run, start: float) -> bool:
        """Take note of what came of a run; returns whether its worker can take another."""
        try:
            error, alive = worker.connection.recv(), True
        except EOFError:
            worker.end()
            error, alive = f'its process died with exit status {worker.process.exitcode}', False
        if error:
            self.failed[run] = error
            with open(work_dir(self.args.out, run) / 'output.txt', 'a') as output:
                output.write(error)
        else:
            self.seconds[run.world].append(time.monotonic() - start)
        return alive

    def typical(self, world: str) -> float:
        """Seconds that a run takes in a world, as far as known; 0 if nothing is."""
        known = self.seconds[world] or self.earlier[world]
        return statistics.median(known) if known else 0.

    def outcome(self, run: Run) -> str:
        if run in self.failed:
            error = self.failed[run]  # the text of a traceback, whose error may go on after its line
            return f'failed: {(re.findall(r"^[A-Za-z_.]+: .*", error, re.MULTILINE) or [error])[-1]:.200}'
        result = json.loads(result_file(self.args.out, run).read_text())
        return f'bbox mAP {result["metrics"][METRIC]:.3f} ({result["seconds"]:.0f} s)'

    def remaining(self, waiting: Deque[Run], busy: Dict[Worker, Any]) -> str:
        seconds = sum(self.typical(run.world) for run in [*waiting, *(run for run, _ in busy.values())]) / self.args.jobs
        return f'; about {math.ceil(seconds / 60)} min left' if waiting or busy else ''


def visible_devices(gpus: Optional[int]) -> List[str]:
    """Names of the first GPUs that this process sees, for CUDA_VISIBLE_DEVICES."""
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    there = named.split(',') if named else [str(i) for i in range(torch.cuda.device_count())]
    return [name for name in there if name][:gpus]


def run_command(args: argparse.Namespace) -> None:
    start = time.monotonic()
    runs = plan(args)
    for world in args.worlds:
        if not Path(args.data, world).is_dir():
            raise SetupError(f'There is no folder {Path(args.data, world)} with the data of this world',
                             f'Make it by tools/dataset_converters/make_{world}_coco.py, or say where it is with --data')
        cfg = config_of(next(run for run in runs if run.world == world), args.data)
        check_data(cfg, ['train', 'val'])
        check_weights(cfg)
    done = finished(args.out, runs)
    unfinished = [run for run in runs if run not in done]
    print(f'{len(runs)} runs, {len(runs) - len(unfinished)} of them finished', flush=True)
    pool = Pool(args, start + 60 * args.minutes)
    left = pool.run_all(unfinished)
    if left:
        print(f'{len(left)} of {len(runs)} runs are left: call this again')
    if pool.failed:
        first = next(iter(pool.failed))
        raise SetupError(f'{len(pool.failed)} of {len(runs)} runs failed, such as {first}',
                         f'See the end of {work_dir(args.out, first) / "output.txt"}, then call this again')


def report_command(args: argparse.Namespace) -> None:
    from study_report import write_report  # needs matplotlib
    everything = read_results(args.out)
    results = [result for result in everything if result['world'] in args.worlds and result['method'] in args.methods]
    if not results:
        raise SetupError(f'{args.out} has no results of these worlds and methods',
                         'Call study.py run first, or name its folder with --out')
    write_atomically(args.out / TOGETHER, ''.join(json.dumps(result) + '\n' for result in everything).encode())
    print(write_report(results, args.out))


def sheet_command(args: argparse.Namespace) -> None:
    from study_report import write_sheet
    kept = [run for run in finished(args.out, plan(args)) if kept_checkpoint(args.out, run)]
    if not kept:
        raise SetupError(f'{args.out / "runs"} has no checkpoint of these runs',
                         'Train them with --keep; of runs that are finished, delete the results first')
    for run in kept:
        print(write_sheet(run, args.out, args.data, args.images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, function, description in (('run', run_command, 'train and validate'),
                                        ('report', report_command, 'tables and pictures of the results'),
                                        ('sheet', sheet_command, 'a picture of predictions of each run that was kept')):
        command = commands.add_parser(name, help=description)
        command.set_defaults(function=function)
        command.add_argument('--out', type=Path, default=Path('work_dirs/study'), help='folder; default: %(default)s')
        command.add_argument('--worlds', nargs='+', choices=WORLDS, default=list(WORLDS), help='default: all')
        command.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), help='default: all')
        if name == 'report':
            continue
        command.add_argument('--lrs', nargs='+', type=positive(float), help="learning rates; default: the config's")
        command.add_argument('--ranks', nargs='+', type=positive(int), help="default: the config's")
        command.add_argument('--alphas', nargs='+', type=alpha_text,
                             help="numbers, or multiples of the rank (4r) or its root (12sqrtr); default: the config's")
        command.add_argument('--seeds', nargs='+', type=seed, default=[0], help='default: 0')
        command.add_argument('--best', action='store_true',
                             help='each method in its best setting with the first of the seeds, of those finished')
        command.add_argument('--cfg-options', nargs='+', action=OptionsAction, default={}, help='for all: key=value ...')
        command.add_argument('--data', default='data', help='folder of the data sets and weights; default: %(default)s')
        if name == 'sheet':
            command.add_argument('--images', type=positive(int), default=6, help='how many; default: %(default)s')
            continue
        command.add_argument('--jobs', type=positive(int), default=1, help='runs at a time, on one thread each')
        command.add_argument('--gpus', type=positive(int), help='how many to use; default: all that are visible')
        command.add_argument('--minutes', type=positive(float), default=math.inf,
                             help='end within this time; no run starts that would take longer')
        command.add_argument('--keep', action='store_true', help='keep checkpoints and logs of finished runs')
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('interrupted: call it again to go on'))  # ends the workers, too
    args.function(args)


def positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f'{text} is no finite number above 0')
        return value

    parse.__name__ = kind.__name__
    return parse


def seed(text: str) -> int:
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f'{text} is no seed, from 0 to 2**32 - 1')
    return int(text)


def alpha_text(text: str) -> str:
    try:
        valid = 0 < number(text, 4) < math.inf
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f'{text} is no number above 0, and no multiple of the rank such as 4r or 12sqrtr')
    return text


if __name__ == '__main__':
    exit_clearly(main)
