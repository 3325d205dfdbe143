"""Folding Δ into the weights, for a while or for good."""
import functools
from typing import Dict

import torch
from torch import Tensor, nn

from .adapted import adapted_layers, refuse_off
from .layers import AdaptedLayer, restore_class
from .wrappers import refuse_shards, through_wrappers


@through_wrappers
def merge(model: nn.Module) -> nn.Module:
    """Fold every Δ into its weight, in place: the forward pass costs what it did before :func:`adapt`.

    Between a forward pass and its ``backward()``, :func:`unmerge` has to follow: else gradients are of the merged weight.
    """
    for _, layer in adapted_layers(model):
        layer.merge()
    return model


@functools.partial(through_wrappers, does='looks')
def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`, bit for bit."""
    merged = [layer for _, layer in adapted_layers(model) if layer.merged]
    if merged:
        refuse_shards(model)
    for layer in merged:
        layer.unmerge()
    return model


@through_wrappers
@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Fold every Δ into its weight for good, and make the model one that this package has never seen, in place.

    Layers and backbones have their original classes, attributes and state-dict keys, so that code which reads weights
    (``switch_to_deploy``, ``fuse_conv_bn``, quantisation) and pickles without this package work. Other adapters that were
    loaded are gone. What was frozen stays frozen, as with PEFT: ``model.requires_grad_()`` trains it all.

    Returns:
        The same model; with its wrappers (``torch.compile`` and the like), if it has any.

    Raises:
        SetupError: Inside of :func:`liera_mm.adapters_off`.
    """
    refuse_off(model)
    for _, layer in adapted_layers(model):
        layer._parameters['weight'].data = layer.effective_weight()
    for module in model.modules():
        for name in ('liera', 'trained_in_place', 'active_adapter', 'parked_adapters'):
            vars(module).pop(name, None)
        restore_class(module)
    return model


@functools.partial(through_wrappers, does='reads')
@torch.no_grad()
def export(model: nn.Module) -> Dict[str, Tensor]:
    """A plain state dict with Δ folded in: the keys and shapes that the model had before :func:`adapt`."""
    state = model.state_dict()
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, AdaptedLayer):
            continue
        prefix = prefix and prefix + '.'
        for name in layer.adapter.state_dict():
            del state[f'{prefix}adapter.{name}']
        state[f'{prefix}weight'] = layer.effective_weight().detach()
    return state
