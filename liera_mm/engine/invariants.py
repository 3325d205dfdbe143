"""What must hold before and during every training of an adapted model; LieRAHook checks it.

During training that costs one hash of 1024 values of each frozen tensor an epoch, one look at the gradients of the first
step, and one look at the losses an iteration, before the optimizer's step.
"""
import logging
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..adapt import adapted_layers, intended_parameters, some
from ..checkpoint import digest
from ..errors import SetupError
from ..group import MULTIPLICATIVE
from ..models.pretrained import pretrained_backbones
from ..report import range_report
from .sharding import in_shards, local

SAMPLES = 1024  # of each frozen tensor


# Before training


def check_trainable(name: str, backbone: nn.Module) -> None:
    """Raise a SetupError unless exactly those tensors of a backbone train that its ``liera`` config says."""
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    intended = intended_parameters(backbone)
    if trained != intended:
        raise SetupError(
            f'{name} would not train what its liera config says. Trains, but should be frozen: '
            f'{sorted(trained - intended) or "nothing"}. Should train, but is frozen: '
            f'{sorted(intended - trained) or "nothing"}',
            'Leave requires_grad of the backbone alone: no frozen_stages, no hook that freezes or unfreezes it')


def check_optimizer(model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> None:
    """Raise a SetupError if a trained tensor is not in the optimizer."""
    optimized = {id(p) for optimizer in _optimizers(optim_wrapper) for group in optimizer.param_groups
                 for p in group['params']}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    if missing:
        raise SetupError(f'the optimizer lacks {len(missing)} trainable tensors: {", ".join(missing[:3])}.',
                         'It must be built after the model is adapted: adapt through the config, not from a hook')


def check_finite(model: nn.Module) -> None:
    """Raise a SetupError if a weight is NaN or infinite."""
    broken = _not_finite(model)
    if broken:
        raise SetupError(f'{len(broken)} tensors of the model have values that are not finite: {some(broken)}',
                         'Give intact weights: those of init_cfg, load_from or the checkpoint are damaged')


def check_movable(model: nn.Module) -> None:
    """Raise a SetupError if all of a layer's weight is zero, which no multiplicative update moves."""
    zero = [name for name, layer in adapted_layers(model) if layer.update in MULTIPLICATIVE and not layer.weight.any()]
    if zero:
        raise SetupError(
            f'{len(zero)} adapted layers have nothing but zeros for a weight, which no multiplicative update moves: '
            f'{some(zero)}',
            "Give them update='additive' in overrides, or targets that leave them out; or check the pretrained weights")


def ranks_above_dimensions(model: nn.Module) -> List[str]:
    """Names of the layers whose factors have a larger inner dimension than Δ, as a matrix, has rows or columns.

    That is no error: the paper's own configs, with rank 16 on depthwise kernels of 7 rows, have such layers.
    """
    return [name for name, layer in adapted_layers(model)
            if layer.method != 'dense' and len(layer.adapter.A) > min(layer.adapter.A.shape[1], len(layer.adapter.B))]


# While training


def frozen_digests(model: nn.Module) -> Dict[str, str]:
    """A hash of 1024 values of every frozen tensor of the backbones: their parameters, and what adapters keep fixed.

    Of a sharded tensor, of 1024 values that this process holds.
    """
    digests = {}
    for prefix, backbone in pretrained_backbones(model):
        parameters = dict(backbone.named_parameters())
        for name, tensor in backbone.state_dict().items():
            if not parameters[name].requires_grad if name in parameters else '.adapter.' in name:
                values = local(tensor).flatten()
                digests[f'{prefix}.{name}'] = digest(values[::len(values) // SAMPLES | 1])
    return digests


def check_frozen(model: nn.Module, before: Dict[str, str]) -> None:
    """Raise a SetupError if a frozen tensor has changed since :func:`frozen_digests`, be the model merged or not."""
    now = frozen_digests(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise SetupError(
            f'{len(changed)} of {len(before)} frozen tensors have changed while training: {some(changed)}',
            'Look among custom_hooks for what writes to them or unfreezes them, take it out, and train again: the '
            'perturbations were trained on weights that are gone')


def watch_first_step(model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict],
                     logger: logging.Logger) -> None:
    """Have the gradients checked just before the first step of the optimizer.

    It raises a SetupError if a frozen tensor has a gradient, or a trained one of a backbone has none; of the rest of the
    detector it logs those that have none, for some detectors have parts that they don't use. Frozen tensors without a
    gradient may be among the optimizer's: MMEngine puts them there, and no optimizer moves or decays them.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbones = tuple(f'{name}.' for name, _ in pretrained_backbones(model))
    pending = {id(optimizer) for optimizer in _optimizers(optim_wrapper)}

    def check(optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in pending:
            return
        pending.remove(id(optimizer))
        have = {names[id(p)]: p.grad is not None for group in optimizer.param_groups for p in group['params']
                if id(p) in names}
        thawed = [name for name, has in have.items() if has and name not in trained]
        if thawed:
            raise SetupError(f'{len(thawed)} frozen tensors have a gradient, and would train and decay: {some(thawed)}',
                             'Leave requires_grad of the backbone alone: no hook that unfreezes it')
        lacking = [name for name, has in have.items() if not has and name in trained]
        ours = [name for name in lacking if name.startswith(backbones)]
        if ours:
            raise SetupError(
                f'{len(ours)} trained tensors of the backbone had no gradient in the first step: {some(ours)}',
                'Choose targets whose output the detector uses; or look for a detach() or no_grad() behind these layers')
        if lacking:
            logger.warning(f'LieRA  {len(lacking)} trained tensors had no gradient in the first step: {some(lacking)}')

    for optimizer in _optimizers(optim_wrapper):
        optimizer.register_step_pre_hook(check)


class LossWatch:
    """Stops a training whose loss is not finite before a weight has moved by it, and names the layer.

    The loss is looked at just before the optimizer's step; or before the next forward pass, if there was no step, as when
    gradients are accumulated. By then it is long known: the host does not wait for the device.
    """

    def __init__(self, model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict]):
        self.noted: Optional[Tuple[Any, ...]] = None
        self.handles = [model.register_forward_pre_hook(self.check),
                        model.register_forward_hook(self.note, with_kwargs=True)]
        self.handles += [optimizer.register_step_pre_hook(self.check) for optimizer in _optimizers(optim_wrapper)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], losses: Any) -> None:
        """Forward hook of a detector or classifier."""
        if not (model.training and isinstance(losses, dict)):
            return
        terms = [(name, term.detach().float().mean() if term.dim() else term.detach().float())
                 for name, value in losses.items() if 'loss' in name
                 for term in ([value] if isinstance(value, Tensor) else value)]
        finite, event = torch.stack([term for _, term in terms]).isfinite().to('cpu', non_blocking=True), None
        if terms[0][1].is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.noted = model, args, kwargs, [name for name, _ in terms], finite, event

    def check(self, *_: Any) -> None:
        if self.noted is None:
            return
        (model, args, kwargs, names, finite, event), self.noted = self.noted, None
        if event is not None:
            event.synchronize()
        if finite.all():
            return
        names = dict.fromkeys(name for name, ok in zip(names, finite.tolist()) if not ok)
        raise SetupError(
            f'The loss is not finite ({", ".join(names)}): {_where(model, args, kwargs)}',
            'The last checkpoint is intact: continue from it (--resume) with a smaller learning rate or alpha, or with '
            'optim_wrapper.clip_grad')


@torch.no_grad()
def _where(model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> str:
    """What is the first not to be finite: a weight, an effective weight, or the output of a layer."""
    broken = _not_finite(model)
    if broken:
        return f'{broken[0]} has values that are not finite'
    if in_shards(model):  # of which only all processes together could see more
        return 'all weights are finite'
    for name, layer in adapted_layers(model):
        if not layer.effective_weight().isfinite().all():
            return f'the effective weight of {name} is not finite, with |Δ| up to {layer.adapter().abs().max():.4g}'
    report = range_report(model)
    delta = f'; the largest |Δ| is {report.max_delta:.4g} in {report.max_delta_layer}' if report.max_delta_layer else ''
    # Some detectors communicate while they compute their loss: in one process of several, that would wait forever
    layer = None if is_distributed() else _first_output_not_finite(model, args, kwargs)
    return f'all weights are finite, but the output of {layer} is not{delta}' if layer else f'all weights are finite{delta}'


def _first_output_not_finite(model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[str]:
    found = []

    def look(name: str):

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, (list, tuple)) else [output]
            if any(isinstance(tensor, Tensor) and not tensor.isfinite().all() for tensor in outputs):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _not_finite(model: nn.Module) -> List[str]:
    return [name for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and not local(tensor).isfinite().all()]


def _optimizers(optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> List[Optimizer]:
    wrappers = [optim_wrapper] if isinstance(optim_wrapper, OptimWrapper) else optim_wrapper.values()
    return [wrapper.optimizer for wrapper in wrappers]
