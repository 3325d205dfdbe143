"""The way back: from weights that were trained or merged to the adapter that comes nearest to them."""
import copy
import math
from typing import Dict, List, NamedTuple

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
    """Set the adapter of one layer such that its effective weight is as near to ``target`` as it can be."""
    exact = copy.deepcopy(layer).double()  # rounding would drown small changes
    weight, target, adapter = exact.frozen_weight.detach(), target.double(), exact.adapter
    best, found = math.inf, None
    for start in adapter.starts(weight, target):
        _project(exact, start, target)
        if not adapter.unrestricted and not torch.equal(weight, target):
            _descend(exact, target, steps)
        with torch.no_grad():
            for ours, theirs in zip(layer.adapter.parameters(), adapter.parameters()):
                ours.copy_(theirs)
            left = (layer.effective_weight() - target).norm().item()
        if found is None or left < best:
            best, found = left, copy.deepcopy(layer.adapter.state_dict())
    layer.adapter.load_state_dict(found)


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

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = ((layer.effective_weight() - target) / change).square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def _fit(name: str, before: Tensor, target: Tensor, after: Tensor) -> Fit:
    before, target, after = (tensor.detach().double() for tensor in (before, target, after))
    return Fit(name, (target - before).norm().item(), (target - after).norm().item())
