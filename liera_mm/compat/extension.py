"""The module ``mmcv._ext``: compiled operators where there are any, those of :mod:`ops` elsewhere."""
import inspect
import re
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


def install() -> None:
    """Make ``mmcv._ext`` importable, and whole: every operator that a compiled one has stays, and others are added."""
    if _operators not in sys.meta_path:
        sys.meta_path.insert(0, _operators)
    if 'mmcv.ops' not in sys.modules:
        _complete_importers()


def _complete_importers() -> None:
    """Give modules that were imported before, and go on without operators, those that they had asked for."""
    transformer = sys.modules.get('mmcv.cnn.bricks.transformer')
    if transformer:
        from mmcv.ops import MultiScaleDeformableAttention
        transformer.MultiScaleDeformableAttention = MultiScaleDeformableAttention
    for module in [module for name, module in sys.modules.items() if name.startswith('mmdet.')]:
        for name, function in list(vars(module).items()):
            asked = inspect.isfunction(function) and re.search(
                r'(\w+) requires mmcv to be compiled', str(function.__code__.co_consts))
            if asked:
                import mmcv.ops
                setattr(module, name, getattr(mmcv.ops, asked[1]))


class _OperatorFinder(MetaPathFinder, Loader):
    """Finds the compiled ``mmcv._ext`` and completes it, or else stands in for it."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != 'mmcv._ext':
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return ModuleSpec(fullname, self, origin='torchvision')
        exec_module = spec.loader.exec_module

        def exec_and_complete(module):
            exec_module(module)
            _complete(module)

        spec.loader.exec_module = exec_and_complete
        return spec

    def exec_module(self, module):
        module.get_compiler_version = module.get_compiling_cuda_version = lambda: 'n/a (operators of torchvision)'
        _complete(module)


_operators = _OperatorFinder()


def _complete(module) -> None:
    """Add the operators that the module lacks."""
    from . import ops
    for name, operator in ops.OPERATORS.items():
        if not hasattr(module, name):
            setattr(module, name, operator)
    module.__getattr__ = _missing_operator


def _missing_operator(name: str):
    """Any other operator: there when mmcv looks for it on import, an error when it is called."""
    if name.startswith('__'):
        raise AttributeError(f"module 'mmcv._ext' has no attribute '{name}'")

    def operator(*args, **kwargs):
        from . import ops
        raise RuntimeError(
            f"The mmcv operator '{name}' is not available: this mmcv has not compiled it, and liera_mm stands in for these "
            f'only: {", ".join(sorted(ops.OPERATORS))}. Install mmcv with compiled operators, see '
            'https://mmcv.readthedocs.io/en/latest/get_started/installation.html')

    return operator
