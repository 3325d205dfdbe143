"""Configs of this package as stock MMDetection reads them."""
import contextlib
import inspect
from importlib import import_module
from typing import Any, Dict, Iterable, Iterator, Optional, Set, Tuple

from mmengine.config import Config
from mmengine.registry import HOOKS, Registry, root
from mmengine.utils import get_object_from_string

from ..core.errors import SetupError

PACKAGE = __name__.partition('.')[0]
REGISTRIES = [registry for registry in vars(root).values() if isinstance(registry, Registry)]


def plain_config(cfg: Config) -> Config:
    """The same detector, without anything of this package: it trains, tests and loads in a process that lacks it.

    Whatever this package registers is replaced by what it stands for: the nearest of its base classes that OpenMMLab
    registers, or, of a function with an attribute ``wraps``, the config in its argument of that name. Arguments that only
    ours takes go, and hooks that stand for nothing, wherever in the config they are. So do ``init_cfg`` of pretrained
    weights, which the merged checkpoint has, and the names of weights that ship with this package.

    Args:
        cfg: The config, pure Python-style (``type=LieRABackbone``) or not; it stays as it is.

    Raises:
        SetupError: If something of this package stands for nothing that OpenMMLab has.
    """
    plain = _Plain(cfg.get('default_scope') or 'mmengine')
    tree = cfg.to_dict()
    _leave_out_sources(tree.get('model'))
    if plain.find((tree.get('strategy') or {}).get('type')) is not None:
        # Back to the Runner, which does on one device or several what FlexibleRunner's DDPStrategy does on several alone
        del tree['strategy']
        tree.pop('runner_type', None)
    tree = plain.node(tree, '')
    imports = (tree.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else imports
    imports = [name for name in imports if name.partition('.')[0] != PACKAGE]
    imports += [f'{scope}.models' for scope in sorted(plain.scopes) if f'{scope}.models' not in imports]
    tree['custom_imports'] = dict(imports=imports, allow_failed_imports=False)
    return Config(tree)


def stock_type(ours: Any) -> Optional[Tuple[str, str]]:
    """Scope and name of the nearest base class of one of our classes that OpenMMLab registers; None if there is none."""
    for base in inspect.getmro(ours) if inspect.isclass(ours) else ():
        if _is_ours(base):
            continue
        for registry in REGISTRIES:
            for scope, known in ((registry.scope, registry), *registry.children.items()):
                for name, registered in known.module_dict.items():
                    if registered is base:
                        return scope, name
    return None


class _Plain:
    """One config; ``scopes`` are those of its types that are neither MMEngine's nor the default."""

    def __init__(self, default_scope: str):
        self.default_scope = default_scope
        self.scopes: Set[str] = set()
        self.ours = {name: registry for registry in REGISTRIES for name, registered in registry.module_dict.items()
                     if _is_ours(registered)}

    def node(self, node: Any, key: str) -> Any:
        """A part of the config, plain; None for what has to go."""
        if isinstance(node, dict):
            return self.dict(node, key)
        if isinstance(node, (list, tuple)):
            pairs = [(child, self.node(child, f'{key}.{i}')) for i, child in enumerate(node)]
            return type(node)(plain for child, plain in pairs if child is None or plain is not None)
        ours = self.find(node)
        if ours is not None:
            return self.name(ours, key)
        if inspect.isclass(node) or inspect.isfunction(node):
            return f'{node.__module__}.{node.__qualname__}'  # as MMEngine writes types that are imported
        if isinstance(node, str) and node.startswith('liera://'):
            return None
        if key.endswith('.type') and isinstance(node, str):
            hidden = _behind_a_function(node)
            if hidden is not None:
                return self.name(hidden, key)
            self.note_scope(node.partition('.')[0])
        return node

    def dict(self, node: Dict[str, Any], key: str) -> Optional[Dict[str, Any]]:
        ours = self.find(node.get('type'))
        if hasattr(ours, 'wraps'):
            return self.node(node[ours.wraps], f'{key}.{ours.wraps}')
        if ours is not None:
            if stock_type(ours) is None and ours in HOOKS.module_dict.values():
                return None
            self.name(ours, f'{key}.type')  # which refuses what stands for nothing
            extra = _arguments(ours, True) - _arguments(ours, False)
            node = {name: value for name, value in node.items() if name not in extra}
        pairs = [(name, child, self.node(child, f'{key}.{name}'.lstrip('.'))) for name, child in node.items()]
        return {name: plain for name, child, plain in pairs if child is None or plain is not None}

    def find(self, value: Any) -> Any:
        """What of this package a value is or names: ``LieRAHook``, ``mmdet.LieRAHook``, ``liera_mm.LieRAHook``; or None."""
        if not isinstance(value, str):
            return value if _is_ours(value) and callable(value) else None
        if value.startswith(f'{PACKAGE}.'):
            found = get_object_from_string(value)
            return found if callable(found) else None
        scope, _, name = value.rpartition('.')
        registry = self.ours.get(name)
        if registry is None or scope not in ('', registry.scope, *registry.children):
            return None
        nearer = registry.children.get(scope or self.default_scope)
        return None if nearer is not None and name in nearer.module_dict else registry.module_dict[name]

    def name(self, ours: Any, key: str) -> str:
        stock = stock_type(ours)
        if stock is None:
            raise SetupError(f'{key} is {ours.__name__} of {PACKAGE}, which stands for nothing that OpenMMLab has',
                             'Take it out of the config, if the detector works without it')
        scope, name = stock
        self.note_scope(scope)
        return name if scope in ('mmengine', self.default_scope) else f'{scope}.{name}'

    def note_scope(self, scope: str) -> None:
        if scope not in ('mmengine', self.default_scope) and any(scope in registry.children for registry in REGISTRIES):
            self.scopes.add(scope)


def _leave_out_sources(node: Any) -> None:
    """Take the pretrained weights out of a model's config, in place."""
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        _leave_out_sources(child)
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [cfg for cfg in init_cfg if 'checkpoint' not in cfg]
        elif isinstance(init_cfg, dict) and 'checkpoint' in init_cfg:
            node['init_cfg'] = None


def _behind_a_function(name: str) -> Optional[type]:
    """The class of a dotted name that stock MMEngine does not find, for a function has the name of its module; or None."""
    parent, _, leaf = name.rpartition('.')
    if '.' in parent and get_object_from_string(name) is None:
        with contextlib.suppress(ImportError):
            return getattr(import_module(parent), leaf, None)
    return None


def _is_ours(value: Any) -> bool:
    return str(getattr(value, '__module__', '')).partition('.')[0] == PACKAGE


def _arguments(cls: type, ours: bool) -> Set[str]:
    """Names of the arguments that the constructors of our part of a class, or of the rest of it, take."""
    return set(arguments_of(base for base in inspect.getmro(cls) if _is_ours(base) == ours))


def arguments_of(classes: Iterable[type]) -> Iterator[str]:
    """Names of the arguments that the constructors of classes take, without those of the classes that they derive from."""
    for cls in classes:
        if '__init__' in vars(cls) and inspect.isfunction(cls.__init__):
            yield from (name for name, parameter in inspect.signature(cls.__init__).parameters.items()
                        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY))
