"""Watches of a training: its losses and its gradients are looked at before a weight has moved by them."""
import contextlib
import functools
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from mmengine.dist import is_distributed
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.adapted import adapted_layers
from ..core.errors import SetupError
from ..core.report import range_report
from ..core.wrappers import in_shards
from .sharding import local


class LossWatch:
    """Stops a training whose loss is not finite before a weight has moved by it, and names the layer.

    The loss is looked at just before the optimizer's step; or before the next forward pass, if there was no step, as when
    gradients are accumulated. By then it is long known: the host does not wait for the device.
    """

    def __init__(self, model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict]):
        self.noted: Optional[Tuple[Any, ...]] = None
        self.handles = [model.register_forward_pre_hook(self.check),
                        model.register_forward_hook(self.note, with_kwargs=True)]
        self.handles += [optimizer.register_step_pre_hook(self.check) for optimizer in optimizers(optim_wrapper)]
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
        self.wrappers = [wrapper for wrapper in wrappers(optim_wrapper)
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


def not_finite(model: nn.Module) -> List[str]:
    return [name for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and not local(tensor).isfinite().all()]


def wrappers(optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> List[OptimWrapper]:
    return [optim_wrapper] if isinstance(optim_wrapper, OptimWrapper) else list(optim_wrapper.values())


def optimizers(optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> List[Optimizer]:
    return [wrapper.optimizer for wrapper in wrappers(optim_wrapper)]


def _terms(losses: Dict[str, Any]) -> List[Tuple[str, Tensor]]:
    """Name and tensor of every loss that a model returned."""
    return [(name, term) for name, value in losses.items() if 'loss' in name
            for term in ([value] if isinstance(value, Tensor) else value)]


@torch.no_grad()
def _where(model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> str:
    """What is the first not to be finite: a weight, an effective weight, or the output of a layer."""
    broken = not_finite(model)
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


def _devices(tensors: Sequence[Tensor]) -> List[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})
