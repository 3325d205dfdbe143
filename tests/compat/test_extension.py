"""The module mmcv._ext."""
import importlib
import importlib.util
import sys

import pytest
import torch
from mmcv.ops import contour_expand
from operators import fallback_only
from processes import check_python, fake_transformers, run_python


def test_mmengine_and_mmcv_find_the_operators():
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available
    assert importlib.util.find_spec('mmcv._ext') is not None
    assert mmcv_full_available()
    if sys.version_info < (3, 14):  # pkgutil.find_loader, which it calls, is gone there
        assert check_ops_exist()


def test_environment_report():
    from mmcv.utils import collect_env
    assert collect_env()['MMCV Compiler']


@fallback_only
def test_unsupported_operators_fail_when_called_not_on_import():
    with pytest.raises(RuntimeError, match='contour_expand.*not available(.|\n)*roi_align_forward.*nstall mmcv'):
        contour_expand(torch.ones(1, 2, 2), torch.ones(2, 2), 1, 1)


@fallback_only
def test_dunder_attributes_of_the_stand_in_are_missing_as_usual():
    ext = importlib.import_module('mmcv._ext')
    assert hasattr(ext, 'knn_forward') and not hasattr(ext, '__path__')
    with pytest.raises(AttributeError, match='__wrapped__'):
        getattr(ext, '__wrapped__')  # noqa: B009


def test_compiled_operators_are_never_shadowed(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    code = 'compat.install(); from mmcv import _ext; print(_ext.__spec__.origin)'
    assert check_python(code, tmp_path).strip() == 'torchvision'
    (tmp_path / 'mmcv/_ext.py').touch()
    assert check_python(code, tmp_path).strip() == str(tmp_path / 'mmcv/_ext.py')


def test_a_compiled_module_keeps_its_operators_and_gets_those_it_lacks(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    (tmp_path / 'mmcv/_ext.py').write_text('nms = "compiled"\ndef get_compiler_version(): return "GCC"')
    check_python('''
compat.install()
from mmcv import _ext
assert _ext.nms == 'compiled' and _ext.get_compiler_version() == 'GCC'
import torch
boxes = torch.tensor([[0., 0, 2, 2, .5], [0, 0, 2, 2, .9], [5, 5, 6, 6, .7]])
assert _ext.nms_match(boxes, .5) == [[1, 0], [2]]
assert hasattr(_ext, 'knn_forward') and not hasattr(_ext, '__path__')
try:
    _ext.knn_forward()
except RuntimeError as error:
    assert "'knn_forward'" in str(error)
else:
    raise AssertionError
''', tmp_path)


def test_a_compiled_module_that_is_broken_says_so(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    (tmp_path / 'mmcv/_ext.py').write_text('raise ImportError("undefined symbol: _ZN3c10")')
    assert 'undefined symbol: _ZN3c10' in run_python('compat.install(); from mmcv import _ext', tmp_path).stderr


def test_without_mmcv_there_are_no_operators(tmp_path):
    check_python('''
import pathlib
compat.install()
sys.path = [folder for folder in sys.path if not pathlib.Path(folder, 'mmcv').exists()]
try:
    u.find_spec('mmcv._ext')
except ModuleNotFoundError as error:
    assert error.name == 'mmcv'
else:
    raise AssertionError''')


def test_install_twice_adds_one_finder(tmp_path):
    fake_transformers(tmp_path, '5.1.0')
    check_python('''
before = list(sys.meta_path)
compat.install()
first = list(sys.meta_path)
assert len(first) == len(before) + 2 and first[2:] == before
compat.install()
assert sys.meta_path == first
assert not [m for m in sys.modules if m.startswith(('mmcv', 'mmdet', 'mmpretrain', 'torchvision', 'transformers'))]
''', tmp_path)


@fallback_only
@pytest.mark.parametrize('first', ['mmcv.cnn.bricks.transformer', 'mmdet.structures.mask, mmdet.evaluation, mmdet.utils'])
def test_what_was_imported_first_gets_its_operators(first):
    """As by custom_imports=dict(imports=['mmpretrain.models', 'liera_mm'])."""
    result = run_python(f'''
import {first}
compat.install()
import mmcv.ops
asked = [('mmdet.structures.mask.structures', 'roi_align'), ('mmdet.evaluation.metrics.dump_odvg_results', 'batched_nms'),
         ('mmdet.utils.large_image', 'batched_nms'), ('mmcv.cnn.bricks.transformer', 'MultiScaleDeformableAttention')]
asked = [(sys.modules[module], name) for module, name in asked if module in sys.modules]
assert asked and all(getattr(module, name) is getattr(mmcv.ops, name) for module, name in asked), asked''')
    if result.stderr.endswith("No module named 'mmcv._ext'\n"):
        pytest.skip('this mmdet cannot be imported without operators')
    assert result.returncode == 0, result.stderr
