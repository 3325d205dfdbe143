"""The adapter of a model: which tensors it is, and several of them on one base, of which one is active."""
import contextlib
from typing import Dict, Iterator, Set

from torch import Tensor, nn

from .adapt import adapted_layers, intended_parameters, some, trained_in_place, unmerge


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


def active_adapter(model: nn.Module) -> str:
    """Name of the adapter that the model computes with; the one that it was adapted with is ``default``."""
    return vars(model).get('active_adapter', 'default')


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Compute with another of the adapters that :func:`liera_mm.load_adapter` has loaded.

    Nothing is copied: parameters stay the objects that they are and exchange their memory. A model that is merged is
    merged again, with the new adapter.

    Returns:
        The same model.

    Raises:
        ValueError: If no adapter of that name is loaded; names those that are.
    """
    intended_parameters(model)  # which refuses a model that is not adapted
    active, parked = active_adapter(model), _parked(model)
    if name != active and name not in parked:
        raise ValueError(f'no adapter {name!r} is loaded; there are {", ".join(sorted({active, *parked}))}')
    if name != active:
        with _unfolded(model):
            _exchange(model, name, parked.pop(name))
    return model


def start_adapter(model: nn.Module, name: str) -> None:
    """Make an adapter of that name the active one, with memory of its own; it begins as a copy of the one before."""
    if name != active_adapter(model):
        with _unfolded(model):
            _parked(model).pop(name, None)
            _exchange(model, name, {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()})


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model computes with its frozen weights alone; afterwards it is as it was, bit for bit.

    Raises:
        ValueError: If norms, biases or whole layers train too, for what they were before is not kept.
    """
    trained = trained_in_place(model)  # which refuses a model that is not adapted
    if trained:
        raise ValueError('the adapters cannot be switched off: norms or biases of this model were trained in place, or '
                         f'layers whole ({some(trained)}), and what they were before is not kept')
    with _unfolded(model):
        for _, layer in adapted_layers(model):
            layer.unmerged_weight = layer.weight.data  # as if merged, with Δ = 0
        try:
            yield model
        finally:
            unmerge(model)


def _parked(model: nn.Module) -> Dict[str, Dict[str, Tensor]]:
    """The tensors of the adapters that are not active, by name; not part of the model's state."""
    return vars(model).setdefault('parked_adapters', {})


def _exchange(model: nn.Module, name: str, tensors: Dict[str, Tensor]) -> None:
    frozen = frozen_names(model)
    ours = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if key not in frozen}
    _parked(model)[active_adapter(model)] = {key: tensor.data for key, tensor in ours.items()}
    for key, tensor in ours.items():
        tensor.data = tensors[key].to(tensor.device, tensor.dtype)  # a model may have moved since
    model.active_adapter = name


@contextlib.contextmanager
def _unfolded(model: nn.Module) -> Iterator[None]:
    """A context in which no layer has a Δ in its weight; layers whose adapters are off are left alone."""
    folded = [layer for _, layer in adapted_layers(model)
              if layer.merged and layer.weight.data_ptr() != layer.unmerged_weight.data_ptr()]
    for layer in folded:
        layer.unmerge()
    try:
        yield
    finally:
        for layer in folded:
            layer.merge()
