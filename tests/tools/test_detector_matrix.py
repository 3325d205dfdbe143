"""README's one edit on MMDetection's own configs, in the tool that tries them all; and that each of its columns can fail."""
import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.models import FPN
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

import liera_mm

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/detector_matrix.py'
spec = importlib.util.spec_from_file_location('detector_matrix', TOOL)
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)

CONFIGS = [
    'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
    'pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    'regnet/mask-rcnn_regnetx-400MF_fpn_ms-poly-3x_coco.py',
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'retinanet/retinanet_r18_fpn_1xb8-1x_coco.py',  # the same model
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'yolox/yolox_nano_8xb8-300e_coco.py',
]


def run(out, *arguments):
    return subprocess.run([sys.executable, TOOL, out, *arguments], capture_output=True, text=True, check=True).stdout


def test_configs_of_the_zoo(tmp_path):
    """Frozen stages, what is not adapted, parts that nothing uses; what was tried is not tried again."""
    out = tmp_path / 'out.json'
    printed = run(out, *CONFIGS, '--jobs', '2').strip()
    assert '8 of the 8 configs that stock MMDetection can train here pass every column; 0 of 8 it cannot.' in printed
    results = json.loads(out.read_text())
    assert len(results['rows']) == 7
    assert all(row == dict.fromkeys(matrix.COLUMNS, 'ok') for row in results['rows'].values())
    results['rows'][results['configs'][CONFIGS[3]]] = dict(stock='failed')
    out.write_text(json.dumps(results))
    again = run(out, *CONFIGS)
    assert f'- stock: failed: {CONFIGS[3]}, {CONFIGS[4]}' in again and '6 of the 6 configs' in again
    assert '| retinanet | 2 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |' in again.splitlines()


# Every column can fail


@pytest.fixture(scope='module')
def tiny():
    register_all_modules(init_default_scope=False)
    model = Config.fromfile(matrix.zoo() / CONFIGS[3]).model
    model.backbone.update(base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    model.bbox_head.update(in_channels=8, feat_channels=8)
    return model


def columns(model, folder):
    """The row of a model, in this process."""
    row = {}

    class Sender:
        send = staticmethod(lambda pair: row.update([pair]))

    matrix.columns(matrix.try_training, matrix.COLUMNS[:-1], Sender, 0, model, 'mmdet', folder, 64)
    if row.get(matrix.COLUMNS[-2]) == 'ok':
        matrix.columns(matrix.read_back, matrix.COLUMNS[-1:], Sender, 0, model, 'mmdet', folder, 64)
    return row


def without_delta(model):
    return {name: tensor for name, tensor in model.state_dict().items() if '.adapter.' not in name}


def with_other_strides(model, edited=matrix.edited):
    model = edited(model)
    model['backbone']['backbone']['dilations'] = (1, 1, 1, 2)
    return model


def with_other_parts_frozen(model, edited=matrix.edited):
    model = edited(model)
    model['backbone']['liera']['targets'] = ['no_such_layer']
    return model


SABOTAGE = {  # column: what breaks it, and a part of what it then says
    'stock': (matrix, 'inputs', lambda model, size: None, 'TypeError'),
    'builds': (matrix, 'edited', with_other_parts_frozen, 'no_such_layer'),
    'trains': (liera_mm.core.adapted, 'intended_parameters', lambda model: {'conv1.weight'}, 'conv1.weight'),
    'start': (matrix, 'edited', with_other_strides, 'other features'),
    'moves': (torch.optim, 'Rprop', lambda groups: torch.optim.SGD([dict(group, lr=0.) for group in groups]), 'do not move'),
    'export': (liera_mm, 'export', without_delta, 'other features'),
    'file': (liera_mm, 'load_adapter', lambda model, path: model, 'other features'),
}


@pytest.mark.parametrize('column', [None, *matrix.COLUMNS])
def test_a_column_that_fails_is_the_last(column, tiny, tmp_path, monkeypatch):
    if column:
        where, name, breaks, said = SABOTAGE[column]
        monkeypatch.setattr(where, name, breaks)
    row = columns(copy.deepcopy(tiny), tmp_path)
    if not column:
        assert row == dict.fromkeys(matrix.COLUMNS, 'ok')
        return
    assert list(row) == list(matrix.COLUMNS[:matrix.COLUMNS.index(column) + 1])
    assert said in row.pop(column) and set(row.values()) <= {'ok'}


@pytest.mark.parametrize('weight', [1e-25, 1e25])
def test_gradients_whose_squares_are_no_numbers(weight, tiny, tmp_path):
    model = copy.deepcopy(tiny)
    model.bbox_head.loss_cls.loss_weight = model.bbox_head.loss_bbox.loss_weight = weight
    assert columns(model, tmp_path) == dict.fromkeys(matrix.COLUMNS, 'ok')


@MODELS.register_module()
class UninitialisedFPN(FPN):
    """What it has before its ``init_weights`` is no number, as memory may be none."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.level = torch.nn.Parameter(torch.full((1, ), torch.nan))

    def init_weights(self):
        super().init_weights()
        torch.nn.init.zeros_(self.level)

    def forward(self, inputs):
        return [out + self.level for out in super().forward(inputs)]


def test_parts_that_begin_as_uninitialised_memory(tiny, tmp_path):
    model = copy.deepcopy(tiny)
    model.neck.type = UninitialisedFPN
    assert columns(model, tmp_path) == dict.fromkeys(matrix.COLUMNS, 'ok')


def test_a_process_that_ends_or_hangs_has_a_row():
    def end():
        yield
        import os
        os._exit(3)

    def hang():
        import time
        time.sleep(60)
        yield

    assert matrix.in_process(end, ('a', 'b', 'c'), 60, 0) == dict(a='ok', b='the process ended with 3')
    assert matrix.in_process(hang, ('a', 'b'), .2, 0) == dict(a='took longer than 0.2 s')


def test_folders_take_turns():
    names = ['b/1', 'a/2', 'a/1', 'c/1', 'a/3']
    assert matrix.in_turns(names, False) == ['a/1', 'b/1', 'c/1', 'a/2', 'a/3']
    assert matrix.in_turns(names, True) == ['a/1', 'b/1', 'c/1']


def test_results_are_whole_without_what_is_yet_to_be_tried(tmp_path):
    out = tmp_path / 'out.json'
    out.write_text('{')
    matrix.write(out, dict(configs={'a/1.py': 'x', 'b/1.py': 'y'}, rows={'x': dict(stock='ok')}))
    assert json.loads(out.read_text()) == dict(configs={'a/1.py': 'x'}, rows={'x': dict(stock='ok')})
    assert list(tmp_path.iterdir()) == [out]


def test_models_that_differ_in_what_no_column_depends_on():
    model = dict(type='A', backbone=dict(depth=50), data_preprocessor=dict(type='P', mean=[1]), test_cfg=dict(nms=1))
    same = dict(type='A', backbone=dict(depth=50), data_preprocessor=dict(type='P', mean=[2], std=[1]))
    assert matrix.key_of(model) == matrix.key_of(same)
    for other in (dict(same, type='B'), dict(same, backbone=dict(depth=101)), dict(same, data_preprocessor=dict(type='Q'))):
        assert matrix.key_of(other) != matrix.key_of(model)


def test_only_pretrained_weights_go():
    cfg = dict(init_cfg=dict(type='Pretrained', checkpoint='x'), neck=[dict(init_cfg=dict(type='Xavier'))],
               teacher_ckpt='y', backbone=dict(pretrained='z', depth=3))
    matrix.without_pretrained(cfg)
    assert cfg == dict(init_cfg=None, neck=[dict(init_cfg=dict(type='Xavier'))], teacher_ckpt=None,
                       backbone=dict(pretrained=None, depth=3))
