"""Packages that no longer fit each other, made importable."""
import sys
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder


def install() -> None:
    """With transformers 5 or later, keep mmpretrain's optional multimodal part off, which cannot be imported."""
    if _transformers_major() >= 5:
        if 'mmpretrain.utils.dependency' in sys.modules:
            sys.modules['mmpretrain.utils.dependency'].WITH_MULTIMODAL = False
        elif _no_multimodal not in sys.meta_path:
            sys.meta_path.insert(0, _no_multimodal)


def _transformers_major() -> int:
    """Major version of the installed transformers, 0 if there is none; does not import it."""
    try:
        return int(metadata.version('transformers').split('.')[0])
    except metadata.PackageNotFoundError:
        return 0


class _NoMultimodalFinder(MetaPathFinder):
    """Clears ``WITH_MULTIMODAL`` in ``mmpretrain.utils.dependency`` as soon as that is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'mmpretrain.utils.dependency':
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            exec_module = spec.loader.exec_module

            def exec_without_multimodal(module):
                exec_module(module)
                module.WITH_MULTIMODAL = False

            spec.loader.exec_module = exec_without_multimodal
        return spec


_no_multimodal = _NoMultimodalFinder()
