"""Training with every tensor in shards, one for each process, where a model is too large for one GPU."""
import time
from typing import Any, Callable, Dict, Optional

import mmengine
import torch
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.registry import STRATEGIES
from mmengine.runner.checkpoint import save_checkpoint
from mmengine.utils import get_git_hash
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..core.errors import SetupError
from ..models.pretrained import pretrained_backbones


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Fully sharded data parallelism for MMEngine's FlexibleRunner, with torch's ``fully_shard`` (FSDP2).

    Each process holds a share of every parameter, frozen or not, of its gradient and of the optimizer's state; the parts of
    a backbone (:attr:`PretrainedBackbone.sharding_units`) are gathered while they compute. Checkpoints are those of any
    other training: the model is whole until it has been built, loaded and checked, and gathered to be saved.

    LieRAHook shards the model when all that is done, by :meth:`shard`; not when there is but one process, or in a test.
    """

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        model = self.convert_model(model.to(get_device()))
        if get_world_size() > 1:
            self.guard = model.register_forward_pre_hook(_refuse_to_train)
        return model

    def shard(self) -> None:
        """Shard the model, its optimizer's parameters and what the optimizer knows of them, in place.

        Raises:
            SetupError: If this version of torch has no ``fully_shard``.
        """
        try:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import distribute_tensor
        except ImportError:
            raise SetupError(f'FullyShardStrategy needs torch 2.6 or later; this is {torch.__version__}',
                             'Install it, or train without shards: --cfg-options runner_type=Runner') from None
        self.guard.remove()
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        mesh = init_device_mesh(get_device(), (get_world_size(), ))
        for _, backbone in pretrained_backbones(self.model):
            for unit in backbone.sharding_units:
                fully_shard(unit, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        sharded = dict(self.model.named_parameters())

        optimizer = self.optim_wrapper.optimizer
        for group in optimizer.param_groups:
            group['params'] = [sharded[names[parameter]] for parameter in group['params']]
        for parameter in list(optimizer.state):
            state, shard = optimizer.state.pop(parameter), sharded[names[parameter]]
            optimizer.state[shard] = {
                key: distribute_tensor(value, mesh, shard.placements)
                if isinstance(value, Tensor) and value.shape == shard.shape else value for key, value in state.items()
            }

    def save_checkpoint(self,
                        filename: str,
                        *,
                        save_optimizer: bool = True,
                        save_param_scheduler: bool = True,
                        extra_ckpt: Optional[Dict[str, Any]] = None,
                        callback: Optional[Callable[[Dict[str, Any]], None]] = None) -> None:
        """Gather what is in shards, in all processes, and save it from the first, as every other training's."""
        checkpoint = dict(state_dict=_whole(self.model.state_dict()))
        if save_optimizer:
            checkpoint['optimizer'] = _whole(self.optim_wrapper.state_dict())
        if not is_main_process():
            return
        if save_param_scheduler and hasattr(self, 'param_schedulers'):
            checkpoint['param_schedulers'] = self.scheduler_state_dict()
        checkpoint.update(extra_ckpt or {})
        checkpoint.setdefault('meta', {}).update(
            seed=self.seed,
            time=time.strftime('%Y%m%d_%H%M%S', time.localtime()),
            mmengine=mmengine.__version__ + get_git_hash())
        if callback is not None:
            callback(checkpoint)
        save_checkpoint(checkpoint, filename, backend_args=None if '://' in filename else dict(backend='checkpoints'))


def _refuse_to_train(model: nn.Module, *_: Any) -> None:
    if model.training:
        raise SetupError('nothing has sharded the model: each process would train one of its own.',
                         "LieRAHook does that: add default_hooks = dict(liera=dict(type='LieRAHook')), or train without "
                         'shards: --cfg-options runner_type=Runner')


def local(tensor: Tensor) -> Tensor:
    """The share of a sharded tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def _whole(tree: Any) -> Any:
    """A copy of nested containers with every sharded tensor gathered, on the CPU of the first process alone."""

    def gather(leaf: Any) -> Any:
        if not hasattr(leaf, 'full_tensor'):
            return leaf
        whole = leaf.full_tensor()
        return whole.cpu() if is_main_process() else None

    return tree_map(gather, tree)
