"""What tools/benchmark.py measures: detectors that differ in how their backbones train, and the data that they train on."""
import copy
import gc
import statistics
from pathlib import Path
from typing import Any, Dict, Tuple

from liera_mm.engine.cli import load_config
from liera_mm.models import LieRAConvNeXt
from liera_mm.models.masks import pinnable

# isort: split
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils.data._utils.pin_memory import pin_memory

from liera_mm.core.algebra import METHODS
from liera_mm.core.factors import factor_shapes
from liera_mm.core.targets import layer_kind
from liera_mm.engine.param_groups import MergedGroups
from liera_mm.engine.watches import LossWatch
from liera_mm.models.graphs import Graphs

CONFIG = Path(__file__).parents[1] / 'configs/mask-rcnn_convnextv2-b_liera_r16.py'
PARTS = ('data', 'backbone', 'rest', 'backward', 'optimizer')


class LoralibLinear(nn.Module):
    """Microsoft's loralib on a linear layer: the update as a second branch."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.A = nn.Parameter(.01 * torch.randn(rank, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (x @ self.A.T @ self.B.T) * self.scale


class LoralibConv(nn.Module):
    """Microsoft's loralib on a convolution: the update added to the weight, by plain autograd."""

    def __init__(self, layer: nn.Conv2d, rank: int, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        a, b = factor_shapes(layer.weight.shape, layer.groups, rank)
        self.A, self.B = nn.Parameter(.01 * torch.randn(a)), nn.Parameter(torch.zeros(b))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight + (self.B @ self.A).view(self.layer.weight.shape) * self.scale
        return self.layer._conv_forward(x, weight, self.layer.bias)


def loralib(backbone: nn.Module, rank: int) -> None:
    for name, layer in list(backbone.named_modules()):
        if layer_kind(layer):
            wrapper = LoralibLinear if isinstance(layer, nn.Linear) else LoralibConv
            parent, _, child = name.rpartition('.')
            setattr(backbone.get_submodule(parent), child, wrapper(layer, rank, 2.))


def hf_peft(backbone: nn.Module, rank: int) -> None:
    """LoRA of Hugging Face's PEFT on the layers that it takes; the others stay frozen."""
    from peft import LoraConfig, inject_adapter_in_model
    names = {name: layer_kind(layer) for name, layer in backbone.named_modules() if layer_kind(layer)}
    try:
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(names)), copy.deepcopy(backbone))
    except ValueError as error:
        print(f'PEFT refuses the depthwise convolutions, which stay frozen in its row: {error}')
        names = [name for name, kind in names.items() if kind != 'depthwise']
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(names)), backbone)


# What our base config sets for speed, as MMDetection has it
UNDONE: Dict[str, Dict[str, Any]] = {
    'pageable': {'train_dataloader.pin_memory': False, 'model.data_preprocessor.non_blocking': False},
    'PackDetInputs': {'train_dataloader.dataset.pipeline.6.type': 'PackDetInputs'},
    'DetDataPreprocessor': {'model.data_preprocessor.type': 'DetDataPreprocessor'},
    'RandomSampler': {f'model.train_cfg.{stage}.sampler.type': 'RandomSampler' for stage in ('rpn', 'rcnn')},
    'AdamW not fused': {'optim_wrapper.optimizer.fused': None},
    '2 workers': {'train_dataloader.num_workers': 2},
    'stock heads': {
        'model.rpn_head.type': 'RPNHead', 'model.roi_head.type': 'StandardRoIHead',
        **{f'model.roi_head.{part}_roi_extractor.type': 'SingleRoIExtractor' for part in ('bbox', 'mask')}},
    'no graphs': {'custom_hooks': [dict(type='LieRAHook')], 'model.data_preprocessor.batch_augments': None},
}


def graphs(*modules: str) -> Dict[str, Any]:
    return {'custom_hooks': [dict(type='CUDAGraphHook', modules=modules)]}


STOCK = {key: value for options in UNDONE.values() for key, value in options.items()}

# What each changes in the backbone's config. Beside that: its update rule, whether all of it trains, what replaces its
# layers, other options of the config, and whether the loss is looked at as LieRAHook does (watched).
VARIANTS: Dict[str, Dict[str, Any]] = {
    'full': dict(options=STOCK, fast=False, trainable=True),
    'frozen': dict(options=STOCK, fast=False),
    'lora loralib': dict(options=STOCK, fast=False, replace=loralib),
    'lora peft': dict(options=STOCK, fast=False, replace=hf_peft),
    'liera': dict(options=STOCK, fast=False, update='taylor'),
    'liera exp': dict(options=STOCK, fast=False, update='exp'),
    'liera config': dict(fast=False, update='taylor'),
    'full fast': dict(trainable=True),
    'frozen fast': dict(),
    'lora fast': dict(update='additive'),
    'liera fast': dict(update='taylor'),
    'liera exp fast': dict(update='exp'),
    'liera fast with_cp': dict(update='taylor', with_cp=True),
}
# LieRA as our configs have it, but for one of their settings
SETTINGS: Dict[str, Dict[str, Any]] = {
    'liera fast': VARIANTS['liera fast'],
    'liera fast again': VARIANTS['liera fast'],
    **{name: dict(update='taylor', options=options) for name, options in UNDONE.items()},
    'cudnn_benchmark': dict(update='taylor', options={'env_cfg.cudnn_benchmark': True}),
    'prefetch_factor 4': dict(update='taylor', options={'train_dataloader.prefetch_factor': 4}),
    'workers end': dict(update='taylor', options={'train_dataloader.persistent_workers': False}),
    'watched': dict(update='taylor', watched=True),
    'plain': dict(update='taylor', scale='plain'),
    'stock heads, no graphs': dict(update='taylor', options={**UNDONE['stock heads'], **UNDONE['no graphs']}),
    'graphs of neck': dict(update='taylor', options=graphs('backbone', 'neck')),
    'graphs of neck, rpn': dict(update='taylor', options=graphs('backbone', 'neck', 'rpn_head')),
}
# Every parameterisation of Δ
PARAMETERISATIONS: Dict[str, Dict[str, Any]] = {method: dict(update='taylor', method=method) for method in METHODS}
ALL = {**VARIANTS, **SETTINGS, **PARAMETERISATIONS}


class Variant:
    """A detector and its optimizer on the card, and what was measured of its training steps.

    Attributes:
        times (list[dict]): Milliseconds of the parts of every timed step.
        losses (list[float]): Loss of every timed step.
        peak (int): Most bytes allocated during a step, without those of other variants.
    """

    def __init__(self, name: str, arch: str, rank: int, size: int = 1024, **options: Any):
        self.name, self.times, self.losses, self.peak = name, [], [], 0
        others = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        self.cfg, self.model, self.optimizer = build(name, arch, rank, size, **options)
        if ALL[name].get('options') is not STOCK:
            MergedGroups(self.optimizer.optimizer)  # as LieRAHook does
        if 'watched' in ALL[name]:
            LossWatch(self.model, self.optimizer)
        self.model.backbone.register_forward_hook(lambda *_: self._mark('backbone'))
        graphed = [part for hook in self.cfg.custom_hooks if hook.type == 'CUDAGraphHook'
                   for part in hook.get('modules', ['backbone'])]
        self.graphed = [self.model.get_submodule(part) for part in graphed]
        for part, module in zip(graphed, self.graphed):
            module.forward = Graphs(module, part, 4)
        self.resident = torch.cuda.memory_allocated() - others

    def loaded(self, data: Dict[str, Any]) -> Dict[str, Any]:
        """A copy of a batch, since preprocessing changes it, in the memory that the dataloader gives it in."""
        data = copy.deepcopy(data)
        if self.cfg.train_dataloader.dataset.pipeline[-1].type == 'PackDeviceInputs':
            data['data_samples'] = [pinnable(sample) for sample in data['data_samples']]
        return pin_memory(data) if self.cfg.train_dataloader.pin_memory and torch.cuda.is_available() else data

    def repeat(self, data: Dict[str, Any]) -> None:
        """A step on a copy of a batch."""
        self.step(self.loaded(data))

    def weigh(self, data: Dict[str, Any]) -> None:
        """As :meth:`repeat`, and the memory that it takes."""
        data = self.loaded(data)
        others = torch.cuda.memory_allocated() - self.resident
        torch.cuda.reset_peak_memory_stats()
        self.step(data)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - others + self._graph_memory())
        del data
        gc.collect()  # or it would be freed within another variant's step, and lower that one's peak
        self.resident = torch.cuda.memory_allocated() - others

    def step(self, data: Dict[str, Any]) -> None:
        torch.backends.cudnn.benchmark = self.cfg.env_cfg.cudnn_benchmark
        torch.cuda.synchronize()
        self.marks = {}
        self._mark('start')
        inputs = self.model.data_preprocessor(data, training=True)
        self._mark('data')
        with self.optimizer.optim_context(self.model):
            losses = self.model(**inputs, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self._mark('rest')
        self.optimizer.backward(loss)
        self._mark('backward')
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._mark('optimizer')
        torch.cuda.synchronize()
        times = [self.marks[part] for part in ('start', *PARTS)]
        self.times.append({part: a.elapsed_time(b) for part, a, b in zip(PARTS, times, times[1:])})
        self.losses.append(loss.item())

    def warmed_up(self) -> None:
        """Forget the steps so far, in which kernels are compiled and graphs captured."""
        self.times.clear()
        self.peak = 0

    def _mark(self, part: str) -> None:
        self.marks[part] = torch.cuda.Event(enable_timing=True)
        self.marks[part].record()

    def _graph_memory(self) -> int:
        """Bytes that graphs use while they run, which the allocator counts as free."""
        pools = {module.forward.pool for module in self.graphed}
        return sum(segment['total_size'] - segment['allocated_size'] for segment in torch.cuda.memory_snapshot()
                   if tuple(segment['segment_pool_id']) in pools) if pools else 0

    def row(self) -> Dict[str, Any]:
        """Medians of the steps' times in ms, and the quartiles of the whole step."""
        totals = [sum(step.values()) for step in self.times]
        low, _, high = statistics.quantiles(totals, n=4)
        parts = {part: statistics.median(step[part] for step in self.times) for part in PARTS}
        return dict(variant=self.name, ms=statistics.median(totals), quartiles=[low, high], **parts)

    def sizes(self) -> Dict[str, float]:
        """Peak of the memory in GiB, parameters that train in millions, and what a checkpoint holds of the model in MiB."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        frozen = {id(p) for p in self.model.parameters() if not p.requires_grad}
        saved = [t for t in self.model.state_dict(keep_vars=True).values() if id(t) not in frozen]
        return dict(
            peak_gib=self.peak / 2**30,
            trainable_m=sum(p.numel() for p in trainable) / 1e6,
            checkpoint_mib=sum(t.numel() * t.element_size() for t in saved) / 2**20)


def build(name: str, arch: str, rank: int, size: int = 1024, **options: Any) -> Tuple[Config, nn.Module, OptimWrapper]:
    """Our config for COCO as a variant has it, for one size of images, and its detector on the card, with an optimizer."""
    setting = ALL[name]
    cfg = load_config(str(CONFIG), {**setting.get('options', {}), **options})
    liera = {key: setting[key] for key in ('update', 'scale', 'method') if key in setting}
    liera = dict(liera, rank=rank, alpha=2 * rank) if liera else None
    cfg.model.backbone.update(
        arch=arch, init_cfg=None, liera=liera, **{key: setting[key] for key in ('fast', 'with_cp') if key in setting})
    for augment in cfg.model.data_preprocessor.batch_augments or ():
        augment.size = size, size
    cfg.model.neck.in_channels = LieRAConvNeXt.arch_settings[arch]['channels']
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        if 'replace' in setting:
            setting['replace'](model.backbone, rank)
        if 'trainable' in setting:
            model.backbone.requires_grad_(True)
        model.cuda().train()
        return cfg, model, build_optim_wrapper(model, cfg.optim_wrapper)


def batch(images: int, size: int, seed: int = 0) -> Dict[str, Any]:
    """Noise with eight ellipses an image as instances, as a dataloader gives it."""
    random = np.random.RandomState(seed)
    data = dict(inputs=[], data_samples=[])
    rows, columns = np.ogrid[:size, :size]
    for _ in range(images):
        data['inputs'].append(torch.from_numpy(random.randint(0, 256, (3, size, size), dtype=np.uint8)))
        centre, radius = random.uniform(.2, .8, (8, 2)) * size, random.uniform(.03, .2, (8, 2)) * size
        boxes = np.concatenate([centre - radius, centre + radius], 1)
        masks = [((columns - x) / a)**2 + ((rows - y) / b)**2 <= 1 for (x, y), (a, b) in zip(centre, radius)]
        sample = DetDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(random.randint(0, 80, 8)),
            masks=BitmapMasks(np.stack(masks).astype(np.uint8), size, size))
        data['data_samples'].append(sample)
    return data
