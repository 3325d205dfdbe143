"""The multimodal part of mmpretrain."""
import pytest
from processes import check_python, fake_transformers, run_python


def test_mmpretrain_imports_with_transformers_5(tmp_path):
    pytest.importorskip('pycocotools')  # mmpretrain's multimodal part asks for it as well
    fake_transformers(tmp_path, '5.0.0rc1')
    code = 'import mmpretrain.models; assert "ConvNeXt" in mmpretrain.models.BACKBONES'
    assert 'ImportError: cannot import name' in run_python(code, tmp_path).stderr
    check_python('compat.install(); ' + code, tmp_path)


@pytest.mark.parametrize('version, on', [('4.40.2', True), ('5.0.0', False)])
def test_multimodal_part_is_switched_off_only_for_transformers_5(version, on, tmp_path):
    fake_transformers(tmp_path, version)
    for name, body in [('', ''), ('.utils', 'from .dependency import WITH_MULTIMODAL as SEEN'),
                       ('.utils.dependency', 'WITH_MULTIMODAL = True')]:
        file = tmp_path / f'mmpretrain{name}'.replace('.', '/')
        file = file.with_suffix('.py') if name.endswith('dependency') else file / '__init__.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(body)
    check_python(f'compat.install(); import mmpretrain.utils as utils; assert utils.SEEN is {on}', tmp_path)
    # mmpretrain.utils may be there already; mmpretrain.models looks the flag up when it is imported.
    check_python('from mmpretrain.utils import dependency; compat.install(); '
                 f'assert dependency.WITH_MULTIMODAL is {on}', tmp_path)
