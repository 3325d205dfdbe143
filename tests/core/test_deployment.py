"""The page on deployment: each of its blocks runs, and gives what the adapted model gives."""
import re
import sys
from pathlib import Path

import pytest
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import liera_mm

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/deployment.md').read_text()
COMMAND, = re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL)
DETECTOR, MEMORY, TRACE, EXPORT, ONNX, FLOPS = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs a block in an empty folder, in the variables of those before."""
    monkeypatch.chdir(tmp_path)
    variables = {}

    def run(block):
        exec(compile(block, 'docs/deployment.md', 'exec'), variables)
        return variables

    return run


@pytest.fixture
def backbone(run, monkeypatch, perturb):
    """The backbone of the page after merge_and_unload; its adapters had been trained. And what it computed before."""
    before = {}
    unload = liera_mm.merge_and_unload

    def trained(model):
        before['image'] = torch.randn(1, 3, 64, 64)
        before['outputs'] = perturb(model)(before['image'])
        before['model'] = type(model)
        return unload(model)

    monkeypatch.setattr(liera_mm, 'merge_and_unload', trained)
    backbone = run(MEMORY)['backbone']
    assert before['model'] is liera_mm.LieRAConvNeXt and type(backbone).__module__.startswith('mmpretrain.')
    return backbone, before['image'], before['outputs']


def assert_close(ours, expected):
    assert len(ours) == len(expected) == 4
    for a, b in zip(ours, expected):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-3, atol=1e-4)


def test_a_detector(run, perturb):
    config = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=perturb(model).state_dict(), meta={}), 'trained.pth')
    words = COMMAND.replace('CONFIG', str(config)).replace('CHECKPOINT', 'trained.pth').split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', words)
        exec(compile((ROOT / words[0]).read_text(), words[0], 'exec'), dict(__name__='__main__'))
    detector = run(DETECTOR)['detector']
    state, expected = detector.state_dict(), liera_mm.export(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


def test_in_memory(backbone):
    model, image, expected = backbone
    assert_close(model(image), expected)


def test_torchscript(run, backbone):
    model, image, expected = backbone
    run(TRACE)
    assert_close(torch.jit.load('backbone.pt')(image), expected)


def test_torch_export(run, backbone):
    model, image, expected = backbone
    run(TRACE.partition('\n')[0])
    run(EXPORT)
    assert_close(torch.export.load('backbone.pt2').module()(image), expected)


def test_onnx(run, backbone):
    pytest.importorskip('onnxscript')
    reference = pytest.importorskip('onnx.reference')
    model, image, expected = backbone
    run(TRACE.partition('\n')[0])
    run(ONNX)
    session = reference.ReferenceEvaluator('backbone.onnx')
    assert_close(session.run(None, {session.input_names[0]: image.numpy()}), expected)


def test_flops(run, backbone, capsys):
    """They are those of the model without this package."""
    run(FLOPS)
    stock = MODELS.build(dict(
        type='mmpretrain.ConvNeXt', arch=dict(depths=[2, 2, 4, 2], channels=[24, 48, 96, 192]), out_indices=[0, 1, 2, 3],
        layer_scale_init_value=0., use_grn=True, gap_before_final_norm=False))
    flops = get_model_complexity_info(stock, (3, 64, 64))['flops']
    assert capsys.readouterr().out.endswith(f'{flops / 1e9:.3f} G multiplications and additions, counted as one\n')
    assert flops > 1e7
