"""The module mmcv._ext."""
import importlib
import importlib.util
import sys

import pytest
import torch
from mmcv.ops import DeformConv2d, roi_align
from operators import fallback_only
from processes import check_python, fake_transformers


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
    layer = DeformConv2d(3, 4, 3, padding=1)
    with pytest.raises(RuntimeError, match='deform_conv_forward.*nstall mmcv'):
        layer(torch.ones(1, 3, 8, 8), torch.zeros(1, 18, 8, 8))
    with pytest.raises(RuntimeError, match="pool_mode='max'"):
        roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0., 1, 1, 5, 5]]), (2, 2), 1., 2, 'max', True)


@fallback_only
def test_dunder_attributes_of_the_stand_in_are_missing_as_usual():
    ext = importlib.import_module('mmcv._ext')
    assert hasattr(ext, 'carafe_forward') and not hasattr(ext, '__path__')
    with pytest.raises(AttributeError, match='__wrapped__'):
        getattr(ext, '__wrapped__')  # noqa: B009


def test_compiled_operators_are_never_shadowed(tmp_path):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv/__init__.py').touch()
    code = 'compat.install(); from mmcv import _ext; print(_ext.__spec__.origin)'
    assert check_python(code, tmp_path).strip() == 'torchvision'
    (tmp_path / 'mmcv/_ext.py').touch()
    assert check_python(code, tmp_path).strip() == str(tmp_path / 'mmcv/_ext.py')


def test_without_mmcv_there_are_no_operators(tmp_path):
    check_python('''
compat.install()
sys.path = [folder for folder in sys.path if 'site-packages' not in folder]
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
assert len(first) == len(before) + 2 and first[1:-1] == before
compat.install()
assert sys.meta_path == first
assert not [m for m in sys.modules if m.startswith(('mmcv', 'mmdet', 'mmpretrain', 'torchvision', 'transformers'))]
''', tmp_path)


@fallback_only
def test_a_late_install_warns():
    check_python('''
import types, warnings
sys.modules['mmdet.structures.mask'] = types.ModuleType('mmdet.structures.mask')
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    compat.install()
assert 'import liera_mm first' in str(caught[0].message)
''')
