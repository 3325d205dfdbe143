"""Packages that are too old, and packages that do not fit each other."""
import importlib.util
import re
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from operators import DEVICES
from processes import check_python, fake_transformers, run_python

from liera_mm.compat import versions
from liera_mm.core.errors import SetupError

ROOT = Path(__file__).parents[2]


def write_package(folder, name, version, init=''):
    package = folder / name
    package.mkdir()
    (package / 'version.py').write_text(f'__version__ = {version!r}\n')
    (package / '__init__.py').write_text(f'from .version import __version__\n{init}')


# What is refused


@pytest.mark.parametrize('package', versions.OLDEST)
@pytest.mark.parametrize('version, found', [
    (None, 'it is not installed'), ('0.1.9', 'this is 0.1.9'), ('0.1.9rc2+cpu', 'this is 0.1.9rc2+cpu')])
def test_too_old_or_missing(package, version, found, monkeypatch):
    monkeypatch.setattr(versions, 'version_of', lambda name: version if name == package else '99.0')
    with pytest.raises(SetupError) as caught:
        versions.check()
    problem, remedy = str(caught.value).splitlines()
    assert problem == f'liera_mm needs {package} {versions.OLDEST[package]} or later; {found}'
    for file in re.findall(r'requirements\S*\.txt', remedy):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize('tail', ['', '+cu124', 'rc1', '.post1'])
def test_the_oldest_and_newer_ones_are_taken(tail, monkeypatch):
    for later in (lambda numbers: numbers, lambda numbers: [numbers[0], numbers[1] + 9, 0], lambda numbers: [99]):
        monkeypatch.setattr(versions, 'version_of', lambda name, later=later: '.'.join(
            map(str, later([*map(int, versions.OLDEST[name].split('.'))]))) + tail)
        versions.check()


def test_version_of_what_an_import_would_find(tmp_path, monkeypatch):
    assert versions.version_of('torch') == torch.__version__
    assert versions.version_of('a_package_that_nobody_has') is None
    write_package(tmp_path, 'mmother', '1.2.3')
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.version_of('mmother') == '1.2.3'


def test_an_import_beside_an_old_mmdet(tmp_path):
    """Ends with the two lines, before anything of that mmdet was executed."""
    write_package(tmp_path, 'mmdet', '2.28.2', 'raise RuntimeError("imported")')
    error = run_python('import liera_mm', tmp_path).stderr.splitlines()
    assert error[-2] == ('liera_mm.core.errors.SetupError: liera_mm needs mmdet '
                         f'{versions.OLDEST["mmdet"]} or later; this is 2.28.2')
    assert error[-1].startswith('Install what requirements.txt lists')


def test_an_import_beside_a_torchvision_for_another_torch(tmp_path):
    write_package(tmp_path, 'torchvision', '0.20.1', 'raise RuntimeError("operator torchvision::nms does not exist")')
    error = run_python('import liera_mm', tmp_path).stderr.splitlines()
    assert error[-2] == (f'liera_mm.core.errors.SetupError: torchvision 0.20.1 does not fit torch {torch.__version__}: '
                         'operator torchvision::nms does not exist')
    assert error[-1].startswith('Install both')


def test_readme_names_the_oldest():
    text = (ROOT / 'README.md').read_text()
    for package, oldest in versions.OLDEST.items():
        assert f'{package} {oldest.removesuffix(".0")}' in text


# mmcv


CEILING = '''
import mmcv
assert tuple(map(int, mmcv.__version__.split('.'))) < (2, 2, 0), 'incompatible'
assert tuple(map(int, mmcv.__version__.split('.'))) >= (2, 0, 0), 'incompatible'
seen = mmcv.__version__
'''


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
@pytest.mark.parametrize('version, seen', [('2.1.0', '2.1.0'), ('2.2.0', '2.1.0'), ('2.3.6', '2.1.0'), ('1.7.2', None)])
def test_packages_that_refuse_a_newer_mmcv(package, version, seen, tmp_path):
    write_package(tmp_path, 'mmcv', version)
    write_package(tmp_path, package, '3.3.0', CEILING)
    code = f'import mmcv, {package}; assert (mmcv.__version__, {package}.seen) == ({version!r}, {seen!r})'
    if seen is None:
        assert 'AssertionError: incompatible' in run_python('compat.versions.install(); ' + code, tmp_path).stderr
    else:
        check_python('compat.versions.install(); ' + code, tmp_path)


@pytest.mark.parametrize('device', DEVICES)
def test_points_are_assigned_on_their_device(device):
    """mmdet makes their numbers on the host, with which those on a GPU cannot be indexed."""
    from mmdet.models.task_modules.assigners import PointAssigner
    from mmengine.structures import InstanceData
    points = torch.tensor([[x, y, 8.] for y in range(0, 32, 8) for x in range(0, 32, 8)], device=device)
    boxes = torch.tensor([[0., 0, 20, 20], [16, 16, 40, 40]], device=device)
    default = torch.get_default_device()
    torch.set_default_device('meta')  # the host, as seen from a GPU
    try:
        result = PointAssigner(pos_num=1).assign(InstanceData(priors=points), InstanceData(
            bboxes=boxes, labels=torch.tensor([3, 5], device=device)))
    finally:
        torch.set_default_device(default)
    assert result.gt_inds.tolist() == [0] * 5 + [1] + [0] * 9 + [2]


def test_recalls_of_images_with_unlike_numbers_of_boxes():
    from mmdet.evaluation import eval_recalls
    boxes = [np.array([[0., 0, 8, 8], [20, 20, 30, 30], [40, 40, 60, 60]]), np.array([[5., 5, 9, 9]]), np.zeros((0, 4))]
    proposals = [np.array([[0., 0, 8, 8, .9], [20, 20, 30, 30, .5]]), np.array([[5., 5, 9, 9, .8]]), np.zeros((1, 5))]
    assert eval_recalls(boxes, proposals, [1, 100], [.5, .9], logger='silent').tolist() == [[.5, .5], [.75, .75]]


# mmsegmentation


@pytest.mark.skipif(any(metadata.distributions(name='mmsegmentation')), reason='mmsegmentation has its own name here')
@pytest.mark.parametrize('first', ['compat.versions.install(); ', 'import mmengine.config; compat.versions.install(); '])
def test_configs_of_a_renamed_mmsegmentation(first, tmp_path):
    code = first + f'''
from mmengine.config import Config
assert Config.fromfile({str(tmp_path / "ours.py")!r}).seen == 3'''
    (tmp_path / 'ours.py').write_text("_base_ = 'mmseg::fcn/theirs.py'")
    if importlib.util.find_spec('mmseg') is None:
        assert 'mmsegmentation is not installed' in run_python(code, tmp_path).stderr
    write_package(tmp_path, 'mmseg', '1.4.2')
    (tmp_path / 'mmseg/.mim/configs/fcn').mkdir(parents=True)
    (tmp_path / 'mmseg/.mim/configs/fcn/theirs.py').write_text('seen = 3')
    (tmp_path / 'mmseg/.mim/model-index.yml').write_text('Import: []')
    check_python(code, tmp_path)


# transformers


def test_transformers_without_a_torch_that_it_knows(tmp_path):
    """Who asks for it in vain, as mmdet does, goes on without."""
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers/__init__.py').touch()
    (tmp_path / 'transformers/modeling_utils.py').write_text('def f(model: nn.Module): ...')
    code = '''
try:
    from transformers.modeling_utils import f
except ImportError as error:
    assert "name 'nn' is not defined" in str(error)
else:
    raise AssertionError'''
    assert 'NameError' in run_python(code, tmp_path).stderr
    check_python('compat.versions.install()' + code, tmp_path)


def test_mmpretrain_imports_with_transformers_5(tmp_path):
    pytest.importorskip('pycocotools')  # mmpretrain's multimodal part asks for it as well
    fake_transformers(tmp_path, '5.0.0rc1')
    code = 'import mmpretrain.models; assert "ConvNeXt" in mmpretrain.models.BACKBONES'
    assert 'ImportError: cannot import name' in run_python(code, tmp_path).stderr
    check_python('compat.install(); ' + code, tmp_path)


@pytest.mark.parametrize('mmpretrain, version, on', [('1.2.0', '4.51.3', True), ('1.2.0', '4.52.0', False),
                                                     ('1.3.6', '4.57.6', True), ('1.3.6', '5.0.0', False)])
def test_multimodal_part_is_switched_off_only_where_it_cannot_be_imported(mmpretrain, version, on, tmp_path):
    fake_transformers(tmp_path, version)
    for name, body in [('', ''), ('.version', f'__version__ = {mmpretrain!r}'),
                       ('.utils', 'from .dependency import WITH_MULTIMODAL as SEEN'),
                       ('.utils.dependency', 'WITH_MULTIMODAL = True')]:
        file = tmp_path / f'mmpretrain{name}'.replace('.', '/')
        file = file.with_suffix('.py') if name.endswith(('dependency', 'version')) else file / '__init__.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
    check_python(f'compat.install(); import mmpretrain.utils as utils; assert utils.SEEN is {on}', tmp_path)
    # mmpretrain.utils may be there already; mmpretrain.models looks the flag up when it is imported.
    check_python('from mmpretrain.utils import dependency; compat.install(); '
                 f'assert dependency.WITH_MULTIMODAL is {on}', tmp_path)


def test_classes_in_modules_that_functions_hide():
    from mmdet.models import L1Loss
    from mmengine.registry import MODELS
    versions.install()  # once more
    assert MODELS.get('mmdet.models.losses.smooth_l1_loss.L1Loss') is L1Loss
    assert MODELS.get('mmdet.models.losses.smooth_l1_loss.L3Loss') is None
    assert MODELS.get('mmdet.models.losses.nowhere.L1Loss') is None
