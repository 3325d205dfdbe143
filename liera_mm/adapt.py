"""Adapting a model: which layers, freezing, summary, merging, export. Works on any ``nn.Module``."""
import contextlib
import difflib
import fnmatch
import re
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Pattern, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn

from .algebra import METHODS
from .group import UPDATES
from .layers import AdaptedLayer, adapt_layer, adapted_class

KINDS = ('conv', 'depthwise', 'pointwise', 'linear')
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def layer_kind(layer: nn.Module) -> Optional[str]:
    """``linear``, ``pointwise`` (every kernel dimension 1), ``depthwise`` (one channel a group), ``conv`` or None."""
    if isinstance(layer, nn.Linear):
        return 'linear'
    if isinstance(layer, nn.modules.conv._ConvNd):
        if all(k == 1 for k in layer.kernel_size):
            return 'pointwise'
        return 'depthwise' if layer.groups == layer.in_channels > 1 else 'conv'
    return None


def adapt(model: nn.Module,
          rank: int = 16,
          alpha: float = 32,
          method: str = 'lora',
          update: str = 'taylor',
          targets: Sequence[str] = KINDS,
          overrides: Sequence[Dict[str, Any]] = (),
          train_norm: bool = False,
          train_bias: Union[bool, str] = False) -> nn.Module:
    """Freeze a model and give its layers trainable perturbations, in place.

    State-dict keys, parameter names and module paths stay; every adapted layer gains ``<layer>.adapter.<name>``. The
    model's output does not change until the adapters train.

    Args:
        model: Any module; for a detector, its backbone.
        rank: Rank r of the low-rank factors, at least 1.
        alpha: Numerator of the scale alpha / rank of Δ.
        method: How Δ is parameterised: ``lora``, ``pissa`` or ``dora`` (low-rank factors), or ``dense``.
        update: How Δ moves the weight: ``taylor`` (LieRA, Eq. 8), ``exp`` (Eq. 5) or ``additive`` (LoRA, Eq. 2).
        targets: Which layers to adapt: layer kinds (``conv``, ``depthwise``, ``pointwise``, ``linear``; one layer is of one
            kind, see :func:`layer_kind`), globs on module names (``stages.3.*``; ``*`` crosses dots), or regular
            expressions that match whole module names (``re:stages\\.[23]\\..*``). Empty if only norms or
            all biases are to train.
        overrides: Settings of some of those layers: dicts of ``targets`` and any of ``rank``, ``alpha``, ``method``,
            ``update``. Where several match, the last wins.
        train_norm: Train the parameters of normalisation layers too.
        train_bias: Train the biases of the adapted layers too; ``'all'``: every bias of the model, those of norms included,
            which without targets is BitFit.

    Returns:
        The same model.

    Raises:
        ValueError: If a setting is unknown or out of range, if targets match no layer, if a weight is not finite, or if
            the model is adapted already. A rank above a layer's dimensions is none: its Δ then has full rank.
        TypeError: If a matched layer computes with its weight in a way that is not known.
    """
    if any(isinstance(m, AdaptedLayer) for m in model.modules()):
        raise ValueError('this model is adapted already: export() it first, or adapt a fresh one')
    settings = dict(rank=rank, alpha=alpha, method=method, update=update)
    _check_settings(settings)
    if train_bias not in (True, False, 'all'):
        raise ValueError(f"train_bias must be True, False or 'all', not {train_bias!r}")
    layers = dict(model.named_modules())
    no_targets = isinstance(targets, (list, tuple)) and not targets and (train_norm or train_bias == 'all')
    chosen = {name: dict(settings) for name in ([] if no_targets else match_layers(layers, targets))}
    for override in overrides:
        if not isinstance(override, Mapping):
            raise ValueError(f'overrides must be a list of dicts, not {overrides!r}')
        changes = {key: value for key, value in override.items() if key != 'targets'}
        for key in changes:
            check_choice('override', key, settings)
        _check_settings({**settings, **changes})
        for name in match_layers({name: layers[name] for name in chosen}, override.get('targets', ())):
            chosen[name].update(changes)
    _check_layers(model, chosen)

    for name, setting in chosen.items():
        adapt_layer(layers[name], **setting)
    model.liera = dict(
        settings,
        targets=list(targets),
        overrides=[dict(override) for override in overrides],
        train_norm=train_norm,
        train_bias=train_bias)
    trainable = intended_parameters(model)
    if not trainable:
        del model.liera
        raise ValueError('nothing would train: without targets, the model needs norms or biases')
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def match_layers(layers: Dict[str, nn.Module], targets: Sequence[str]) -> List[str]:
    """Names of the layers that any of the targets selects, in the model's order.

    Raises:
        ValueError: If one of the targets selects none.
        TypeError: If one selects a layer that cannot be adapted.
    """
    if isinstance(targets, str):
        raise ValueError(f'targets must be a list, for instance [{targets!r}]')
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
            known = [name if layer_kind(layer) else f'{name}.*' for name, layer in layers.items() if name]
            raise ValueError(f'target {target!r} matches no layer{_nearest(target, [*KINDS, *known])}')
        matched.update(names)
    if not matched:
        raise ValueError('the model has no convolution and no linear layer to adapt')
    for name in matched:
        try:
            adapted_class(type(layers[name]))
        except TypeError as error:
            raise TypeError(f'{name}: {error}. Choose targets that leave it out') from None
    return [name for name in layers if name in matched]


def intended_parameters(model: nn.Module) -> Set[str]:
    """Names of the parameters that an adapted model is meant to train: adapters, and norms or biases if asked for."""
    if not hasattr(model, 'liera'):
        raise ValueError('this model is not adapted: call adapt() on it first, or give the part of it that is')
    names = set()
    if model.liera['train_bias'] == 'all':
        names.update(name for name, _ in model.named_parameters() if name.endswith('bias') and '.adapter.' not in name)
    for prefix, layer in model.named_modules():
        prefix = prefix and prefix + '.'
        if isinstance(layer, AdaptedLayer):
            names.update(f'{prefix}adapter.{name}' for name, _ in layer.adapter.named_parameters())
            if model.liera['train_bias'] and layer.bias is not None:
                names.add(f'{prefix}bias')
        elif model.liera['train_norm'] and is_norm(layer):
            names.update(prefix + name for name, _ in layer.named_parameters(recurse=False))
    return names


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, ConvNeXt-V2's global response normalisation included."""
    return isinstance(module, NORMS) or type(module).__name__ == 'GRN'


class SummaryRow(NamedTuple):
    """One adapted layer: counts are numbers of parameters."""
    layer: str
    kind: str
    shape: Tuple[int, ...]
    method: str
    update: str
    rank: Optional[int]
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
            shape = ' x '.join(map(str, row.shape))
            cells.append((row.layer, row.kind, shape, row.method, row.update, str(row.rank or '-'),
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


def summary(model: nn.Module) -> Summary:
    """What was adapted, and how many parameters train."""
    rows = []
    for name, layer in adapted_layers(model):
        trainable = sum(p.numel() for p in layer.adapter.parameters())
        frozen = sum(p.numel() for p in layer.parameters(recurse=False) if not p.requires_grad)
        rows.append(
            SummaryRow(name, layer_kind(layer), tuple(layer.weight.shape), layer.method, layer.update,
                       layer.adapter.rank, trainable, frozen))
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
                adapter.reset(layer.weight)


def merge(model: nn.Module) -> nn.Module:
    """Fold every Δ into its weight, in place: the forward pass costs what it did before :func:`adapt`."""
    for _, layer in adapted_layers(model):
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`, bit for bit."""
    for _, layer in adapted_layers(model):
        layer.unmerge()
    return model


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
    rank, alpha = settings['rank'], settings['alpha']
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f'rank must be a whole number of at least 1, not {rank!r}')
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float('inf'):
        raise ValueError(f'alpha must be a positive number, not {alpha!r}')


def check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError, with the nearest of the choices, if a value is none of them."""
    if value not in list(choices):
        raise ValueError(f'unknown {what} {value!r}{_nearest(str(value), choices)}; known: {", ".join(choices)}')


def _check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse layers whose weight is not theirs alone, or does not exist yet, or is used without their forward()."""
    owners: Dict[int, List[str]] = {}
    for owner, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(f'{owner.rpartition(".")[0]}: its {owner.rpartition(".")[2]} has no shape before the first '
                            'forward pass; run one first')
        owners.setdefault(id(parameter), []).append(owner)
    for name in names:
        layer = model.get_submodule(name)
        if 'forward' in vars(layer):
            raise TypeError(f'{name}: its forward() was replaced on the instance; undo that first, or choose targets '
                            'that leave it out')
        if isinstance(model.get_submodule(name.rpartition('.')[0]), nn.TransformerEncoderLayer):
            raise TypeError(f'{name}: nn.TransformerEncoderLayer reads its weight without calling the layer when it '
                            'evaluates. Choose targets that leave it out')
        weight = layer._parameters.get('weight')
        if weight is None:
            raise TypeError(f'{name}: its weight is computed from other parameters (a parametrization or weight norm); '
                            'remove that first, or choose targets that leave it out')
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(f'{name}: its weight has values that are not finite; adapt a model with intact weights')
        shared = {owner.rpartition('.')[0] for owner in owners[id(weight)]}
        if len({id(model.get_submodule(owner)) for owner in shared}) > 1:
            raise ValueError(f'{name}: its weight is shared between {", ".join(sorted(shared))}; a perturbation of one '
                             'would move all. Choose targets that leave it out')


def _pattern(target: Any) -> Pattern[str]:
    try:
        return re.compile(target[3:] if target.startswith('re:') else fnmatch.translate(target))
    except (AttributeError, re.error) as error:
        raise ValueError(f'target {target!r} is no layer kind, glob or re: pattern: {error}') from None


def _holds_kernel(layer: nn.Module) -> bool:
    """Whether a layer is one that can be adapted, or one that must be refused by name: it has a kernel of its own."""
    weight = layer._parameters.get('weight')
    return layer_kind(layer) is not None or (weight is not None and weight.dim() >= 3)


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.4)
    return f'; did you mean {close[0]!r}?' if close else ''
