"""Adapting a model: which layers, freezing, summary, merging, export. Works on any ``nn.Module``."""
import collections
import contextlib
import difflib
import fnmatch
import functools
import logging
import re
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Pattern,
    Sequence,
    Set,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn

from .algebra import METHODS
from .group import MULTIPLICATIVE, UPDATES
from .layers import AdaptedLayer, adapt_layer, check_layer, restore_class
from .wrappers import refuse_shards, through_wrappers

KINDS = ('conv', 'depthwise', 'pointwise', 'linear')
SCALES = ('relative', 'plain')
# What settings were before they existed, for files from then
BEFORE = dict(scale='plain')
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
logger = logging.getLogger('liera_mm')


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


@functools.partial(through_wrappers, does='adds')
def adapt(model: nn.Module,
          rank: int = 16,
          alpha: float = 32,
          method: str = 'lora',
          update: str = 'taylor',
          scale: str = 'relative',
          targets: Sequence[str] = KINDS,
          overrides: Sequence[Dict[str, Any]] = (),
          train_norm: bool = False,
          train_bias: Union[bool, str] = False,
          exclude: Sequence[str] = (),
          train: Sequence[str] = (),
          kernel_rank: int = 2) -> nn.Module:
    """Freeze a model and give its layers trainable perturbations, in place.

    State-dict keys, parameter names and module paths stay; every adapted layer gains ``<layer>.adapter.<name>``. The
    model's output does not change until the adapters train.

    Args:
        model: Any module; for a detector, its backbone.
        rank: Rank r of the low-rank factors, at least 1; of ``tucker``, that of the channels; of ``atom``, the number of
            atoms.
        alpha: Numerator of the scale alpha / rank of Δ.
        method: How Δ is parameterised: ``lora``, ``pissa``, ``milora`` or ``dora`` (low-rank factors), ``tucker`` (FLoRA: a
            core, and a factor for each dimension of the weight), ``atom`` (a few filters, of which every kernel is a fixed
            combination; ``atom-pissa``: one that trains), or ``dense``. See docs/methods.md.
        update: How Δ moves the weight: ``taylor`` (LieRA, Eq. 8), ``exp`` (Eq. 5) or ``additive`` (LoRA, Eq. 2).
        scale: ``relative`` divides Δ by the root mean square of the layer's frozen weight under the multiplicative updates:
            then the same alpha and learning rate move a weight as far as they do under ``additive``, where the setting
            changes nothing. ``plain`` is the paper's form, without that.
        targets: Which layers to adapt: layer kinds (``conv``, ``depthwise``, ``pointwise``, ``linear``; one layer is of one
            kind, see :func:`layer_kind`), globs on module names (``stages.3.*``; ``*`` crosses dots), or regular
            expressions that match whole module names (``re:stages\\.[23]\\..*``). Of a kind, layers that cannot be adapted
            are left out, and layers whose weight is all zeros, which have nothing to perturb, train whole: a line of the
            log says so. A layer that a glob or a regular expression names is refused instead. Empty if only norms, all
            biases or what ``train`` names are to train.
        overrides: Settings of some of those layers: dicts of ``targets`` and any of ``rank``, ``alpha``, ``method``,
            ``update``, ``scale``, ``kernel_rank``. Where several match, the last wins.
        train_norm: Train the parameters of normalisation layers too.
        train_bias: Train the biases of the adapted layers too; ``'all'``: every bias of the model, those of norms included,
            which without targets is BitFit.
        exclude: What stays as it is, whatever else says that it trains: kinds, globs or ``re:`` patterns as in
            ``targets``, on the names of modules, with everything in them, and of parameters (``*.norm1``, ``*.bias``).
        train: What trains whole instead of being adapted: such as ``exclude`` takes (``stem``, ``*.context``). Adapter
            files and checkpoints hold it.
        kernel_rank: Of ``tucker``, rank of each dimension of the kernel, at least 1.

    Returns:
        The same model.

    Raises:
        ValueError: If a setting is unknown or out of range, if targets match no layer, if a weight is not finite, or if
            the model is adapted already. A rank above a layer's dimensions is none: its Δ then has full rank.
        TypeError: If a layer that is named computes with a weight that cannot be perturbed; or if there is no other.
    """
    if any(isinstance(m, AdaptedLayer) for m in model.modules()):
        raise ValueError('this model is adapted already: export() it first, or adapt a fresh one')
    settings = dict(rank=rank, alpha=alpha, method=method, update=update, scale=scale, kernel_rank=kernel_rank)
    _check_settings(settings)
    if train_bias not in (True, False, 'all'):
        raise ValueError(f"train_bias must be True, False or 'all', not {train_bias!r}")
    layers = dict(model.named_modules())
    _check_weights(model)
    excluded, whole = (select(model, option, patterns) for option, patterns in (('exclude', exclude), ('train', train)))
    no_targets = isinstance(targets, (list, tuple)) and not targets and (train_norm or train_bias == 'all' or train)
    matched = [name for name in ([] if no_targets else match_layers(layers, targets))
               if name not in excluded and _key(name) not in whole]
    named = _named(layers, targets)
    refused, zero = _refusals(model, matched), set()
    for name in matched:
        if name in refused and name in named:
            raise refused[name]
        if name not in refused and name not in named and _is_zero(layers[name]):
            zero.add(name)
    chosen = {name: dict(settings) for name in matched if name not in refused and name not in zero}
    if refused and not chosen:
        raise next(iter(refused.values()))
    for override in overrides:
        if not isinstance(override, Mapping):
            raise ValueError(f'overrides must be a list of dicts, not {overrides!r}')
        changes = {key: value for key, value in override.items() if key != 'targets'}
        for key in changes:
            check_choice('override', key, settings)
        _check_settings({**settings, **changes})
        for name in match_layers({name: layers[name] for name in chosen}, override.get('targets', ())):
            chosen[name].update(changes)
        if 'method' in changes:
            named |= _named(layers, override['targets'])
    for name in [name for name in matched if name in chosen or name in zero]:
        try:
            METHODS[chosen.get(name, settings)['method']].check(layers[name]._parameters['weight'].shape)
        except TypeError as error:
            refused[name] = _refusal(name, error)
            if name in named:
                raise refused[name] from None
            chosen.pop(name, None)
            zero.discard(name)
    if refused and not chosen:
        raise next(iter(refused.values()))

    in_place = whole | {_key(name, leaf) for name in zero for leaf in layers[name]._parameters}
    for name, layer in layers.items():
        if train_norm and is_norm(layer):
            in_place.update(_key(name, leaf) for leaf in layer._parameters)
        if train_bias == 'all' or train_bias and name in chosen:
            in_place.update(_key(name, leaf) for leaf in layer._parameters if leaf.endswith('bias'))
    in_place = [name for name, _ in model.named_parameters() if name in in_place - excluded]
    if not chosen and not in_place:
        raise ValueError('nothing would train: there is no convolution and no linear layer left to adapt, nor norms or '
                         'biases to train')
    model.trained_in_place = in_place
    for name, setting in chosen.items():
        adapt_layer(layers[name], **setting)
    used = {option for setting in chosen.values() for option in METHODS[setting['method']].options}
    model.liera = dict(
        {key: value for key, value in settings.items() if key != 'kernel_rank' or key in used},
        targets=list(targets),
        overrides=[dict(override) for override in overrides],
        train_norm=train_norm,
        train_bias=train_bias)
    # Only where they are given: files that were saved before these settings existed have none
    model.liera.update({key: list(value) for key, value in (('exclude', exclude), ('train', train)) if value})
    trainable = intended_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    if refused:
        logger.warning(f'LieRA  {_count(layers, refused)} cannot be adapted and stay as they are: {_first(refused)}')
    if zero:
        logger.info(f'LieRA  {_count(layers, zero)} have nothing but zeros for a weight, and train whole: {some(zero)}')
    return model


def match_layers(layers: Dict[str, nn.Module], targets: Sequence[str]) -> List[str]:
    """Names of the layers that any of the targets selects, in the model's order.

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
            raise ValueError(f'target {target!r} matches no layer{_nearest(target, choices)}')
        matched.update(names)
    if not matched:
        raise ValueError('the model has no convolution and no linear layer to adapt')
    return [name for name in layers if name in matched]


def _named(layers: Dict[str, nn.Module], targets: Sequence[str]) -> Set[str]:
    patterns = [target for target in targets if target not in KINDS]
    return set(match_layers(layers, patterns)) if patterns else set()


def select(model: nn.Module, option: str, patterns: Sequence[str]) -> Set[str]:
    """Names of the modules and parameters that any of the patterns matches, and of all in them.

    Args:
        model: The model.
        option: What the patterns are for, to say so in an error.
        patterns: Layer kinds, globs or ``re:`` patterns.

    Raises:
        ValueError: If one of the patterns matches none.
    """
    _check_list(option, patterns)
    layers = dict(model.named_modules(remove_duplicate=False))
    names = [*layers, *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    matched = set()
    for pattern in patterns:
        compiled = _pattern(pattern)
        found = [name for name in names if (layer_kind(layers[name]) == pattern if pattern in KINDS and name in layers
                                            else compiled.fullmatch(name))]
        if not found:
            raise ValueError(f'{option} {pattern!r} matches nothing in the model{_nearest(pattern, [*KINDS, *names])}')
        matched.update(found)
    return {name for name in names if name in matched or '' in matched
            or any(name[:i] in matched for i, letter in enumerate(name) if letter == '.')}


def intended_parameters(model: nn.Module) -> Set[str]:
    """Names of the parameters that an adapted model is meant to train: adapters, and what :func:`trained_in_place` has."""
    names = trained_in_place(model)
    for prefix, layer in adapted_layers(model):
        names.update(_key(prefix, f'adapter.{name}') for name, _ in layer.adapter.named_parameters())
    return names


def named_layers(model: nn.Module) -> Set[str]:
    """Names of the layers that a target of an adapted model names, rather than their kind."""
    return _named(dict(model.named_modules()), model.liera['targets'])


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
    return {_key(prefix, f'adapter.{name}') for prefix, layer in model.named_modules(remove_duplicate=False)
            if isinstance(layer, AdaptedLayer) and 'adapter' in layer._modules for name in layer.adapter.state_dict()}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, ConvNeXt-V2's global response normalisation included."""
    return isinstance(module, NORMS) or type(module).__name__ == 'GRN'


def scale_of(layer: AdaptedLayer) -> str:
    """What the Δ of a layer is measured in, one of ``SCALES``; ``-`` under ``additive``, where both are the same."""
    return '-' if layer.update not in MULTIPLICATIVE else 'plain' if layer.adapter.rms is None else 'relative'


class SummaryRow(NamedTuple):
    """One adapted layer: counts are numbers of parameters; for ``tucker``, the rank is that of each dimension."""
    layer: str
    kind: str
    shape: Tuple[int, ...]
    method: str
    update: str
    scale: str
    rank: Union[int, Tuple[int, ...], None]
    trainable: int
    frozen: int


class Summary(List[SummaryRow]):
    """The adapted layers of a model, a row each; ``str()`` of it is a table.

    Attributes:
        trainable (int): Trainable parameters of the whole model.
        total (int): All its parameters.
    """

    def __init__(self, rows: Sequence[SummaryRow], trainable: int, total: int):
        super().__init__(rows)
        self.trainable, self.total = trainable, total

    def __str__(self) -> str:
        cells = [SummaryRow._fields]
        for row in self:
            rank = sizes(row.rank) if isinstance(row.rank, tuple) else str(row.rank or '-')
            cells.append((row.layer, row.kind, sizes(row.shape), row.method, row.update, row.scale, rank,
                          f'{row.trainable:,}', f'{row.frozen:,}'))
        lines = table_lines(cells)
        adapters = sum(row.trainable for row in self)
        lines.append(f'{len(self)} adapted layers with {adapters:,} parameters; the whole model trains '
                     f'{self.trainable:,} of {self.total:,} ({self.trainable / max(self.total, 1):.1%})')
        return '\n'.join(lines)


def table_lines(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def sizes(shape: Sequence[int]) -> str:
    """A shape as text: ``6 x 4 x 3 x 3``."""
    return ' x '.join(map(str, shape))


def some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    names = sorted(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '') if names else 'nothing'


@functools.partial(through_wrappers, does='looks')
def summary(model: nn.Module) -> Summary:
    """What was adapted, and how many parameters train."""
    rows = []
    for name, layer in adapted_layers(model):
        trainable = sum(p.numel() for p in layer.adapter.parameters())
        frozen = sum(p.numel() for p in layer.parameters(recurse=False) if not p.requires_grad)
        rows.append(
            SummaryRow(name, layer_kind(layer) or 'conv', tuple(layer.frozen_weight.shape), layer.method, layer.update,
                       scale_of(layer), layer.adapter.core or layer.adapter.rank, trainable, frozen))
    parameters = list(model.parameters())
    return Summary(rows, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def adapted_layers(model: nn.Module) -> Iterator[Tuple[str, AdaptedLayer]]:
    """Name and layer of every adapted layer."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, AdaptedLayer))


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
                adapter.reset(layer.frozen_weight)


@through_wrappers
def merge(model: nn.Module) -> nn.Module:
    """Fold every Δ into its weight, in place: the forward pass costs what it did before :func:`adapt`."""
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
    """
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


def _check_settings(settings: Dict[str, Any]) -> None:
    check_choice('method', settings['method'], METHODS)
    check_choice('update', settings['update'], UPDATES)
    check_choice('scale', settings['scale'], SCALES)
    for name in ('rank', 'kernel_rank'):
        if isinstance(rank := settings[name], bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, not {rank!r}')
    alpha = settings['alpha']
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float('inf'):
        raise ValueError(f'alpha must be a positive number, not {alpha!r}')


def check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError, with the nearest of the choices, if a value is none of them."""
    if value not in list(choices):
        raise ValueError(f'unknown {what} {value!r}{_nearest(str(value), choices)}; known: {", ".join(choices)}')


def _check_weights(model: nn.Module) -> None:
    """Refuse a model with weights that do not exist yet; they cannot be frozen either."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            layer, _, leaf = name.rpartition('.')
            raise TypeError(f'{layer}: its {leaf} has no shape before the first forward pass; run one first')


def _refusals(model: nn.Module, names: Sequence[str]) -> Dict[str, Exception]:
    """Why layers cannot be adapted, by name; of those that can there is no entry.

    Raises:
        ValueError: If a weight is not finite.
    """
    owners: Dict[int, List[str]] = collections.defaultdict(list)
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(owner.rpartition('.')[0])
    refusals = {}
    for name in names:
        weight = model.get_submodule(name)._parameters.get('weight')
        if weight is not None and not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f'{name}: its weight has values that are not finite; adapt a model with intact weights')
        try:
            _check_layer(model, name, owners)
        except (TypeError, ValueError) as error:
            refusals[name] = _refusal(name, error)
    return refusals


def _refusal(name: str, error: Exception) -> Exception:
    return type(error)(f'{name}: {error}. Choose targets that leave it out')


def _check_layer(model: nn.Module, name: str, owners: Mapping[int, Sequence[str]]) -> None:
    """Raise a TypeError if a layer has no weight that can be perturbed, a ValueError if it is not the layer's alone."""
    layer = model.get_submodule(name)
    check_layer(layer)
    weight = layer._parameters['weight']
    shared = {id(model.get_submodule(owner)): owner for owner in sorted(owners[id(weight)], reverse=True)}
    if len(shared) > 1:
        raise ValueError(f'its weight is shared between {", ".join(sorted(shared.values()))}; a perturbation of one would '
                         'move all')


def _is_zero(layer: nn.Module) -> bool:
    weight = layer._parameters['weight']
    return not weight.is_meta and not weight.any()


def _count(layers: Dict[str, nn.Module], names: Iterable[str]) -> str:
    """Layers by kind: ``3 conv, 1 linear layers``."""
    kinds = collections.Counter(layer_kind(layers[name]) for name in names)
    return ', '.join(f'{count} {kind}' for kind, count in kinds.items()) + ' layers'


def _first(refusals: Dict[str, Exception]) -> str:
    """The reasons that there are, each with the first layer that has it."""
    reasons: Dict[str, str] = {}
    for name, error in refusals.items():
        reasons.setdefault(str(error)[len(name) + 2:].rpartition('. ')[0], name)
    return '; '.join(f'{name or "the model"} and what is like it, for {reason}' for reason, name in reasons.items())


def _key(prefix: str, leaf: str = 'weight') -> str:
    return f'{prefix}.{leaf}' if prefix else leaf


def _check_list(option: str, patterns: Any) -> None:
    if isinstance(patterns, str):
        raise ValueError(f'{option} must be a list, for instance [{patterns!r}]')


def _pattern(target: Any) -> Pattern[str]:
    try:
        return re.compile(target[3:] if target.startswith('re:') else fnmatch.translate(target))
    except (AttributeError, re.error) as error:
        raise ValueError(f'target {target!r} is no layer kind, glob or re: pattern: {error}') from None


def _holds_kernel(layer: nn.Module) -> bool:
    """Whether a layer is one that can be adapted, or one that must be refused by name: it has a kernel of its own."""
    return layer_kind(layer) is not None or (_weight_dims(layer) >= 3 and not is_norm(layer))


def _weight_dims(layer: nn.Module) -> int:
    weight = None if isinstance(layer, torch.jit.ScriptModule) else layer._parameters.get('weight')
    return 0 if weight is None or isinstance(weight, nn.parameter.UninitializedParameter) else weight.dim()


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.4)
    return f'; did you mean {close[0]!r}?' if close else ''
