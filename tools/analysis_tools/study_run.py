"""One training of tools/analysis_tools/study.py: its config, and the process that trains one after another."""
import contextlib
import copy
import functools
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

# Before anything of MMDetection, which may need the operators that liera_mm stands in for
from liera_mm.core.adapted import adapted_layers
from liera_mm.core.checkpoint import write_atomically
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data, check_weights, load_config
from liera_mm.engine.config_tree import replace_prefix
from liera_mm.engine.options import merge_options
from liera_mm.engine.safe_loading import latest_checkpoint

# isort: split
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

# The worlds: their config, with the word liera or full in its place
WORLDS = dict(
    cells='configs/transfer/faster-rcnn_mobilenetv2_{}_cells.py',
    trees='configs/transfer/faster-rcnn_mobilenetv2_{}_trees.py',
    digits='configs/digits/mask-rcnn_convnextv2-mini_{}_digits.py')

# The methods: arguments of adapt(), which rank and alpha join; those of a world's liera config don't count
METHODS: Dict[str, Optional[Dict[str, Any]]] = {
    'full': None,
    'frozen': None,
    'norms': dict(targets=[], train_norm=True),
    'biases': dict(targets=[], train_bias='all'),
    'lora': dict(update='additive'),
    'liera-plain': dict(update='taylor', scale='plain'),
    'liera': dict(update='taylor', scale='relative'),
    'exp': dict(update='exp', scale='relative'),
    'dora': dict(method='dora', update='additive'),
    'dora-liera': dict(method='dora', update='taylor', scale='relative'),
    'dora-exp': dict(method='dora', update='exp', scale='relative'),
    'pissa': dict(method='pissa', update='additive'),
    'pissa-liera': dict(method='pissa', update='taylor', scale='relative'),
    'milora': dict(method='milora', update='additive'),
    'milora-liera': dict(method='milora', update='taylor', scale='relative'),
    'tucker': dict(method='tucker', update='additive'),
    'tucker-liera': dict(method='tucker', update='taylor', scale='relative'),
    'atom': dict(method='atom', update='additive'),
    'atom-liera': dict(method='atom', update='taylor', scale='relative'),
    'compact': dict(update='taylor', scale='relative', overrides=[dict(targets=['depthwise'], method='dense')]),
    'compact+norms': dict(
        update='taylor', scale='relative', overrides=[dict(targets=['depthwise'], method='dense')], train_norm=True),
    'compact-exp': dict(update='exp', scale='relative', overrides=[dict(targets=['depthwise'], method='dense')]),
    'dense': dict(method='dense', update='taylor', scale='relative'),
    'lora-compact': dict(update='additive', overrides=[dict(targets=['depthwise'], method='dense')]),
    'liera+norms': dict(update='taylor', scale='relative', train_norm=True),
}
ADAPTERS = [name for name, liera in METHODS.items() if liera and liera.get('targets') != []]
LIERA = 'model.backbone.liera'
# Two checkpoints to resume from, since MMEngine deletes the old one before it writes the new; validation comes at the end
RUN_OPTIONS = {
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.checkpoint.max_keep_ckpts': 2,
    'train_cfg.val_begin': 1_000_000,
    'visualizer.vis_backends': [],
}


class Run(NamedTuple):
    """One method in one setting with one seed. Rank and alpha are None where a method has none."""
    world: str
    method: str
    lr: float
    rank: Optional[int]
    alpha: Optional[float]
    options: Tuple[Tuple[str, Any], ...]  # further keys of the config, see options_of()
    seed: int

    @property
    def name(self) -> str:
        """Name of its files, the same for the same run."""
        setting = f'_r{self.rank}_a{self.alpha:g}' if self.rank else ''
        others = f'_{hashlib.sha1(repr(self.options).encode()).hexdigest()[:8]}' if self.options else ''
        return f'{self.method}_lr{self.lr:g}{setting}{others}_s{self.seed}'

    def __str__(self) -> str:
        setting = f' rank {self.rank} alpha {self.alpha:g}' if self.rank else ''
        return ' '.join([f'{self.world}: {self.method} lr {self.lr:g}{setting}',
                         *(f'{key}={value}' for key, value in self.options), f'seed {self.seed}'])


class HashableDict(dict):
    """A dict that is not to be changed."""

    def __hash__(self) -> int:
        return hash(tuple(self.items()))


def options_of(options: Dict[str, Any]) -> Tuple[Tuple[str, Any], ...]:
    """Keys of a config and their values in order, with tuples for lists: the same from a command line and from a file."""

    def hashable(value: Any) -> Any:
        if isinstance(value, dict):
            return HashableDict(options_of(value))
        return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value

    return tuple((key, hashable(value)) for key, value in sorted(options.items()))


@functools.cache
def read_config(world: str, kind: str = 'liera') -> Config:
    """The config of a world, of LieRA or of ``full`` fine-tuning; not to be changed, since it is read once."""
    return load_config(WORLDS[world].format(kind))


def config_of(run: Run, data: str = 'data') -> Config:
    """The config of a run, whose data lie in that folder."""
    cfg = copy.deepcopy(read_config(run.world, 'full' if run.method == 'full' else 'liera'))
    if run.method != 'full':
        liera = METHODS[run.method]
        cfg.model.backbone.liera = liera and dict(liera, **(dict(rank=run.rank, alpha=run.alpha) if run.rank else {}))
    cfg.merge_from_dict({**RUN_OPTIONS, 'optim_wrapper.optimizer.lr': run.lr, 'randomness.seed': run.seed})
    merge_options(cfg, dict(run.options))
    return Config(replace_prefix(cfg.to_dict(), 'data/', os.path.join(data, '')), filename=cfg.filename)


def fingerprint(run: Run) -> Dict[str, str]:
    """A hash of each part of its config that has a say in its validation, to tell it from one that has changed."""
    return {key: hashlib.sha1(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:8]
            for key, value in config_of(run).to_dict().items() if not key.startswith('test_')}


def differences(run: Run, theirs: Dict[str, str]) -> List[str]:
    """The parts of its config that have another fingerprint."""
    ours = fingerprint(run)
    return [key for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not key.startswith('test_')]


def result_file(out: Path, run: Run) -> Path:
    """Its existence means that the run is finished."""
    return out / 'results' / run.world / f'{run.name}.json'


def work_dir(out: Path, run: Run) -> Path:
    return out / 'runs' / run.world / run.name


def kept_checkpoint(out: Path, run: Run) -> Optional[str]:
    """The last intact checkpoint of a run, None if there is none."""
    folder = work_dir(out, run)
    return latest_checkpoint(str(folder)) if folder.is_dir() else None


class Recorder(Hook):
    """Notes the mean loss of every ten steps and the time of each; in checkpoints too, for trainings that are resumed.

    Raises:
        SetupError: If the checkpoint to resume from is of another config.
    """
    priority = 'LOWEST'

    def __init__(self, run: Run):
        self.run = run
        self.curve, self.times, self.losses, self.before = [], [], [], 0.
        self.start, self.last = time.perf_counter(), None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now
        self.losses.append(outputs['loss'].item())
        if (runner.iter + 1) % 10 == 0:
            self.curve.append([runner.iter + 1, round(statistics.mean(self.losses), 4)])
            self.losses = []

    def before_save_checkpoint(self, runner, checkpoint) -> None:
        checkpoint['study'] = dict(curve=self.curve, losses=self.losses, seconds=self.seconds,
                                   fingerprint=fingerprint(self.run))

    def after_load_checkpoint(self, runner, checkpoint) -> None:
        if runner._resume:
            saved = checkpoint['study']
            different = differences(self.run, saved['fingerprint'])
            if different:
                raise SetupError(f'{runner.work_dir} has an interrupted run of another config, with other '
                                 f'{", ".join(different)}', 'Delete that folder to begin anew')
            self.curve, self.losses, self.before = saved['curve'], saved['losses'], saved['seconds']


def train(run: Run, out: Path, data: str, keep: bool, jobs: int) -> None:
    """Train and validate, from the last checkpoint if there is one; leaves the result file.

    Raises:
        Exception: Whatever goes wrong.
    """
    folder = work_dir(out, run)
    cfg = config_of(run, data)
    cfg.work_dir, cfg.experiment_name = str(folder), f'{run.world}_{run.name}'
    cfg.visualizer.name = cfg.experiment_name  # MMEngine would share what goes by one name
    checkpoint = kept_checkpoint(out, run)
    cfg.resume, cfg.load_from = checkpoint is not None, checkpoint
    check_data(cfg, ['train', 'val'])
    check_weights(cfg)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    recorder, runner = Recorder(run), Runner.from_cfg(cfg)
    runner.register_hook(recorder)
    counts = count_parameters(runner.model.backbone)
    runner.train()
    metrics = scores(runner.val(), cfg.val_evaluator)
    # A world may have another set of images, on which nothing is chosen
    tests = cfg.test_dataloader != cfg.val_dataloader
    test_metrics = scores(runner.test(), cfg.test_evaluator) if tests else None
    for loader in (runner.train_dataloader, runner.val_dataloader, runner.test_dataloader if test_metrics else None):
        if loader is not None:
            loader._iterator = None  # ends the processes that load data
    result = dict(
        run._asdict(), options=dict(run.options), fingerprint=fingerprint(run), metrics=metrics, test_metrics=test_metrics,
        **counts, curve=recorder.curve, seconds=round(recorder.seconds, 1), jobs=jobs,
        step_ms=round(1000 * statistics.median(recorder.times), 2) if recorder.times else None,
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3) if torch.cuda.is_available() else None,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU', torch=torch.__version__,
        commit=commit())
    file = result_file(out, run)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result).encode())
    if not keep:
        shutil.rmtree(folder)


def scores(metrics: Dict[str, float], evaluator: Dict[str, Any]) -> Dict[str, float]:
    """The metrics of an evaluator, which MMDetection leaves out if there is no detection at all: it then scores zero."""
    kinds = evaluator['metric']
    return metrics or {f'coco/{kind}_mAP': 0. for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def count_parameters(backbone: torch.nn.Module) -> Dict[str, int]:
    """Trained ones, and all that it had before adapters were added."""
    adapters = sum(p.numel() for _, layer in adapted_layers(backbone) for p in layer.adapter.parameters())
    return dict(trained=sum(p.numel() for p in backbone.parameters() if p.requires_grad),
                backbone=sum(p.numel() for p in backbone.parameters()) - adapters)


def commit() -> Optional[str]:
    """The commit of this checkout, None outside of one."""
    git = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=Path(__file__).parent, capture_output=True,
                         text=True)
    return git.stdout.strip() or None


def work(connection: Connection, out: Path, data: str, keep: bool, jobs: int) -> None:
    """Train what comes through a connection; None goes back for a run that is finished, the error for one that failed.

    What a training prints goes to ``output.txt`` in its work dir.
    """
    os.setsid()  # so that it can be ended together with the processes that load its data
    torch.set_num_threads(1)
    while True:
        run = connection.recv()
        folder = work_dir(out, run)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'output.txt', 'a') as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        error = None
        try:
            train(run, out, data, keep, jobs)
        except Exception:
            error = traceback.format_exc()
        forget()
        connection.send(error)


def forget() -> None:
    """Let go of what a training leaves behind in MMEngine's managers and on the GPU."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            with contextlib.suppress(OSError):
                handler.close()
    MMLogger._instance_dict.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
