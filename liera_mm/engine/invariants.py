"""What must hold before and during every training of an adapted model; LieRAHook checks it.

During training that costs one hash of 1024 values of each frozen tensor an epoch, one look at which gradients the first
step has, and one look at the losses and one at the gradients an iteration, before the optimizer's step.
"""
import contextlib
import functools
import logging
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.adapt import adapted_layers, adapter_names, intended_parameters, named_layers, some
from ..core.checkpoint import digest
from ..core.errors import SetupError
from ..core.group import MULTIPLICATIVE
from ..core.report import range_report
from ..core.wrappers import in_shards
from ..models.pretrained import pretrained_backbones
from .sharding import local

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
            "Leave requires_grad of the backbone alone: no hook that freezes or unfreezes it; what shall not train is for "
            "exclude=[...], what shall train whole for train=[...] in liera=dict(...)")


def frozen_by_design(model: nn.Module, name: str) -> bool:
    """Whether a backbone is in a part of the model of which nothing trains, as the teacher of a semi-supervised detector."""
    parts = name.split('.')[:-1]
    ancestors = [model.get_submodule('.'.join(parts[:i])) for i in range(1, len(parts) + 1)]
    return any(not any(p.requires_grad for p in part.parameters()) for part in ancestors) and any(
        p.requires_grad for p in model.parameters())


def trained_backbones(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Name and backbone of those that are not frozen by design."""
    return [(name, backbone) for name, backbone in pretrained_backbones(model) if not frozen_by_design(model, name)]


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
    zero = [name for name, layer in adapted_layers(model)
            if layer.update in MULTIPLICATIVE and not layer.frozen_weight.any()]
    if zero:
        raise SetupError(
            f'{len(zero)} adapted layers have nothing but zeros for a weight, which no multiplicative update moves: '
            f'{some(zero)}',
            "Give them update='additive' in overrides, or targets that leave them out; or check the pretrained weights")


def ranks_above_dimensions(model: nn.Module) -> List[str]:
    """Names of the layers whose factors have a larger inner dimension than Δ, as a matrix, has rows or columns.

    That is no error: the paper's own configs, with rank 16 on depthwise kernels of 7 rows, have such layers.
    """
    return [name for name, layer in adapted_layers(model) if layer.adapter.oversized]


# While training


def frozen_digests(model: nn.Module) -> Dict[str, str]:
    """A hash of 1024 values of every frozen tensor of the backbones: their parameters, and what adapters keep fixed.

    Of a sharded tensor, of 1024 values that this process holds. Not of backbones that are frozen by design: teachers move.
    """
    digests = {}
    for prefix, backbone in trained_backbones(model):
        parameters, adapters = dict(backbone.named_parameters()), adapter_names(backbone)
        for name, tensor in backbone.state_dict().items():
            if not parameters[name].requires_grad if name in parameters else name in adapters:
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


def watch_first_step(model: nn.Module,
                     optim_wrapper: Union[OptimWrapper, OptimWrapperDict],
                     logger: logging.Logger,
                     losses: Optional['LossWatch'] = None,
                     find_unused: bool = True) -> None:
    """Have it checked just before the first step of the optimizer which tensors have a gradient.

    It raises a SetupError if a frozen tensor has a gradient, or if an adapter has none although the detector uses its layer,
    or although ``targets`` name the layer. Other trained tensors without a gradient are logged, for detectors have parts
    that they don't use. Frozen tensors without a gradient may be among the optimizer's: MMEngine puts them there, and no
    optimizer moves or decays them.

    Args:
        model: The detector or classifier.
        optim_wrapper: Its optimizers.
        logger: Where to say what has no gradient.
        losses: What has the inputs of the last forward pass. Without it, a layer without a gradient counts as used.
        find_unused: Whether tensors may be without one; not with DistributedDataParallel's ``find_unused_parameters=False``.
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
        _check_lacking(model, ours, losses)
        if ours and not find_unused:
            raise SetupError(
                f'{len(ours)} trained tensors are of parts of the backbone that the detector does not use: {some(ours)}',
                'Several processes need to know: set find_unused_parameters=True in the config, or leave these parts out '
                'with exclude=[...] in liera=dict(...)')
        if ours:
            logger.warning(f'LieRA  the detector does not use parts of the backbone: {len(ours)} trained tensors of it had '
                           f'no gradient in the first step, and stay as they are: {some(ours)}')
        if len(lacking) > len(ours):
            others = set(lacking) - set(ours)
            logger.warning(f'LieRA  {len(others)} trained tensors had no gradient in the first step: {some(others)}')
        if losses is not None and not pending:
            losses.forget()

    for optimizer in _optimizers(optim_wrapper):
        optimizer.register_step_pre_hook(check)


def _check_lacking(model: nn.Module, lacking: Sequence[str], losses: Optional['LossWatch']) -> None:
    """Raise a SetupError if trained tensors without a gradient are those of a layer that is named, or that is in use."""
    if not lacking:
        return
    adapters = {f'{name}.adapter.{key}': name for name, layer in adapted_layers(model)
                for key, _ in layer.adapter.named_parameters()}
    layers = {adapters[name] for name in lacking if name in adapters}
    named = {f'{prefix}.{name}' for prefix, backbone in pretrained_backbones(model) if hasattr(backbone, 'liera')
             for name in named_layers(backbone)} & layers
    if named:
        raise SetupError(f'{len(named)} layers that targets name had no gradient in the first step: {some(named)}',
                         "Take them out of liera's targets: the detector does not use what they compute")
    used = layers if losses is None else losses.in_use(layers)
    ours = [name for name in lacking if adapters.get(name) in used]
    if ours:
        raise SetupError(
            f'{len(ours)} trained tensors of the backbone had no gradient in the first step: {some(ours)}',
            'The detector uses these layers, but computes with their frozen weight, or with a Δ that something detaches: '
            "leave them out with exclude=[...] in liera=dict(...), or mend what reads them")


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
        self.optim_wrapper = optim_wrapper
        self.last: Optional[Tuple[Any, ...]] = ()

    def forget(self) -> None:
        """Keep the inputs of forward passes no longer."""
        self.last = None

    def in_use(self, layers: Set[str]) -> Set[str]:
        """Those of the adapted layers of that name whose output the last loss depends on: computed once more, merged."""
        if not self.last:
            return layers
        model, args, kwargs = self.last
        adapted = [(name, layer) for name, layer in adapted_layers(model) if name in layers]
        weights = [layer._parameters['weight'] for _, layer in adapted]
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        wrapper = self.optim_wrapper
        context = wrapper.optim_context(model) if isinstance(wrapper, OptimWrapper) else contextlib.nullcontext()
        handles = dict(model._forward_hooks), dict(model._forward_pre_hooks)
        for hooks in (model._forward_hooks, model._forward_pre_hooks):
            hooks.clear()
        for _, layer in adapted:
            layer.merge()
        try:
            with torch.random.fork_rng(devices=_devices(weights)), context:
                for weight in weights:
                    weight.requires_grad_(True)
                terms = [term.float().sum() for name, term in _terms(model(*args, **kwargs)) if term.requires_grad]
                grads = torch.autograd.grad(sum(terms), weights, allow_unused=True)
        finally:
            for weight, (_, layer) in zip(weights, adapted):
                weight.requires_grad_(False)
                layer.unmerge()
            for buffer, value in buffers:
                buffer.copy_(value)
            model._forward_hooks.update(handles[0])
            model._forward_pre_hooks.update(handles[1])
        return {name for (name, _), grad in zip(adapted, grads) if grad is not None}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def note(self, model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any], losses: Any) -> None:
        """Forward hook of a detector or classifier."""
        if not (model.training and isinstance(losses, dict)):
            return
        if self.last is not None:
            self.last = model, args, kwargs
        terms = [(name, term.detach().float().mean() if term.dim() else term.detach().float())
                 for name, term in _terms(losses)]
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


class GradientWatch:
    """Stops a training before a weight has moved by a gradient that is not finite, and names the layer.

    The gradients are looked at before they are clipped, by a few operations for all of them. On a GPU the answer comes while
    the step is launched, and the host does not wait for it, unless clipping did: where it is not known yet, a gradient that
    turns out not to be finite is replaced by zeros on the GPU, and the next step, or :meth:`check`, raises the error. Under
    a GradScaler, which skips such steps itself, there is nothing to do.
    """

    def __init__(self, model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict]):
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.noted: Optional[Tuple[List[str], Tensor, Any]] = None
        self.wrappers = [wrapper for wrapper in _wrappers(optim_wrapper)
                         if not (hasattr(wrapper, 'loss_scaler') and wrapper.loss_scaler.is_enabled())]
        self.handles = [wrapper.optimizer.register_step_pre_hook(self.guard) for wrapper in self.wrappers]
        self.steps = [functools.partial(self._step, wrapper, wrapper.step) for wrapper in self.wrappers]
        for wrapper, step in zip(self.wrappers, self.steps):
            wrapper.step = step

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for wrapper, step in zip(self.wrappers, self.steps):
            if wrapper.step is step:  # and nobody else has replaced it since
                wrapper.step = step.args[1]

    def _step(self, wrapper: OptimWrapper, step: Callable[..., None], **kwargs: Any) -> None:
        self.check()  # known by now
        # In shards, a process can have nothing of a tensor
        parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']
                      if p.grad is not None and local(p.grad).numel()]
        self.grads = [local(p.grad) for p in parameters]
        if self.grads:
            # The largest absolute value, for a sum of squares can overflow
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(self.grads, float('inf'))])
            self.finite, event = largest.isfinite(), None
            on_host = self.finite.to('cpu', non_blocking=True)
            if largest.is_cuda:
                event = torch.cuda.Event()
                event.record()
            self.noted = [self.names.get(id(p), 'a parameter') for p in parameters], on_host, event
        step(**kwargs)

    def guard(self, *_: Any) -> None:
        """Hook of the optimizers, right before their step."""
        if self.noted is None:
            return
        event = self.noted[2]
        if event is None or event.query():
            self.check()
            return
        broken = ~self.finite.all()
        for grad in self.grads:
            grad.masked_fill_(broken, 0)
        self.grads = []  # which would stay in memory

    def check(self) -> None:
        """Raise a SetupError if the gradients of the last step were not finite; on a GPU, wait for them."""
        if self.noted is None:
            return
        (names, finite, event), self.noted, self.grads = self.noted, None, []
        if event is not None:
            event.synchronize()
        if finite.all():
            return
        broken = [name for name, ok in zip(names, finite.tolist()) if not ok]
        # A gradient that is not finite makes those of all layers before it so
        raise SetupError(
            f'The gradient of {broken[-1]} is not finite, nor that of {len(broken) - 1} other tensors, though the loss is',
            'The last checkpoint is intact: continue from it (--resume) with a smaller learning rate or alpha, or take out '
            'what has no finite derivative there')


def _terms(losses: Dict[str, Any]) -> List[Tuple[str, Tensor]]:
    """Name and tensor of every loss that a model returned."""
    return [(name, term) for name, value in losses.items() if 'loss' in name
            for term in ([value] if isinstance(value, Tensor) else value)]


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


def _wrappers(optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> List[OptimWrapper]:
    return [optim_wrapper] if isinstance(optim_wrapper, OptimWrapper) else list(optim_wrapper.values())


def _optimizers(optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> List[Optimizer]:
    return [wrapper.optimizer for wrapper in _wrappers(optim_wrapper)]


def _devices(tensors: Sequence[Tensor]) -> List[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})
