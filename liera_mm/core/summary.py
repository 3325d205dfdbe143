"""A table of what was adapted."""
import functools
from typing import List, NamedTuple, Sequence, Tuple, Union

from torch import nn

from .adapted import adapted_layers
from .group import MULTIPLICATIVE
from .layers import AdaptedLayer
from .targets import layer_kind
from .text import sizes, table_lines
from .wrappers import through_wrappers


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


@functools.partial(through_wrappers, does='looks')
def summary(model: nn.Module) -> Summary:
    """What was adapted, and how many parameters train."""
    rows = []
    for name, layer in adapted_layers(model):
        trainable = sum(p.numel() for p in layer.adapter.parameters())
        frozen = sum(p.numel() for p in layer.parameters(recurse=False) if not p.requires_grad)
        rows.append(
            SummaryRow(name, kind_of(layer), tuple(layer.frozen_weight.shape), layer.method, layer.update,
                       scale_of(layer), layer.adapter.core or layer.adapter.rank, trainable, frozen))
    parameters = list(model.parameters())
    return Summary(rows, sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def kind_of(layer: AdaptedLayer) -> str:
    """The kind of an adapted layer; ``conv`` for one that only a pattern can name, which has a kernel at least."""
    return layer_kind(layer) or 'conv'


def scale_of(layer: AdaptedLayer) -> str:
    """What the Δ of a layer is measured in, one of ``SCALES``; ``-`` under ``additive``, where both are the same."""
    return '-' if layer.update not in MULTIPLICATIVE else 'plain' if layer.adapter.rms is None else 'relative'
