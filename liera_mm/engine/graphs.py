"""CUDA graphs under MMEngine's Runner."""
import difflib
from typing import Any, Callable, Optional, Sequence

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from ..core.errors import SetupError
from ..core.wrappers import in_shards, unwrap
from ..models.graphs import Graphs


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Replays parts of a model from CUDA graphs while it trains (see :class:`~liera_mm.models.graphs.Graphs`).

    For images that are padded to few sizes. On the CPU, in shards, and with batch norms that communicate, the model trains
    without graphs, and the log says so.

    Args:
        modules: Names of the modules, each with graphs of its own, in memory of its own.
        most: How many sizes of images may have graphs; others go without.
        capture: As for ``Graphs``.
    """

    def __init__(self, modules: Sequence[str] = ('backbone', ), most: int = 4,
                 capture: Optional[Callable[..., Any]] = None):
        self.names, self.most, self.capture, self.modules = list(modules), most, capture, []

    def before_train(self, runner: Runner) -> None:
        model = unwrap(runner.model)
        known = dict(model.named_modules())
        for name in self.names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise SetupError(f'CUDAGraphHook: the model has no module {name!r}.',
                                 f'Set modules to names such as {(close or list(dict(model.named_children())))!r}')
        obstacle = _obstacle(model) if self.capture is None else None
        if obstacle:
            runner.logger.info(f'LieRA  no CUDA graphs: {obstacle}')
            return
        self.modules = [known[name] for name in self.names]
        for name, module in zip(self.names, self.modules):
            module.forward = Graphs(module, name, self.most, self.capture)

    def after_train(self, runner: Runner) -> None:
        for module in self.modules:
            del module.forward
        self.modules = []


def _obstacle(model: nn.Module) -> Optional[str]:
    """Why a model cannot be replayed from graphs; None if it can."""
    if not all(parameter.is_cuda for parameter in model.parameters()):
        return 'the model is not on a CUDA device'
    if in_shards(model):
        return 'the model is in shards'
    if any('SyncBatchNorm' in type(module).__name__ for module in model.modules()):
        return 'its batch norms wait for those of other processes'
    return None
