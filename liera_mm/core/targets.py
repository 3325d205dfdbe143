"""Which layers and parameters of a model are meant: by their kind, or by patterns on their names."""
import fnmatch
import functools
import re
from typing import Any, Dict, List, Optional, Pattern, Sequence, Set

import torch
from torch import nn

from .text import nearest

KINDS = ('conv', 'depthwise', 'pointwise', 'linear')
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def layer_kind(layer: nn.Module) -> Optional[str]:
    """``linear``, ``pointwise`` (every kernel dimension 1), ``depthwise`` (one channel a group), ``conv`` or None.

    Classes other than torch's are known by what they have in common with them: a kernel and ``kernel_size`` or
    ``out_channels``, or a matrix and ``out_features`` (``nf`` in transformers' ``Conv1D``).
    """
    if isinstance(layer, nn.Linear):
        return 'linear'
    if isinstance(layer, nn.modules.conv._ConvNd):
        kernel = layer.kernel_size
    else:
        dims, has = _weight_dims(layer), functools.partial(hasattr, layer)
        if dims >= 2 and (has('out_features') or has('nf')):
            return 'linear'
        if dims < 3 or not (has('kernel_size') or has('out_channels')):
            return None
        kernel = layer._parameters['weight'].shape[2:]
    if all(k == 1 for k in kernel):
        return 'pointwise'
    return 'depthwise' if getattr(layer, 'groups', 1) == getattr(layer, 'in_channels', None) != 1 else 'conv'


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, ConvNeXt-V2's global response normalisation included."""
    return isinstance(module, NORMS) or type(module).__name__ == 'GRN'


def match_layers(layers: Dict[str, nn.Module], targets: Sequence[str]) -> List[str]:
    """Names of the layers that any of the targets selects, in the model's order; of a layer with several, the first.

    Raises:
        ValueError: If one of the targets selects none.
    """
    _check_list('targets', targets)
    if not targets:
        raise ValueError(f'no targets: name layer kinds ({", ".join(KINDS)}), globs or re: patterns')
    matched = set()
    for target in targets:
        if target in KINDS:
            names = [name for name, layer in layers.items() if layer_kind(layer) == target]
            # The default asks for all kinds, and few models have them all.
            if not names and set(targets) >= set(KINDS):
                continue
        else:
            pattern = _pattern(target)
            names = [name for name, layer in layers.items() if pattern.fullmatch(name) and _holds_kernel(layer)]
        if not names:
            known = [name for name, layer in layers.items() if name and _holds_kernel(layer)]
            parents = {name[:i] for name in known for i, letter in enumerate(name) if letter == '.'}
            kinds = {layer_kind(layers[name]) for name in known} - {None}
            choices = [*sorted(kinds), *known, *(f'{name}.*' for name in sorted(parents))]
            raise ValueError(f'target {target!r} matches no layer{nearest(target, choices)}')
        matched.update(names)
    if not matched:
        raise ValueError('the model has no convolution and no linear layer to adapt')
    first: Dict[nn.Module, str] = {}
    for name, layer in layers.items():
        first.setdefault(layer, name)
    selected = {layers[name] for name in matched}
    return [name for layer, name in first.items() if layer in selected]


def layers_by_name(layers: Dict[str, nn.Module], targets: Sequence[str]) -> Set[str]:
    patterns = [target for target in targets if target not in KINDS]
    return set(match_layers(layers, patterns)) if patterns else set()


def select(model: nn.Module, option: str, patterns: Sequence[str]) -> Set[str]:
    """Names of the modules and parameters that any of the patterns matches, and of all in them; all that each has.

    Args:
        model: The model.
        option: What the patterns are for, to say so in an error.
        patterns: Layer kinds, globs or ``re:`` patterns.

    Raises:
        ValueError: If one of the patterns matches none.
    """
    _check_list(option, patterns)
    layers = dict(model.named_modules(remove_duplicate=False))
    names = {**layers, **dict(model.named_parameters(remove_duplicate=False))}
    matched = set()
    for pattern in patterns:
        compiled = _pattern(pattern)
        found = [name for name in names if (layer_kind(layers[name]) == pattern if pattern in KINDS and name in layers
                                            else compiled.fullmatch(name))]
        if not found:
            raise ValueError(f'{option} {pattern!r} matches nothing in the model{nearest(pattern, [*KINDS, *names])}')
        matched.update(found)
    selected = {id(part) for name, part in names.items() if name in matched or '' in matched
                or any(name[:i] in matched for i, letter in enumerate(name) if letter == '.')}
    return {name for name, part in names.items() if id(part) in selected}


def _check_list(option: str, patterns: Any) -> None:
    if isinstance(patterns, str):
        raise ValueError(f'{option} must be a list, for instance [{patterns!r}]')
    if not isinstance(patterns, (list, tuple)):
        raise ValueError(f'{option} must be a list of layer kinds, globs or re: patterns, not {patterns!r}')


def _pattern(target: Any) -> Pattern[str]:
    try:
        # A name is meant also where it is no glob of itself, such as a[0]
        return re.compile(target[3:] if target.startswith('re:') else f'{re.escape(target)}|{fnmatch.translate(target)}')
    except (AttributeError, re.error) as error:
        raise ValueError(f'target {target!r} is no layer kind, glob or re: pattern: {error}') from None


def _holds_kernel(layer: nn.Module) -> bool:
    """Whether a layer is one that can be adapted, or one that must be refused by name: it has a kernel of its own."""
    return layer_kind(layer) is not None or (_weight_dims(layer) >= 3 and not is_norm(layer))


def _weight_dims(layer: nn.Module) -> int:
    weight = None if isinstance(layer, torch.jit.ScriptModule) else layer._parameters.get('weight')
    return 0 if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else weight.dim()
