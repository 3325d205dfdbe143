"""Cards of adapters: what a receiver has to know, as Markdown with YAML in front, in the layout that model hubs read."""
import dataclasses
import json
import re
from typing import Any, Dict, Mapping, Sequence

FRONT = '---\nlibrary_name: liera_mm\n'
"""How every card begins."""
# What JSON allows in a text, and YAML does not or takes for the end of a line
SPECIAL = re.compile('[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]')


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of an adapter beside its settings.

    Attributes:
        base_model: What it belongs to: a model of a hub, or the file of its weights.
        base_source: Where the weights of that are from, in a sentence or an address.
        data: What it was trained on.
        classes: Their names, in the order of the data.
        metrics: Numbers by their names, which must be finite. A ValueError says which is no number.
        tags: For the search of a hub.
        license: A short name of a hub's list, such as ``apache-2.0``.
        versions: Of packages that it was trained with, by name.
        notes: Sentences.
    """
    base_model: str = ''
    base_source: str = ''
    data: str = ''
    classes: Sequence[str] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tags: Sequence[str] = ('liera', 'parameter-efficient-fine-tuning')
    license: str = 'unknown'
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()

    def __post_init__(self):
        metrics = {}
        for name, value in self.metrics.items():
            try:
                metrics[name] = float(value)  # also those of numpy and torch
            except (TypeError, ValueError):
                raise ValueError(f'the metric {name!r} of a card is {value!r}, which is no number') from None
        object.__setattr__(self, 'metrics', metrics)

    def to_json(self) -> str:
        """The card as one line.

        Raises:
            ValueError: If a metric is not finite.
        """
        return json.dumps(dataclasses.asdict(self), allow_nan=False)


def markdown(card: Card, file: str, settings: Dict[str, Any], parameters: int) -> str:
    """The page of an adapter.

    Args:
        card: What is known of it.
        file: Name of its file.
        settings: Arguments of :func:`liera_mm.adapt` that it belongs to.
        parameters: How many numbers are in it.
    """
    front = dict(base_model=card.base_model, license=card.license, tags=card.tags, metrics=[*card.metrics])
    about = {'Parameters': f'{parameters:,}', 'Base': card.base_model, 'Weights of the base': card.base_source,
             'Trained on': card.data, 'License': card.license}
    sections = [
        FRONT + ''.join(f'{key}: {_yaml(value)}\n' for key, value in front.items() if value) + '---',
        f'# {_plain(file)}',
        'An adapter of liera_mm for the frozen weights of a network, which are not in it. On others than its own, of which '
        'its header has a hash each, it is refused.',
        _items({key: _code(value) for key, value in about.items() if value}),
        *map(_plain, card.notes)]
    if card.metrics:
        sections += ['## Results', _items({_code(name): f'{value:.4g}' for name, value in card.metrics.items()})]
    if card.classes:
        sections += [f'## Classes ({len(card.classes)})', _block('json', _yaml(card.classes))]
    sections += [
        '## Use', _block('python', f'import liera_mm\n\nliera_mm.adapt(model, **{settings!r})\n'
                         f'liera_mm.load_adapter(model, {file!r})')]
    if card.versions:
        sections += ['## Versions', _items({_plain(name): _code(value) for name, value in card.versions.items()})]
    return '\n\n'.join(sections) + '\n'


def _yaml(value: Any) -> str:
    """A value in the part of YAML that is JSON too, as one line."""
    return SPECIAL.sub(lambda match: f'\\u{ord(match[0]):04x}', json.dumps(value, ensure_ascii=False))


def _items(lines: Mapping[str, str]) -> str:
    return '\n'.join(f'- {key}: {value}' for key, value in lines.items())


def _block(language: str, text: str) -> str:
    return f'```{language}\n{text}\n```'  # no line of which begins with backticks, for texts in it are quoted


def _plain(text: str) -> str:
    """A text in one line of Markdown that shows as it is."""
    return re.sub(r'([\\`*_{}\[\]<>#|])', r'\\\1', _line(text))


def _code(text: str) -> str:
    """A text as code within a line, between more backticks than are in it."""
    text = _line(text)
    fence = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence} {text} {fence}' if len(fence) > 1 else f'`{text}`'


def _line(text: str) -> str:
    """A text without line breaks and half characters."""
    return ' '.join(text.split()).encode(errors='replace').decode()
