"""What an adapted model has: its adapted layers, what of it trains, and what it had before."""
import contextlib
from typing import Iterator, Set, Tuple

from torch import nn

from .errors import SetupError
from .layers import AdaptedLayer
from .targets import layers_by_name


def adapted_layers(model: nn.Module) -> Iterator[Tuple[str, AdaptedLayer]]:
    """Name and layer of every adapted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLayer))


def intended_parameters(model: nn.Module) -> Set[str]:
    """Names of the parameters that an adapted model is meant to train: adapters, and what :func:`trained_in_place` has."""
    names = trained_in_place(model)
    for prefix, layer in adapted_layers(model):
        names.update(tensor_name(prefix, f'adapter.{name}') for name, _ in layer.adapter.named_parameters())
    return names


def named_layers(model: nn.Module) -> Set[str]:
    """Names of the layers that a target of an adapted model names, rather than their kind."""
    return layers_by_name(dict(model.named_modules(remove_duplicate=False)), model.liera['targets'])


def trained_in_place(model: nn.Module) -> Set[str]:
    """Names of the parameters of an adapted model that train themselves: norms, biases, and layers that train whole.

    Raises:
        ValueError: If the model is not adapted.
    """
    if not hasattr(model, 'liera'):
        raise ValueError('this model is not adapted: call adapt() on it first, or give the part of it that is')
    return set(model.trained_in_place)


def adapter_names(model: nn.Module) -> Set[str]:
    """Names of the adapters' tensors in the model's state dict, trained or not."""
    return {tensor_name(prefix, f'adapter.{name}') for prefix, layer in model.named_modules(remove_duplicate=False)
            if isinstance(layer, AdaptedLayer) and 'adapter' in layer._modules for name in layer.adapter.state_dict()}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which the model has the parameters that it had before :func:`adapt`, to load or initialise them.

    Perturbations that have not been trained start from the weights that the model has afterwards.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    untrained = [layer.untrained for layer in layers]
    adapters = [layer._modules.pop('adapter') for layer in layers]
    try:
        yield model
    finally:
        for layer, adapter, start in zip(layers, adapters, untrained):
            layer._modules['adapter'] = adapter
            if start:
                layer.start_anew()


def refuse_off(model: nn.Module) -> None:
    """Raise a SetupError inside of :func:`liera_mm.adapters_off`."""
    if any(layer.merge_later is not None for _, layer in adapted_layers(model)):
        raise SetupError('The adapters are off (adapters_off), and this needs the weights that they give.',
                         'Do it after the with-block')


def tensor_name(prefix: str, leaf: str = 'weight') -> str:
    return f'{prefix}.{leaf}' if prefix else leaf
