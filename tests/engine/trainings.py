"""What test_distributed.py runs in one process or several: trainings of a classifier and of a detector.

What a function returns is pickled there, for multiprocessing would keep a file open for every tensor.
"""
import contextlib
import copy
import functools
import itertools
import os
import pickle
import socket
import time
from pathlib import Path

import torch
import torch.distributed.fsdp
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from pictures import IMAGES
from yapf.yapflib import yapf_api

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import build_runner, load_config
from liera_mm.engine.sharding import local

ROOT = Path(__file__).parents[2]
DIGITS_CONFIG = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
WRAPPER = Config.fromfile(ROOT / 'configs/_base_/mask-rcnn_convnextv2-b_coco.py').model_wrapper_cfg.to_dict()
# With this alpha, relative steps are as large as plain ones of the default: larger ones would magnify rounding errors
SETTINGS = {
    'full': None,
    'lora': dict(rank=2, alpha=.1),
    'norms': dict(rank=2, alpha=.1, train_norm=True, train_bias=True),
    'pissa': dict(rank=2, alpha=.1, method='pissa'),
    'dora': dict(rank=2, alpha=.1, method='dora'),
    'tucker': dict(rank=2, alpha=3, method='tucker'),  # or its factors of size one would not move in four steps
    'atom': dict(rank=2, alpha=.1, method='atom'),
    'wrapped': dict(rank=2, alpha=.1),
}
SHARDS = dict(runner_type='FlexibleRunner', strategy=dict(type='FullyShardStrategy'))


class Watch(Hook):
    """Notes the tensors before training, the gradients of each step, and what is exchanged in the third step.

    And how many numbers a process holds: of parameters, and in the optimizer's state.
    """

    def __init__(self):
        self.start, self.gradients, self.traffic, self.held = {}, [], None, None

    def before_train(self, runner):
        self.start = state(runner)
        named = [(name, p) for name, p in inner(runner.model).named_parameters() if p.requires_grad]
        runner.optim_wrapper.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append({name: whole(p.grad) for name, p in named}))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            self.profiler.start()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            time.sleep(.1)  # the thread that exchanges gradients ends its event after the gradients are there
            self.profiler.stop()
            events = self.profiler.profiler.kineto_results.events()
            self.traffic = [(event.name(), event.shapes()) for event in events if 'gloo:' in event.name()]
            momenta = [state['momentum_buffer'] for state in runner.optim_wrapper.optimizer.state.values()]
            self.held = [sum(local(tensor).numel() for tensor in tensors)
                         for tensors in (inner(runner.model).parameters(), momenta)]


def inner(model):
    return model.module if is_model_wrapper(model) else model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor.clone()


def state(runner):
    return {name: whole(tensor) for name, tensor in inner(runner.model).state_dict().items()}


def classifier(work_dir, setting='lora', epochs=2, processes=1, lr=.1, hooks=(), **options):
    """Config of a training of two steps an epoch, with 12 images a step in all processes together."""
    full = SETTINGS[setting] is None
    backbone = load_config(str(DIGITS_CONFIG)).model.backbone.to_dict()
    backbone.update(drop_path_rate=options.pop('drop_path', 0.), out_indices=[3], liera=SETTINGS[setting])
    if full:
        backbone.pop('liera')
        backbone['type'] = 'mmpretrain.ConvNeXt'
    if setting == 'wrapped':  # one unit of shards, where LieRAConvNeXt has one for each block
        settings = backbone.pop('liera')
        backbone = dict(type='LieRABackbone', backbone=dict(backbone, type='mmpretrain.ConvNeXt'), liera=settings)
    return Config(dict(
        model=dict(type='PictureClassifier', backbone=backbone),
        work_dir=str(work_dir),
        experiment_name=f'{Path(work_dir).name}-{time.time_ns()}',  # MMEngine would share the visualizer of equal names
        train_dataloader=dict(
            dataset=dict(type='Pictures', images=len(IMAGES)), batch_size=12 // processes,
            sampler=dict(type='DefaultSampler', shuffle=True), collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=lr, momentum=.9)),
        param_scheduler=dict(type='LinearLR', start_factor=.5, by_epoch=False, end=4),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[*hooks] if full else [dict(type='LieRAHook'), *hooks],
        model_wrapper_cfg=dict(WRAPPER),
        randomness=dict(seed=0, diff_rank_seed=True),
        env_cfg=dict(),
        launcher='pytorch' if processes > 1 else 'none',
        **options))


def train(rank, processes, work_dir, options, of_rank=()):
    """Train a classifier; ``of_rank`` has further options for each process."""
    watch = Watch()
    runner = build_runner(classifier(work_dir, processes=processes, **options, **(of_rank[rank] if of_rank else {})))
    runner.register_hook(watch)
    runner.train()
    return dict(start=watch.start, gradients=watch.gradients, traffic=watch.traffic, held=watch.held, end=state(runner))


def run_detector(rank, processes, what, work_dir, options):
    """Train, train and validate, or test a detector on the digits; the number of steps, or the metrics."""
    cfg = load_config(str(DIGITS_CONFIG), options)
    cfg.update(work_dir=str(work_dir), experiment_name=f'{what}-{time.time_ns()}',
               launcher='pytorch' if processes > 1 else 'none')
    runner = build_runner(cfg)
    if what == 'test':
        return runner.test()
    runner.train()
    scalars = {name[len('val/'):]: scalar.current() for name, scalar in runner.message_hub.log_scalars.items()
               if name.startswith('val/coco/')}
    return scalars if what == 'validate' else runner.iter


def use_in_shards(rank, processes, folder):
    """What the public functions give of a model that is whole, and in shards; of tensors that do not divide evenly."""
    torch.distributed.init_process_group('gloo')
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Conv2d(5, 1, 1)).eval()
    model = liera_mm.adapt(model, rank=3, train_norm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=.1 * parameter.requires_grad)
    sharded = copy.deepcopy(model)
    torch.distributed.fsdp.fully_shard(sharded[0])
    torch.distributed.fsdp.fully_shard(sharded)
    results = []
    for each, name in ((model, 'whole'), (sharded, 'shards')):
        liera_mm.save_adapter(each, folder / f'{name}-{rank}')
        results.append((liera_mm.adapter_state_dict(each), liera_mm.export(each), liera_mm.summary(each),
                        liera_mm.range_report(each), liera_mm.layer_reports(each),
                        (folder / f'{name}-{rank}').read_bytes()))
    refusals = []
    load = functools.partial(liera_mm.load_adapter, source=folder / f'whole-{rank}')
    for write in (liera_mm.merge, liera_mm.merge_and_unload, load):
        try:
            write(sharded)
        except SetupError as error:
            refusals.append(str(error))
    x = torch.ones(1, 3, 5, 5)
    return results, refusals, [local(p).numel() for p in sharded.parameters()], model(x), sharded(x)


def in_process(function, rank, processes, port, args):
    torch.set_num_threads(1)
    yapf_api.FormatCode = lambda text, **_: (text, True)  # MMEngine prints its config nicely, for half of the time
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(processes), RANK=str(rank),
                      LOCAL_RANK=str(rank))
    try:
        return pickle.dumps(function(rank, processes, *args))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


PORTS = itertools.count(10_000 + os.getpid() % 20_000)


def free_port():
    """One of this process's own, below those that the system gives to whoever asks for any."""
    for port in PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(('127.0.0.1', port))
            return port
