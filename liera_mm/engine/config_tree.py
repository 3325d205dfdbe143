"""Walks through the trees that configs are."""
from typing import Any, Dict, Iterator, Tuple


def dicts(node: Any, key: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Key and content of every dict in a part of a config, which has that key itself."""
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            yield from dicts(value, f'{key}.{name}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from dicts(value, f'{key}.{index}')


def type_name(part: Any) -> str:
    """Name of the class that a part of a config is built of, which it names or has; empty if there is none."""
    kind = part.get('type') if isinstance(part, dict) else None
    return getattr(kind, '__name__', None) or str(kind or '').rpartition('.')[2]


def is_pretrained(part: Any) -> bool:
    """Whether a part of a config is an ``init_cfg`` that reads a checkpoint; PVT and Swin take it without a type."""
    kind = type_name(part)
    return kind in ('Pretrained', 'PretrainedInit') or not kind and isinstance(part, dict) and 'checkpoint' in part


def replace_prefix(node: Any, old: str, new: str) -> Any:
    """A part of a config in which texts that begin with one prefix begin with another."""
    if isinstance(node, dict):
        return {key: replace_prefix(value, old, new) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(replace_prefix(value, old, new) for value in node)
    return new + node[len(old):] if isinstance(node, str) and node.startswith(old) else node
