"""The adapter file that a training leaves, with a card of what only a training knows."""
import math
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import mmcv
import mmdet
import mmengine
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.utils.data import Dataset

from ..core.checkpoint import save_adapter
from ..core.errors import SetupError
from ..core.wrappers import in_shards
from .checkpoint import adapted_backbones
from .datasets import parts_of

TASKS = dict(mmdet='object-detection', mmpretrain='image-classification')  # as hubs call them, by scope


class AdapterFile(Hook):
    """Writes ``adapter.safetensors`` and its card into the work dir when a training ends; LieRAHook registers it.

    With ``EMAHook`` it is of the averaged weights, as metrics and checkpoints are.

    Args:
        card: Entries of :class:`liera_mm.core.card.Card` beside those of :func:`training_card`, or in their place.
    """
    priority = 'LOWEST'

    def __init__(self, card: Optional[Mapping[str, Any]] = None):
        self.card = dict(card or {})
        self.metrics: Dict[str, float] = {}

    def after_val_epoch(self, runner: Runner, metrics: Optional[Dict[str, Any]] = None) -> None:
        self.metrics = {name: float(value) for name, value in (metrics or {}).items()
                        if isinstance(value, (int, float)) and math.isfinite(value)}

    def after_train(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        for hook in averages:
            hook.before_val_epoch(runner)
        backbones = adapted_backbones(model)
        for name, backbone in backbones.items():
            path = Path(runner.work_dir, 'adapter.safetensors' if len(backbones) == 1 else f'adapter_{name}.safetensors')
            card = training_card(name, runner.train_dataloader.dataset, self.metrics, runner.cfg.get('default_scope'))
            if is_main_process() or in_shards(model):  # which all processes gather
                try:
                    save_adapter(backbone, path, card={**card, **self.card})
                except OSError as error:
                    raise SetupError(f'The adapter {path} could not be saved: {error}',
                                     'Make room for it; the last checkpoint is intact, and has the adapter too') from None
        for hook in averages:
            hook.after_val_epoch(runner)


def training_card(name: str, dataset: Dataset, metrics: Mapping[str, float], scope: Optional[str]) -> Dict[str, Any]:
    """What a training knows of an adapter; entries of :class:`liera_mm.core.card.Card`.

    Args:
        name: Of the backbone in its detector.
        dataset: What it was trained on.
        metrics: Of the last validation, on the COCO scale from 0 to 1 for instance; those that are -1 say nothing.
        scope: Of the config: ``mmdet`` or another.
    """
    parts = [*parts_of(dataset)]
    return dict(
        data=f'{sum(map(len, parts)):,} images of {", ".join(sorted({type(part).__name__ for part in parts}))}',
        classes=[*(getattr(parts[0], 'metainfo', {}).get('classes') or ())],
        metrics={key: value for key, value in metrics.items() if value != -1},
        tags=['liera', 'parameter-efficient-fine-tuning', *([TASKS[scope]] if scope in TASKS else [])],
        versions=dict(mmengine=mmengine.__version__, mmcv=mmcv.__version__, mmdet=mmdet.__version__),
        notes=[f'It is of {name}. What was trained on top of that is in the checkpoint, and not in here.'])
