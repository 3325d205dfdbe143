"""tools/extract.py: from a merged detector back to its adapter."""
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine.safe_loading import read_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'


def extract(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['extract.py', *map(str, args)])
    runpy.run_path(str(ROOT / 'tools/extract.py'))['main']()


@pytest.fixture(scope='module')
def merged(tmp_path_factory):
    """A plain checkpoint of a detector whose every trained tensor has moved."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(CONFIG).model)
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(.01 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp('merged') / 'plain.pth'
    torch.save(dict(state_dict=liera_mm.export(model), meta=dict(dataset_meta=dict(classes=tuple('0123456789')))), path)
    return path


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_merged_detector_is_found_again(monkeypatch, capsys, merged, tmp_path, suffix):
    out, expected = tmp_path / f'new/adapter{suffix}', read_checkpoint(merged)['state_dict']
    extract(monkeypatch, CONFIG, merged, out, '--steps', 40)
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in printed if line.endswith('%')}
    assert len(rows) == 35 and float(rows['all'][2].rstrip('%')) < 2
    if suffix == '.pth':
        assert not any('stages.0.0.depthwise_conv.weight' in name for name in read_checkpoint(out)['state_dict'])
        ours = liera_mm.export(init_detector(str(CONFIG), str(out), device='cpu'))
    else:
        page = out.with_suffix('.md').read_text()
        assert 'base_model: "ConvNeXt"' in page and f'extracted from {merged.name}' in page.replace('\\', '')
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(Config.fromfile(CONFIG).model)
        model.init_weights()
        liera_mm.load_adapter(model.backbone, out)
        ours = {f'backbone.{name}': tensor for name, tensor in liera_mm.export(model.backbone).items()}
    for name in ours:
        missed = torch.linalg.vector_norm((ours[name] - expected[name]).double())  # the fit is iterative, and stops early
        assert missed <= .01 * torch.linalg.vector_norm(expected[name].double()), name


def test_the_checkpoint_is_not_overwritten(monkeypatch, merged):
    before = merged.read_bytes()
    with pytest.raises(SetupError, match='plain.pth is read, and would be overwritten'):
        extract(monkeypatch, CONFIG, merged, merged, '--steps', 1)
    assert merged.read_bytes() == before


@pytest.mark.parametrize(('change', 'message'), [
    (lambda state: state.pop('backbone.stages.0.0.norm.weight'), 'the weights lack stages.0.0.norm.weight'),
    (lambda state: state.pop('rpn_head.rpn_cls.weight'), 'missing keys in source state_dict: rpn_head.rpn_cls.weight'),
], ids=['backbone', 'head'])
def test_another_detector(monkeypatch, merged, tmp_path, change, message):
    checkpoint = read_checkpoint(merged)
    change(checkpoint['state_dict'])
    torch.save(checkpoint, tmp_path / 'other.pth')
    with pytest.raises(SetupError, match=f'other.pth does not fit .*: {message}'):
        extract(monkeypatch, CONFIG, tmp_path / 'other.pth', tmp_path / 'out.pth', '--steps', 1)
    assert not (tmp_path / 'out.pth').exists()


def test_config_without_adapter(monkeypatch, merged, tmp_path):
    with pytest.raises(SetupError, match='full_digits.py has no adapted backbone'):
        extract(monkeypatch, str(CONFIG).replace('liera', 'full'), merged, tmp_path / 'out.pth')


def test_output_must_be_of_a_known_kind(monkeypatch, capsys, merged, tmp_path):
    with pytest.raises(SystemExit):
        extract(monkeypatch, CONFIG, merged, tmp_path / 'out.bin')
    assert 'out must be a .pth or .safetensors file' in capsys.readouterr().err
