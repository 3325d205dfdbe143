"""tools/merge.py: its output gives the adapted detector's predictions in MMDetection without this package."""
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, DefaultScope

from liera_mm.core.errors import SetupError
from liera_mm.engine.checkpoint import leave_out_base
from liera_mm.engine.config_tree import dicts
from liera_mm.engine.plain import plain_config

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
LIERA = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'

spec = importlib.util.spec_from_file_location('merge_tool', ROOT / 'tools/merge.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

# What each config changes in the model of LIERA
CONFIGS = {
    'taylor': '',
    'exp': "backbone=dict(linear_pw_conv=False, liera=dict(update='exp')), ",
    'dora': "backbone=dict(liera=dict(method='dora', train_norm=True)), ",
    'frozen': 'backbone=dict(liera=None), ',
    'around': """backbone=dict(
    _delete_=True, type='LieRABackbone', liera=dict(rank=2), backbone=dict(
        type='mmpretrain.ConvNeXt', arch=dict(depths=[2, 2, 4, 2], channels=[24, 48, 96, 192]), out_indices=[0, 1, 2, 3],
        layer_scale_init_value=0., use_grn=True, gap_before_final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint='liera://mask-rcnn_convnextv2-mini_glyphs', prefix='backbone.'))), """,
}

STOCK = '''
from mmdet.apis import inference_detector, init_detector

for merged in sys.argv[2:]:
    detector = init_detector(merged.replace('.pth', '.py'), merged, device='cpu')
    result = inference_detector(detector, sys.argv[1])
    torch.save(dict(result.pred_instances.items(), classes=detector.dataset_meta['classes'],
                    type=type(detector.backbone).__name__), merged + '.result')
'''


def merge(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['merge.py', *map(str, args)])
    tool.main()


@pytest.fixture(scope='module')
def picture(tiny_digits):
    return str(next((tiny_digits / 'val2017').iterdir()))


@pytest.fixture(scope='module')
def detectors(tmp_path_factory):
    """Config and checkpoint of a detector for each of CONFIGS; all trained tensors of their backbones have moved."""
    folder, files = tmp_path_factory.mktemp('adapted'), {}
    for name, change in CONFIGS.items():
        config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
        config.write_text(f"_base_ = '{LIERA}'\nmodel = dict({change}test_cfg=dict(rcnn=dict(score_thr=0.)))")
        cfg = Config.fromfile(config)
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(cfg.model)
        model.init_weights()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.requires_grad:
                    parameter.add_(.02 * torch.randn_like(parameter))
        torch.save(model.state_dict(), folder / f'{name}.whole')
        content = dict(meta=dict(dataset_meta=dict(classes=cfg.classes), cfg=cfg.pretty_text), state_dict=model.state_dict())
        leave_out_base(model, content)
        torch.save(content, checkpoint)
        files[name] = (config, checkpoint)
    return files


@pytest.fixture(scope='module')
def merged(tmp_path_factory, detectors, picture, run_stock):
    """What the tool wrote, and what stock MMDetection predicts with it."""
    folder = tmp_path_factory.mktemp('merged') / 'new'
    with pytest.MonkeyPatch.context() as patch:
        for name, files in detectors.items():
            merge(patch, *files, folder / f'{name}.pth')
    files = [str(folder / f'{name}.pth') for name in detectors]
    run_stock(STOCK, picture, *files, cwd=folder)
    return {name: (torch.load(file, weights_only=False), torch.load(file + '.result', weights_only=False))
            for name, file in zip(detectors, files)}


@pytest.mark.parametrize('name', CONFIGS)
def test_same_predictions_without_this_package(detectors, merged, picture, name):
    config, checkpoint = map(str, detectors[name])
    expected = inference_detector(init_detector(config, checkpoint, device='cpu'), picture).pred_instances
    ours = merged[name][1]
    assert ours['type'] == 'ConvNeXt' and ours['classes'] == tuple('0123456789')
    assert len(expected) > 10
    assert torch.equal(ours['labels'], expected.labels)
    assert (ours['masks'] == expected.masks).float().mean() > .999
    for key in ('bboxes', 'scores'):
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_perturbation_is_in_the_weights(detectors, merged, name):
    before, after = torch.load(detectors[name][1].with_suffix('.whole')), merged[name][0]['state_dict']
    assert set(after) == {key for key in before if '.adapter.' not in key}
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed == {key.split('adapter.')[0] + 'weight' for key in before if '.adapter.' in key}
    assert bool(changed) == (name != 'frozen')


def test_plain_config(detectors, tmp_path, monkeypatch):
    merge(monkeypatch, *detectors['taylor'], tmp_path / 'plain.pth')
    cfg = Config.fromfile(tmp_path / 'plain.py')
    assert 'liera' not in str([cfg.model, cfg.custom_hooks, cfg.custom_imports]).lower()
    assert cfg.model.backbone.type == 'mmpretrain.ConvNeXt'


def test_without_a_default_scope(detectors, tmp_path, monkeypatch):
    """As configs in MMEngine's pure Python style, whose types are classes, may be."""
    config, checkpoint = detectors['around']
    cfg = Config.fromfile(config)
    for _, node in dicts(cfg.model, 'model'):
        if node.get('type') in [*MODELS.children['mmdet'].module_dict, *TASK_UTILS.children['mmdet'].module_dict]:
            node.type = f'mmdet.{node.type}'
    cfg.default_scope = None
    cfg.dump(tmp_path / 'own.py')
    merge(monkeypatch, tmp_path / 'own.py', checkpoint, tmp_path / 'plain.pth')
    merge(monkeypatch, config, checkpoint, tmp_path / 'same.pth')
    same, state = (torch.load(tmp_path / f'{name}.pth')['state_dict'] for name in ('same', 'plain'))
    assert state.keys() == same.keys() and all(torch.equal(state[name], same[name]) for name in same)
    assert Config.fromfile(tmp_path / 'plain.py').default_scope is None


def test_other_imports_and_hooks_stay(detectors, tmp_path, monkeypatch):
    """A user's own modules are still needed."""
    config, checkpoint = detectors['taylor']
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = '{config}'\ncustom_imports = dict(imports=['liera_mm', 'json'], allow_failed_imports=False)\n"
                   "custom_hooks = [dict(type='LieRAHook'), dict(type='EMAHook')]")
    merge(monkeypatch, own, checkpoint, tmp_path / 'plain.pth')
    cfg = Config.fromfile(tmp_path / 'plain.py')
    assert cfg.custom_hooks == [dict(type='EMAHook')]
    assert cfg.custom_imports.imports == ['json', 'mmpretrain.models']


# Detectors that write into their config while they are built
DETRS = {
    'detr': ('detr/detr_r50_8xb2-150e_coco.py', dict(in_channels=[512])),
    'deformable_detr': ('deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
                        dict(in_channels=[128, 256, 512])),
    'dino': ('dino/dino-4scale_r50_8xb2-12e_coco.py', dict(in_channels=[128, 256, 512])),
    'ddq': ('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', dict(in_channels=[128, 256, 512])),
}


@pytest.mark.parametrize('name', DETRS)
def test_configs_that_the_detector_changes(monkeypatch, tmp_path, name):
    base, neck = DETRS[name]
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'checkpoint.pth'
    indices = [3] if name == 'detr' else [1, 2, 3]
    resnet = dict(type='ResNet', depth=18, out_indices=indices, norm_cfg=dict(type='BN', requires_grad=False))
    model = dict(neck=neck, encoder=dict(num_layers=1), decoder=dict(num_layers=2), num_queries=20, backbone=dict(
        _delete_=True, type='LieRABackbone', backbone=resnet, liera=dict(rank=1, targets=['conv1'])))
    config.write_text(f"_base_ = 'mmdet::{base}'\ncustom_imports = dict(imports=['liera_mm'])\nmodel = {model}")
    with DefaultScope.overwrite_default_scope('mmdet'):
        detector = MODELS.build(Config.fromfile(config).model)
        if name == 'ddq':
            detector.decoder.aux_reg_branches = detector.bbox_head.aux_reg_branches  # as its forward pass does
        for parameter in detector.parameters():
            parameter.data.nan_to_num_()  # some are what was in memory, until init_weights()
        torch.save(dict(state_dict=detector.state_dict()), checkpoint)
        merge(monkeypatch, config, checkpoint, tmp_path / 'plain.pth')
        cfg = Config.fromfile(tmp_path / 'plain.py')
        assert cfg.to_dict() == plain_config(Config.fromfile(config)).to_dict()
        assert cfg.model.backbone == resnet
        stock = MODELS.build(cfg.model)
        stock.load_state_dict(torch.load(tmp_path / 'plain.pth')['state_dict'])
    assert type(stock.backbone).__module__.startswith('mmdet.')


def test_doubles_are_left_out_only_where_they_are_doubles(monkeypatch, detectors, tmp_path):
    config, checkpoint = detectors['taylor']
    content = torch.load(checkpoint.with_suffix('.whole'))
    name = 'rpn_head.rpn_conv.weight'
    torch.save({**content, 'neck.again.weight': content[name].clone()}, tmp_path / 'twice.pth')
    merge(monkeypatch, config, tmp_path / 'twice.pth', tmp_path / 'plain.pth')
    assert 'neck.again.weight' not in torch.load(tmp_path / 'plain.pth')['state_dict']
    torch.save({**content, 'neck.again.weight': content[name] + 1}, tmp_path / 'more.pth')
    problem, _ = refused(monkeypatch, config, tmp_path / 'more.pth', tmp_path / 'out.pth')
    assert 'neck.again.weight' in problem


def test_options(monkeypatch, detectors, tmp_path):
    """A checkpoint that was trained with --cfg-options is merged with them."""
    config, checkpoint = detectors['taylor']
    merge(monkeypatch, config, detectors['exp'][1], tmp_path / 'plain.pth', '--cfg-options',
          'model.backbone.liera.update=exp', 'model.backbone.linear_pw_conv=False')
    assert Config.fromfile(tmp_path / 'plain.py').model.backbone.linear_pw_conv is False


def test_what_stands_for_nothing_is_refused_before_anything_is_written(monkeypatch, detectors, tmp_path):
    config, checkpoint = detectors['taylor']

    class Later:
        __module__ = 'liera_mm.later'

    monkeypatch.setitem(MODELS._module_dict, 'Later', Later)
    (tmp_path / 'own.py').write_text(f"_base_ = '{config}'\nmodel = dict(test_cfg=dict(rcnn=dict(part=dict(type='Later'))))")
    problem, _ = refused(monkeypatch, tmp_path / 'own.py', checkpoint, tmp_path / 'out.pth')
    assert problem.startswith('model.test_cfg.rcnn.part.type is Later of liera_mm')


def refused(monkeypatch, *args):
    with pytest.raises(SetupError) as error:
        merge(monkeypatch, *args)
    problem, remedy = str(error.value).splitlines()
    assert not args[-1].exists()
    return problem, remedy


def test_missing_config(monkeypatch, detectors, tmp_path):
    problem, _ = refused(monkeypatch, tmp_path / 'none.py', detectors['taylor'][1], tmp_path / 'out.pth')
    assert problem == f'Config not found: {tmp_path}/none.py'


def test_missing_checkpoint(monkeypatch, detectors, tmp_path):
    problem, _ = refused(monkeypatch, detectors['taylor'][0], tmp_path / 'none.pth', tmp_path / 'out.pth')
    assert problem == f'Checkpoint not found: {tmp_path}/none.pth'


@pytest.mark.parametrize('theirs', ['frozen', 'around', 'dora', 'exp'])
def test_checkpoint_of_another_config(monkeypatch, detectors, tmp_path, theirs):
    """Fewer adapters, another rank, other tensors; the last has the same tensors with another meaning."""
    config, checkpoint = detectors['taylor'][0], detectors[theirs][1]
    problem, remedy = refused(monkeypatch, config, checkpoint, tmp_path / 'out.pth')
    assert problem.startswith(f'{checkpoint} was not trained with {config}: ') and 'config' in remedy


def test_whole_checkpoint(monkeypatch, detectors, merged, tmp_path):
    """One that holds the frozen weights too, as a training without init_cfg and load_from leaves it."""
    config, checkpoint = detectors['taylor']
    merge(monkeypatch, config, checkpoint.with_suffix('.whole'), tmp_path / 'plain.pth')
    ours, theirs = torch.load(tmp_path / 'plain.pth')['state_dict'], merged['taylor'][0]['state_dict']
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize('content', [b'not a checkpoint', b'', b'PK\x03\x04'], ids=['text', 'empty', 'truncated'])
def test_not_a_checkpoint(monkeypatch, detectors, tmp_path, content):
    (tmp_path / 'bad.pth').write_bytes(content)
    problem, _ = refused(monkeypatch, detectors['taylor'][0], tmp_path / 'bad.pth', tmp_path / 'out.pth')
    assert str(tmp_path / 'bad.pth') in problem


@pytest.mark.parametrize('name', ['taylor.pth', 'config.pth'])
def test_nothing_that_is_read_is_overwritten(monkeypatch, detectors, tmp_path, name):
    config, checkpoint = (shutil.copy(path, tmp_path / new) for path, new in
                          zip(detectors['taylor'], ('config.py', 'taylor.pth')))
    before = config.read_bytes(), checkpoint.read_bytes()
    with pytest.raises(SetupError, match='is read, and would be overwritten'):
        merge(monkeypatch, config, checkpoint, tmp_path / '..' / tmp_path.name / name)
    assert (config.read_bytes(), checkpoint.read_bytes()) == before and len([*tmp_path.iterdir()]) == 2


def test_output_must_be_a_pth_file(monkeypatch, capsys, detectors, tmp_path):
    with pytest.raises(SystemExit) as error:
        merge(monkeypatch, *detectors['taylor'], tmp_path / 'out.safetensors')
    assert error.value.code == 2
    assert f'out must be a .pth file, not {tmp_path}/out.safetensors' in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]
