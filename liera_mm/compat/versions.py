"""Versions of other packages: too old ones are refused, and those that do not fit each other are made to."""
import contextlib
import functools
import platform
import re
import runpy
import sys
from importlib import import_module, metadata
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Callable, Optional, Tuple

OLDEST = dict(Python='3.9', torch='2.4.0', torchvision='0.19.0', safetensors='0.4.3',
              mmengine='0.10.0', mmcv='2.1.0', mmdet='3.3.0', mmpretrain='1.2.0')


def check() -> None:
    """Refuse packages that are missing, or older than any that liera_mm works with; imports none of them.

    Raises:
        SetupError: Which one, its version, and the versions that work.
    """
    for package, oldest in OLDEST.items():
        version = version_of(package)
        if version is None or _numbers(version) < _numbers(oldest):
            from ..core.errors import SetupError
            found = f'this is {version}' if version else 'it is not installed'
            raise SetupError(f'liera_mm needs {package} {oldest} or later; {found}',
                             'Install what requirements.txt lists or, for the official releases, requirements-official.txt')


def version_of(package: str) -> Optional[str]:
    """Version of the package that an import would find, whatever the name under which it was installed; None without it."""
    if package == 'Python':
        return platform.python_version()
    spec = find_spec(package)
    file = spec and Path(spec.origin).with_name('version.py')
    return file and (runpy.run_path(str(file))['__version__'] if file.exists() else metadata.version(package))


def _numbers(version: str) -> Tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', version)[:3]))


def install() -> None:
    """Make mmdet and mmpretrain importable beside versions of other packages that they know nothing of.

    - mmpretrain's optional multimodal part is kept off with a transformers that is too new for it.
    - mmdet's optional text encoders are left out where transformers cannot be imported for torch is too old for it.
    - A torchvision that was built for another torch is refused.
    - mmdet 3.3 and mmsegmentation 1.2 take any mmcv 2, not only those below 2.2.
    - mmdet's PointAssigner, that of RepPoints, works on a GPU, where it indexes a tensor on the host.
    - mmdet's recalls of proposals (``proposal_fast``, that of RPN's configs) are computed of images with unlike numbers of
      boxes, of which NumPy 1.24 and later make no array.
    - MMEngine finds ``mmdet.models.losses.smooth_l1_loss.L1Loss``, as it writes that class of a pure Python-style config, in
      the module of that name, and not only in the function that mmdet.models.losses has under it too.
    - Configs of mmsegmentation are found under ``mmseg::`` where it is installed as onedl-mmsegmentation.
    """
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if 'mmpretrain.utils.dependency' in sys.modules:
        _without_multimodal(sys.modules['mmpretrain.utils.dependency'])
    if 'mmengine.registry.registry' in sys.modules:
        _with_modules_behind_functions(sys.modules['mmengine.registry.registry'])
    if 'mmengine.config.utils' in sys.modules:
        _with_renamed_mmsegmentation(sys.modules['mmengine.config.utils'])


def _multimodal_part_imports() -> bool:
    """Whether transformers, if it is installed, still has the names that mmpretrain takes from it; imports neither."""
    too_new = (5, ) if _numbers(version_of('mmpretrain')) >= (1, 3) else (4, 52)
    try:
        return _numbers(metadata.version('transformers')) < too_new
    except metadata.PackageNotFoundError:
        return True


def _without_multimodal(module, run: Callable = lambda module: None) -> None:
    run(module)
    if not _multimodal_part_imports():
        module.WITH_MULTIMODAL = False


def _or_import_error(module, run: Callable) -> None:
    """transformers without a torch that it can use fails in any way; those who can do without it expect an ImportError."""
    try:
        run(module)
    except Exception as error:
        raise ImportError(f'{module.__name__} cannot be imported: {error}') from error


def _refused_beside_another_torch(module, run: Callable) -> None:
    try:
        run(module)
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
        from ..core.errors import SetupError
        raise SetupError(f'torchvision {version_of("torchvision")} does not fit torch {version_of("torch")}: {error}',
                         'Install both anew: pip install --upgrade torch torchvision') from None


def _with_any_mmcv(module, run: Callable) -> None:
    import mmcv
    try:
        run(module)
    except AssertionError:
        version = mmcv.__version__
        if _numbers(version) < (2, 2):
            raise
        mmcv.__version__ = '2.1.0'
        try:
            run(module)
        finally:
            mmcv.__version__ = version


def _with_points_on_their_device(module, run: Callable) -> None:
    run(module)
    assign = module.PointAssigner.assign

    @functools.wraps(assign)
    def assign_on_device(self, pred_instances, *args, **kwargs):
        with pred_instances.priors.device:
            return assign(self, pred_instances, *args, **kwargs)

    module.PointAssigner.assign = assign_on_device


def _with_arrays_of_unlike_rows(module, run: Callable) -> None:
    import numpy as np
    run(module)

    def array(rows, **kwargs):
        try:
            return np.array(rows, **kwargs)
        except ValueError:
            result = np.empty(len(rows), object)
            result[:] = rows
            return result

    module.np = ModuleType('numpy')
    module.np.__dict__.update(vars(np), array=array)


def _with_modules_behind_functions(module, run: Callable = lambda module: None) -> None:
    run(module)
    find = module.get_object_from_string
    if hasattr(find, '__wrapped__'):
        return

    @functools.wraps(find)
    def find_in_modules_too(name: str):
        found, (parent, _, leaf) = find(name), name.rpartition('.')
        if found is None and parent:
            with contextlib.suppress(ImportError):
                found = getattr(import_module(parent), leaf, None)
        return found

    module.get_object_from_string = find_in_modules_too


def _with_renamed_mmsegmentation(module, run: Callable = lambda module: None) -> None:
    run(module)
    try:
        metadata.version('mmsegmentation')
    except metadata.PackageNotFoundError:
        if find_spec('mmseg'):
            module.MODULE2PACKAGE['mmseg'] = 'mmseg'


class _Finder(MetaPathFinder):
    """Has some modules of other packages executed in the way that is given for them."""
    ways = {
        'mmengine.registry.registry': _with_modules_behind_functions,
        'mmengine.config.utils': _with_renamed_mmsegmentation,
        'mmpretrain.utils.dependency': _without_multimodal,
        'transformers.modeling_utils': _or_import_error,
        'torchvision': _refused_beside_another_torch,
        'mmdet': _with_any_mmcv,
        'mmdet.models.task_modules.assigners.point_assigner': _with_points_on_their_device,
        'mmdet.evaluation.functional.recall': _with_arrays_of_unlike_rows,
        'mmseg': _with_any_mmcv,
    }

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.ways:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            way, run = self.ways[fullname], spec.loader.exec_module
            spec.loader.exec_module = lambda module: way(module, run)
        return spec


_finder = _Finder()
