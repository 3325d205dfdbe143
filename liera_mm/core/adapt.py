"""Adapting a model: which layers, how, and what trains. Works on any ``nn.Module``."""
import collections
import functools
import logging
import numbers
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set, Tuple, Union

import torch
from torch import nn

from .adapted import adapted_layers, intended_parameters, tensor_name
from .algebra import METHODS
from .group import UPDATES
from .layers import adapt_layer, check_layer, restore_class
from .targets import KINDS, is_norm, layer_kind, layers_by_name, match_layers, select
from .text import check_choice, some
from .wrappers import through_wrappers

SCALES = ('relative', 'plain')
# What settings were before they existed, for files from then
BEFORE = dict(scale='plain')
ALPHA = 16  # by default, at any rank
KERNEL_RANK = 2
logger = logging.getLogger('liera_mm')


@functools.partial(through_wrappers, does='adds')
def adapt(model: nn.Module,
          rank: int = 16,
          alpha: float = ALPHA,
          method: str = 'lora',
          update: str = 'taylor',
          scale: str = 'relative',
          targets: Sequence[str] = KINDS,
          overrides: Sequence[Dict[str, Any]] = (),
          train_norm: bool = False,
          train_bias: Union[bool, str] = False,
          exclude: Sequence[str] = (),
          train: Sequence[str] = (),
          kernel_rank: int = KERNEL_RANK) -> nn.Module:
    """Freeze a model and give its layers trainable perturbations, in place.

    State-dict keys, parameter names and module paths stay; every adapted layer gains ``<layer>.adapter.<name>``. The
    model's output does not change until the adapters train.

    Args:
        model: Any module; for a detector, its backbone.
        rank: Rank r of the low-rank factors, at least 1; of ``tucker``, that of the channels; of ``atom``, the number of
            atoms.
        alpha: Numerator of the scale alpha / rank of Δ. AdamW's steps of one size move Δ in proportion to it, whatever the
            rank, so that one alpha suits all ranks (docs/transfer.md).
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
    if any(adapted_layers(model)):
        raise ValueError('this model is adapted already: export() it first, or adapt a fresh one')
    if not isinstance(overrides, (list, tuple)) or not all(isinstance(override, Mapping) for override in overrides):
        raise ValueError(f'overrides must be a list of dicts, not {overrides!r}')
    settings = _checked(dict(rank=rank, alpha=alpha, method=method, update=update, scale=scale, kernel_rank=kernel_rank))
    overrides = [_checked_override(override, settings) for override in overrides]
    if not isinstance(train_norm, bool):
        raise ValueError(f'train_norm must be True or False, not {train_norm!r}')
    if train_bias not in (True, False, 'all'):
        raise ValueError(f"train_bias must be True, False or 'all', not {train_bias!r}")
    layers = dict(model.named_modules(remove_duplicate=False))
    _check_weights(model)
    excluded, whole = (select(model, option, patterns) for option, patterns in (('exclude', exclude), ('train', train)))
    no_targets = isinstance(targets, (list, tuple)) and not targets and (train_norm or train_bias == 'all' or train)
    matched = [name for name in ([] if no_targets else match_layers(layers, targets))
               if name not in excluded and tensor_name(name) not in whole]
    chosen, refused, zero = _choose(model, targets, matched, settings, overrides)
    parameters = dict(model.named_parameters(remove_duplicate=False))  # which can have several names
    norms = {tensor_name(name, leaf) for name, layer in layers.items() if train_norm and is_norm(layer)
             for leaf in layer._parameters}.intersection(parameters)
    biases = {tensor_name(name, leaf) for name in (layers if train_bias == 'all' else chosen if train_bias else ())
              for leaf in layers[name]._parameters if leaf.endswith('bias')}.intersection(parameters)
    in_place = whole | norms | biases | {tensor_name(name, leaf) for name in zero for leaf in layers[name]._parameters}
    trained = {id(parameters[name]) for name in in_place - excluded if name in parameters}
    in_place = [name for name, parameter in model.named_parameters() if id(parameter) in trained]
    if not chosen and not in_place:
        raise ValueError('nothing would train: there is no convolution and no linear layer left to adapt, nor norms or '
                         'biases to train')
    try:
        for name, setting in chosen.items():
            adapt_layer(layers[name], **setting)
    except BaseException:  # out of memory, or interrupted
        for name in chosen:
            restore_class(layers[name])
        raise
    model.trained_in_place = in_place
    used = {option for setting in chosen.values() for option in METHODS[setting['method']].options}
    model.liera = dict(
        {key: value for key, value in settings.items() if key != 'kernel_rank' or key in used},
        targets=list(targets),
        overrides=overrides,
        train_norm=train_norm,
        train_bias=train_bias)
    # Only where they are given: files that were saved before these settings existed have none
    model.liera.update({key: list(value) for key, value in (('exclude', exclude), ('train', train)) if value})
    trainable = intended_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    idle = []
    if train_norm and not norms:
        idle.append('train_norm=True changes nothing: there is no norm with parameters')
    if train_bias and not biases:
        idle.append(f'{train_bias=} changes nothing: no {"adapted " * (train_bias != "all")}layer has a bias')
    if 'kernel_rank' not in used and (kernel_rank != KERNEL_RANK or any('kernel_rank' in each for each in overrides)):
        idle.append("kernel_rank changes nothing: no adapted layer has method='tucker'")
    idle += [f'overrides of {override["targets"]} set nothing' for override in overrides if len(override) == 1]
    for message in idle:
        logger.warning(f'LieRA  {message}')
    if refused:
        logger.warning(f'LieRA  {_count(layers, refused)} cannot be adapted and stay as they are: {_first(refused)}')
    if zero:
        logger.info(f'LieRA  {_count(layers, zero)} have nothing but zeros for a weight, and train whole: {some(zero)}')
    return model


def _choose(model: nn.Module, targets: Sequence[str], matched: Sequence[str], settings: Dict[str, Any],
            overrides: Sequence[Mapping[str, Any]]) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Exception], Set[str]]:
    """The settings of those of the matched layers that are to be adapted; why others cannot be; and which are zeros.

    Raises:
        ValueError, TypeError: If a layer that cannot be adapted is named, or if there is no other.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    named = layers_by_name(layers, targets)
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
        changes = {key: value for key, value in override.items() if key != 'targets'}
        kept = {layers[name] for name in chosen}
        named_kept = {name: layer for name, layer in layers.items() if layer in kept}
        try:
            overridden = match_layers(named_kept, override.get('targets', ()))
        except ValueError as error:
            left_out = match_layers(layers, override.get('targets', ()))
            whole = zero.intersection(left_out)
            if whole:
                raise ValueError(f'overrides: {some(whole)} have nothing but zeros for a weight, and train whole; to have '
                                 'them adapted, name them in targets too') from None
            raise next((refused[name] for name in left_out if name in refused), error) from None
        for name in overridden:
            chosen[name].update(changes)
        if 'method' in changes:
            named |= layers_by_name(layers, override['targets'])
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
    return chosen, refused, zero


def _checked(settings: Mapping[str, Any]) -> Dict[str, Any]:
    """The settings with plain numbers, whatever library's they are.

    Raises:
        ValueError: If one is unknown or out of range.
    """
    check_choice('method', settings['method'], METHODS)
    check_choice('update', settings['update'], UPDATES)
    check_choice('scale', settings['scale'], SCALES)
    checked = dict(settings)
    for name in ('rank', 'kernel_rank'):
        if isinstance(rank := settings[name], bool) or not isinstance(rank, numbers.Integral) or rank < 1:
            raise ValueError(f'{name} must be a whole number of at least 1, not {rank!r}')
        checked[name] = int(rank)
    alpha, single = settings['alpha'], torch.finfo(torch.float32)
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real) or not single.tiny <= alpha <= single.max:
        raise ValueError(f'alpha must be a positive number, not {alpha!r:.40}')
    checked['alpha'] = int(alpha) if isinstance(alpha, numbers.Integral) else float(alpha)
    return checked


def _checked_override(override: Mapping[str, Any], settings: Mapping[str, Any]) -> Dict[str, Any]:
    for key in override:
        check_choice('override', key, ['targets', *settings])
    checked = _checked({**settings, **{key: value for key, value in override.items() if key != 'targets'}})
    return {key: checked.get(key, value) for key, value in override.items()}


def _check_weights(model: nn.Module) -> None:
    """Refuse a model with weights that do not exist yet, which cannot be frozen either, or that nothing trains with."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            layer, _, leaf = name.rpartition('.')
            raise TypeError(f'{layer}: its {leaf} has no shape before the first forward pass; run one first')
        if parameter.is_inference() and parameter.requires_grad:
            raise TypeError(f'{name} was made under torch.inference_mode, and nothing can be trained with it: make the '
                            'model outside')


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
        try:
            _check_layer(model, name, owners)
        except (TypeError, ValueError) as error:
            refusals[name] = _refusal(name, error)
            continue
        weight = model.get_submodule(name)._parameters['weight']
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f'{name}: its weight has values that are not finite; adapt a model with intact weights')
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
