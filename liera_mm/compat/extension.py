"""The module ``mmcv._ext``: compiled operators where there are any, those of :mod:`ops` elsewhere."""
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


def install() -> None:
    """Make ``mmcv._ext`` importable. A compiled one is always preferred, because Python's own finders are asked first."""
    if _operators not in sys.meta_path:
        sys.meta_path.append(_operators)
    if 'mmdet.structures.mask' in sys.modules and 'mmcv.ops' not in sys.modules:
        warnings.warn('mmdet was imported before liera_mm and goes on without operators: import liera_mm first.',
                      stacklevel=3)


class _OperatorFinder(MetaPathFinder, Loader):
    """Finds and loads the stand-in for ``mmcv._ext``."""

    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, origin='torchvision') if fullname == 'mmcv._ext' else None

    def exec_module(self, module):
        from . import ops
        vars(module).update(ops.OPERATORS)
        module.get_compiler_version = module.get_compiling_cuda_version = lambda: 'n/a (operators of torchvision)'
        module.__getattr__ = _missing_operator


_operators = _OperatorFinder()


def _missing_operator(name: str):
    """Any other operator: there when mmcv looks for it on import, an error when it is called."""
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute '{name}'")

    def operator(*args, **kwargs):
        from . import ops
        raise RuntimeError(
            f"The mmcv operator '{name}' is not available: this mmcv has no compiled operators, and liera_mm stands in for "
            f'these only: {", ".join(sorted(ops.OPERATORS))}. Install mmcv with compiled operators, see '
            'https://mmcv.readthedocs.io/en/latest/get_started/installation.html')

    return operator
