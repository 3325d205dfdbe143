"""The adapter of a model: which tensors it is, and several of them on one base, of which one is active."""
import contextlib
import copy
import functools
import math
import numbers
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from .adapted import adapted_layers, intended_parameters, trained_in_place
from .group import UPDATES
from .layers import AdaptedLayer
from .text import some
from .wrappers import refuse_shards, through_wrappers, unwrap


class Adapter(NamedTuple):
    """All that changes when another adapter becomes active.

    Attributes:
        tensors: Those of :func:`adapter_state_dict`, by name.
        settings: What the model's ``liera`` is: the arguments of :func:`liera_mm.adapt`.
        scales: Rank (None if it has none) and scale of the Δ of every adapted layer, by name.
    """
    tensors: Dict[str, Tensor]
    settings: Dict[str, Any]
    scales: Dict[str, Tuple[Optional[int], float]]


@functools.partial(through_wrappers, does='reads')
def adapter_state_dict(model: nn.Module) -> Dict[str, Tensor]:
    """The part of ``model.state_dict()`` that is not frozen: factors, other trained tensors, buffers."""
    frozen = frozen_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def frozen_names(model: nn.Module) -> Set[str]:
    """Names of the parameters that an adapted model is not meant to train."""
    trained = intended_parameters(model)
    frozen = {id(parameter) for name, parameter in model.named_parameters() if name not in trained}
    # A layer can be in the model under several names
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in frozen}


@functools.partial(through_wrappers, does='looks')
def active_adapter(model: nn.Module) -> str:
    """Name of the adapter that the model computes with; the one that it was adapted with is ``default``."""
    return vars(model).get('active_adapter', 'default')


@through_wrappers
def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Compute with another of the adapters that :func:`liera_mm.load_adapter` has loaded, or :func:`combine` has made.

    Nothing is copied: parameters stay the objects that they are and exchange their memory, and with it their shape where
    the adapters are of different rank. So call ``backward()`` before, or when the adapter of the forward pass is back, as it
    is after a reference was computed with another: else the gradients are those of the other's numbers. A model that is
    merged is merged again, with the new adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If no adapter of that name is loaded; names those that are.
    """
    intended_parameters(model)  # which refuses a model that is not adapted
    _check_loaded(model, name)
    if name != active_adapter(model):
        with _unfolded(model):
            _exchange(model, name, _parked(model)[name])
    return model


def loaded_adapters(model: nn.Module) -> List[Adapter]:
    """The active adapter, and those that are parked."""
    return [_current(model), *_parked(model).values()]


@torch.inference_mode(False)  # a copy made in it could never train
def start_adapter(model: nn.Module, name: str, like: Adapter) -> None:
    """Make an adapter of that name the active one, with memory of its own; it begins as a copy of another.

    The active one stays as it is, if it has the name and the settings.
    """
    if name != active_adapter(model) or like.settings != model.liera:
        with _unfolded(model):
            _exchange(model, name, like._replace(tensors={key: t.clone() for key, t in like.tensors.items()}))


@through_wrappers
@torch.no_grad()
def combine(model: nn.Module, weights: Mapping[str, float], name: str) -> nn.Module:
    """Make an adapter whose Δ is a weighted sum of those of others, Σ w · Δ, in every layer; it becomes the active one.

    A sum in the Lie algebra: under ``exp`` a product in the group, ``W ⊙ exp(Δ₁)^w₁ ⊙ exp(Δ₂)^w₂ ⊙ ...``. It is exact:
    low-rank factors stand side by side, so that the rank of the new adapter is the sum of theirs (its settings say so,
    and its file loads into a model that was adapted with these). The magnitudes of ``dora`` are such that each output
    channel is scaled by the product of its scales, to the power of w. Trained norms and biases, and statistics of batch
    norms, are weighted sums, for which the weights have to sum to 1 where the adapters differ in them.

    Args:
        model: The adapted model.
        weights: Weight of each adapter, by name: ``{'cats': .5, 'dogs': .5}``.
        name: What the new adapter is called. It may take the name of one that is there, which is replaced.

    Returns:
        The same model.

    Raises:
        ValueError: If no adapter of a name is loaded, a weight is no finite number, or there is no such sum.
    """
    intended_parameters(model)  # which refuses a model that is not adapted
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("weights must be a dict of adapters and their weights, as {'cats': .5, 'dogs': .5}, not "
                         f'{weights!r}')
    for part, weight in weights.items():
        _check_loaded(model, part)
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f'the weight of {part!r} must be a finite number, not {weight!r}')
    active = active_adapter(model)
    with _unfolded(model):
        parts, terms = [], {layer: [] for _, layer in adapted_layers(model)}
        for part, weight in weights.items():
            set_adapter(model, part)
            parts.append(_current(model))
            for layer, others in terms.items():
                others.append((weight, copy.deepcopy(layer.adapter)))
        set_adapter(model, active)
        _exchange(model, name, _combined(model, list(weights.values()), parts, terms))
    return model


def _combined(model: nn.Module, weights: Sequence[float], parts: Sequence[Adapter],
              terms: Dict[AdaptedLayer, List[Tuple[float, nn.Module]]]) -> Adapter:
    tensors, scales, sums = {}, {}, {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, AdaptedLayer):
            continue
        if layer not in sums:
            sums[layer] = copy.deepcopy(layer.adapter)
            try:
                move = functools.partial(UPDATES[layer.update], layer.frozen_weight)
                sums[layer].combine(terms[layer], move)
            except ValueError as error:
                raise ValueError(f'{name}: {error}') from None
        scales[name] = sums[layer].rank, sums[layer].scale
        tensors.update(sums[layer].state_dict(prefix=f'{name}.adapter.' if name else 'adapter.'))
    for name in parts[0].tensors.keys() - tensors.keys():
        tensors[name] = _weighted(name, weights, [part.tensors[name] for part in parts])
    settings = [part.settings for part in parts]
    ranked = any(rank for rank, _ in scales.values())
    return Adapter(tensors, _summed(settings) if ranked else settings[0], scales)


def _weighted(name: str, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, tensor) for tensor in tensors):
        return first.clone()
    if not first.is_floating_point():  # the number of batches that a norm has seen
        return torch.stack(list(tensors)).amax(0)
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f'the weights sum to {sum(weights):g}, which has to be 1: {name} differs between the adapters, and '
                         'what it was before they were trained is not kept')
    result = sum(weight * tensor.double() for weight, tensor in zip(weights, tensors)).to(first.dtype)
    if name.endswith('running_var') and (result < 0).any():
        raise ValueError(f'with these weights {name} would be negative, which a variance cannot be')
    return result


def _summed(settings: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """The settings of factors that stand side by side: ranks add up, and so does alpha, which leaves alpha / rank."""
    added = 'rank', 'kernel_rank', 'alpha'

    def sums(dicts: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
        return {**dicts[0], **{key: sum(each[key] for each in dicts) for key in added if key in dicts[0]}}

    return dict(sums(settings), overrides=[sums(overrides) for overrides in zip(*(each['overrides'] for each in settings))])


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model computes with its frozen weights alone; afterwards it is as it was, bit for bit.

    Adapters that are loaded, exchanged, merged or unmerged in it are so from its end on.

    Raises:
        ValueError: If norms, biases or whole layers train too, for what they were before is not kept.
    """
    refuse_shards(model)
    wrapper, model = model, unwrap(model)
    trained = trained_in_place(model)  # which refuses a model that is not adapted
    if trained:
        raise ValueError('the adapters cannot be switched off: norms or biases of this model were trained in place, or '
                         f'layers whole ({some(trained)}), and what they were before is not kept')
    layers = [layer for _, layer in adapted_layers(model) if layer.merge_later is None]  # not off already
    for layer in layers:
        layer.switch_off()
    try:
        yield wrapper
    finally:
        for layer in layers:
            layer.switch_on()


def _check_loaded(model: nn.Module, name: str) -> None:
    loaded = {active_adapter(model), *_parked(model)}
    if name not in loaded:
        raise ValueError(f'no adapter {name!r} is loaded; there are {", ".join(sorted(loaded))}')


def _parked(model: nn.Module) -> Dict[str, Adapter]:
    """The adapters that are not active, by name; not part of the model's state."""
    return vars(model).setdefault('parked_adapters', {})


def _current(model: nn.Module) -> Adapter:
    """The active adapter; its tensors are those of the model."""
    tensors = {name: tensor.data for name, tensor in adapter_state_dict(model).items()}
    scales = {name: (layer.adapter.rank, layer.adapter.scale)
              for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, AdaptedLayer)}
    return Adapter(tensors, model.liera, scales)


@torch.inference_mode(False)  # a copy made in it could never train
def _exchange(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Make an adapter the active one, under that name, and park the one that was."""
    frozen = frozen_names(model)
    _parked(model)[active_adapter(model)] = _current(model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key not in frozen:
            new = adapter.tensors[key].to(tensor.device, tensor.dtype)  # a model may have moved since
            if tensor.shape != new.shape:
                tensor.grad = None
                # Another type makes autograd forget the shape, of which a graph that is still alive keeps it in mind
                tensor.data = torch.empty((), dtype=torch.complex64, device=tensor.device)
            tensor.data = new
    for layer_name, (rank, scale) in adapter.scales.items():
        layer = model.get_submodule(layer_name)
        layer.adapter.rank, layer.adapter.scale = rank, scale
    model.liera, model.active_adapter = adapter.settings, name
    _parked(model).pop(name, None)


@contextlib.contextmanager
def _unfolded(model: nn.Module) -> Iterator[None]:
    """A context in which no layer has a Δ in its weight; layers whose adapters are off are left alone."""
    folded = [layer for _, layer in adapted_layers(model) if layer.merged and layer.merge_later is None]
    for layer in folded:
        layer.unmerge()
    try:
        yield
    finally:
        for layer in folded:
            layer.merge()
