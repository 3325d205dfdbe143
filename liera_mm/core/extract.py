"""The way back: from weights that were trained or merged to the adapter that comes nearest to them."""
import copy
from typing import Dict, Iterator, List, NamedTuple

import torch
from torch import Tensor, nn

from .adapted import adapted_layers, adapter_names, refuse_off
from .adapters import frozen_names
from .group import INVERSES, MULTIPLICATIVE
from .layers import AdaptedLayer
from .merging import unmerge
from .wrappers import plain_names, through_wrappers


class Fit(NamedTuple):
    """How near an adapter comes to one tensor of other weights, in Euclidean norms.

    Attributes:
        name: Of the tensor.
        change: ``‖W' - W‖``: from the frozen tensor to the other.
        left: ``‖W' - effective weight‖``: from the adapter's to the other.
    """
    name: str
    change: float
    left: float

    @property
    def residual(self) -> float:
        """Share of the change that is left: 0 where the adapter has it all, 1 where it has nothing."""
        return self.left / self.change if self.change else 0.


@through_wrappers
def extract(model: nn.Module, weights: Dict[str, Tensor], steps: int = 200) -> List[Fit]:
    """Give an adapted model the perturbations that bring it nearest to other weights.

    Each perturbation begins at the one of its kind that is nearest to the Δ between the two weights (with low-rank factors,
    at its leading singular triplets), found where that is well conditioned. L-BFGS minimises ``‖W' - effective weight‖``
    from there, in float64. With ``additive`` and ``lora`` the beginning is the best there is. ``dora`` begins at two, for
    from one alone it often ends in a minimum that is not the least.

    Args:
        model: The adapted model, with its base weights in place.
        weights: A plain state dict with the keys that the model had before it was adapted.
        steps: Steps of L-BFGS for each layer, at most.

    Returns:
        A :class:`Fit` for every adapted layer, and for every frozen tensor that differs and that nothing can bring nearer.

    Raises:
        ValueError: If ``weights`` lacks a tensor, or has one of another shape or with values that are not finite.
    """
    refuse_off(model)
    unmerge(model)
    ours = model.state_dict()
    theirs, weights = {}, plain_names(weights, ours)
    adapters = adapter_names(model)
    for name, tensor in ours.items():
        if name in adapters:
            continue
        if name not in weights:
            raise ValueError(f'the weights lack {name}')
        if weights[name].squeeze().shape != tensor.squeeze().shape:  # Linear and 1x1 forms of one layer are the same
            raise ValueError(f'the shape of {name} is {tuple(weights[name].shape)} in the weights, {tuple(tensor.shape)} in '
                             'this model')
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f'{name} has values that are not finite in the weights')
        theirs[name] = weights[name].to(tensor).reshape(tensor.shape)
    fits, fitted, frozen = [], set(), frozen_names(model)
    for name, layer in adapted_layers(model):
        name = f'{name}.weight' if name else 'weight'
        fit_layer(layer, theirs[name], steps)
        fitted.add(name)
        fits.append(_fit(name, layer.frozen_weight, theirs[name], layer.effective_weight()))
    for name in theirs.keys() - fitted:
        if name not in frozen:
            ours[name].copy_(theirs[name])
        elif not torch.equal(ours[name], theirs[name]):
            fits.append(_fit(name, ours[name], theirs[name], ours[name]))
    return fits


def fit_layer(layer: AdaptedLayer, target: Tensor, steps: int) -> None:
    """Set the adapter of one layer such that its effective weight is as near to ``target`` as it can be.

    One that is as near already stays as it is.
    """
    # Rounding would drown small changes, and torch's L-BFGS takes no gradients in channels-last format
    exact = copy.deepcopy(layer).to(torch.float64, memory_format=torch.contiguous_format)
    target = target.double()
    best, found = _left(layer, target), copy.deepcopy(layer.adapter.state_dict())
    for parameters in _candidates(exact, target, steps):
        with torch.no_grad():
            for ours, theirs in zip(layer.adapter.parameters(), parameters):
                ours.copy_(theirs)
        if (left := _left(layer, target)) < best:
            best, found = left, copy.deepcopy(layer.adapter.state_dict())
    layer.adapter.load_state_dict(found)


def _candidates(layer: AdaptedLayer, target: Tensor, steps: int) -> Iterator[Iterator[nn.Parameter]]:
    """The trained tensors at each beginning, and after the descent from it, which in less precision can be further off."""
    weight, adapter = layer.frozen_weight.detach(), layer.adapter
    for start in adapter.starts(weight, target):
        _project(layer, start, target)
        yield adapter.parameters()
        if not adapter.unrestricted and not torch.equal(weight, target):
            _descend(layer, target, steps)
            yield adapter.parameters()


@torch.no_grad()
def _left(layer: AdaptedLayer, target: Tensor) -> float:
    return (layer.effective_weight() - target).norm().nan_to_num(torch.inf, torch.inf).item()


@torch.no_grad()
def _project(layer: AdaptedLayer, start: Tensor, target: Tensor) -> None:
    """Begin at the Δ of the kind that is nearest to the one that leads to ``start``, and through it to the target."""
    weight = layer.frozen_weight
    delta = INVERSES[layer.update](weight, start)
    if layer.update in MULTIPLICATIVE and not layer.adapter.unrestricted:
        # Near zero where the weight is: there a large Δ would gain little
        delta = delta * weight.square() / (weight.square() + weight.square().mean())
    layer.adapter.project(delta, target)


def _descend(layer: AdaptedLayer, target: Tensor, steps: int) -> None:
    change = (target - layer.frozen_weight).norm()
    optimizer = torch.optim.LBFGS(layer.adapter.parameters(), max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-12,
                                  history_size=20, line_search_fn='strong_wolfe')
    far = torch.full_like(change, torch.finfo(torch.float32).max)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = ((layer.effective_weight() - target) / change).square().sum()
        if value < far:
            value.backward()
            return value
        return far  # where exp overflows, torch's line search would go on with NaN

    optimizer.step(loss)


def _fit(name: str, before: Tensor, target: Tensor, after: Tensor) -> Fit:
    before, target, after = (tensor.detach().double() for tensor in (before, target, after))
    return Fit(name, (target - before).norm().item(), (target - after).norm().item())
