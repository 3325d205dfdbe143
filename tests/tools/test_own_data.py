"""docs/own_data.md: from photographs with boxes in VOC's files to pictures of detections, with the config of the page."""
import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

pytest.importorskip('globox')

from liera_mm.engine.cli import load_config

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs/own_data.md').read_text()
CLASSES = ['blue: "big"', 'red']


@pytest.fixture(scope='module')
def call(tmp_path_factory):
    """A function that calls a tool in this process, which is on the CPU."""
    sys.path.append(str(ROOT / 'tools/dataset_converters'))
    tools = {name: runpy.run_path(str(ROOT / f'tools/{name}.py'))['main'] for name in (
        'dataset_converters/to_coco', 'check_data', 'train', 'test', 'merge', 'predict')}

    def run(name, *args):
        with pytest.MonkeyPatch.context() as patch, DefaultScope.overwrite_default_scope('mmdet'):
            patch.setattr('mmengine.device.utils.DEVICE', 'cpu')
            patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))  # of the config, for the log
            patch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
            tools[name]()

    yield run
    sys.path.pop()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Nine photographs of squares with VOC's files, a config as on the page, and weights for it."""
    folder, rng = tmp_path_factory.mktemp('mine'), np.random.default_rng(0)
    for name in ('photos', 'labels'):
        (folder / name).mkdir()
    for number in range(9):
        image, objects = rng.integers(100, 150, (96, 96, 3), np.uint8), ''
        for left, name, colour in ((8, CLASSES[0].replace('"', '&quot;'), (255, 0, 0)), (56, CLASSES[1], (0, 0, 255))):
            top = int(rng.integers(5, 55))
            image[top:top + 32, left:left + 32] = colour
            objects += (f'<object><name>{name}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{left + 32}</xmax>'
                        f'<ymax>{top + 32}</ymax></bndbox></object>')
        cv2.imwrite(str(folder / f'photos/{number}.png'), image)
        (folder / f'labels/{number}.xml').write_text(
            f'<annotation><filename>{number}.png</filename><size><width>96</width><height>96</height></size>{objects}'
            '</annotation>')
    text = re.search(r"```python\n(_base_.*?)```", PAGE, re.DOTALL)[1]
    assert len(text.splitlines()) <= 15
    (folder / 'config.py').write_text(text.replace('../_base_', str(ROOT / 'configs/_base_')))
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        torch.save(MODELS.build(dict(type='MobileNetV2')).state_dict(), folder / 'weights.pth')
    return folder


@pytest.fixture(scope='module')
def options(folder):
    return ['--cfg-options', f'data_root={folder}', f'model.backbone.backbone.init_cfg.checkpoint={folder}/weights.pth',
            'train_cfg.max_epochs=1', 'train_dataloader.dataset.times=1',
            'train_dataloader.dataset.dataset.pipeline.3.scale=(96,96)',
            *(f'{split}_dataloader.dataset.pipeline.1.scale=(96,96)' for split in ('val', 'test')),
            *(f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
              for option in ('num_workers=0', 'persistent_workers=False'))]


def test_from_photographs_to_detections(call, folder, options, capsys):
    """Every tool has the classes of the annotations, from the same config or the one that the training wrote."""
    call('dataset_converters/to_coco', folder / 'photos', folder / 'labels', folder)
    config, work_dir = folder / 'config.py', folder / 'work_dir'
    call('check_data', config, '--out', folder / 'sheets', *options)
    printed = capsys.readouterr().out
    assert re.search(r'blue: "big" +7 +7 ', printed) and re.search(r'red +2 +2 ', printed)
    assert {path.name for path in (folder / 'sheets').iterdir()} == {'train.jpg', 'val.jpg'}
    assert cv2.imread(str(folder / 'sheets/train.jpg')).shape[0] > 3 * 640
    call('train', config, '--work-dir', work_dir, *options, 'experiment_name=own_data')
    checkpoint = work_dir / 'epoch_2.pth'
    call('train', config, '--work-dir', work_dir, '--resume', *options, 'train_cfg.max_epochs=2',
         'experiment_name=own_data_resumed')
    assert torch.load(checkpoint, weights_only=False)['meta']['dataset_meta']['classes'] == tuple(CLASSES)
    call('test', config, checkpoint, '--work-dir', work_dir / 'test', *options, 'experiment_name=own_data_test')
    assert 'coco/bbox_mAP' in next((work_dir / 'test').glob('*/*.json')).read_text()
    call('merge', config, checkpoint, folder / 'merged.pth', *options)
    for number, used in enumerate((config, work_dir / 'config.py', folder / 'merged.py')):
        cfg = Config.fromfile(used)
        if used != config:
            assert 'auto_classes' not in cfg and cfg.model.roi_head.bbox_head.num_classes == 2
            assert [*cfg.train_dataloader.dataset.dataset.metainfo.classes] == CLASSES
            for path in folder.glob('*.json'):  # predicts where the data are not
                path.unlink()
        call('predict', used, folder / 'merged.pth' if 'merged' in used.name else checkpoint, folder / 'photos', '--out',
             folder / f'out{number}', '--score-thr', 0, *(options if used == config else ()))
        images = json.loads((folder / f'out{number}/images.json').read_text())
        assert [category['name'] for category in images['categories']] == CLASSES and len(images['images']) == 9
        assert len(list((folder / f'out{number}/vis').iterdir())) == 9
    results = [json.loads((folder / f'out{number}/predictions.json').read_text()) for number in range(2)]
    assert results[0] == results[1] and results[0]


@pytest.mark.parametrize('path', sorted((ROOT / 'configs/own_data').glob('*.py')), ids=lambda path: path.stem)
def test_configs(path, tmp_path):
    """They are as short as the page says, and all that they name but data and classes is in their base."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != '#']
    assert len(lines) <= 15
    (tmp_path / 'annotations').mkdir()
    for split in ('train', 'val', 'test'):
        (tmp_path / f'annotations/instances_{split}2017.json').write_text('{"categories": [{"id": 1, "name": "Tree"}]}')
    cfg = load_config(str(path), dict(data_root=str(tmp_path)))
    base = Config.fromfile(ROOT / 'configs/_base_/faster-rcnn_mobilenetv2_own-data.py')
    assert cfg.model.roi_head.bbox_head.pop('num_classes') == 1 and not base.model.roi_head.bbox_head.pop('num_classes')
    assert cfg.model == base.model and cfg.optim_wrapper == base.optim_wrapper
    assert cfg.custom_hooks == [dict(type='LieRAHook')]
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        model = MODELS.build(cfg.model)
    sizes = [float(anchor[2] - anchor[0]) * float(anchor[3] - anchor[1]) for anchors in
             model.rpn_head.prior_generator.base_anchors for anchor in anchors]
    assert (round(min(sizes)**.5), round(max(sizes)**.5)) == (16, 362)
