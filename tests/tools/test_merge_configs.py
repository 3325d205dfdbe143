"""tools/merge.py on every config: what it writes trains and tests in MMDetection without this package."""
import copy
import importlib.util
import json
import os.path as osp
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / 'configs').rglob('*.py')) if '_base_' not in path.parts
           and (path.parent.name != 'segmentation' or importlib.util.find_spec('mmseg'))}
COCO = [name for name, path in CONFIGS.items() if path.parent.name == 'configs']
ARCH = dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16])

# What makes each family small; weights come from the checkpoint alone
SMALL = dict(
    configs=dict(
        model=dict(
            backbone=dict(arch=dict(ARCH, _delete_=True), init_cfg=None),
            neck=dict(in_channels=ARCH['channels'], out_channels=8),
            rpn_head=dict(in_channels=8, feat_channels=8),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=8),
                bbox_head=dict(in_channels=8, fc_out_channels=8, num_classes=1),
                mask_roi_extractor=dict(out_channels=8),
                mask_head=dict(in_channels=8, conv_out_channels=8, num_classes=1)))),
    classification=dict(),
    digits=dict(),
    own_data=dict(model=dict(roi_head=dict(bbox_head=dict(num_classes=1)))),
    segmentation=dict(),
    transfer=dict(),
    vtab=dict(model=dict(backbone=dict(arch=dict(ARCH, _delete_=True), init_cfg=None), head=dict(in_channels=16))))

TRAIN_AND_TEST = '''
import ast
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

for merged in sys.argv[2:]:
    cfg = Config.fromfile(merged.replace('.pth', '.py'))
    cfg.merge_from_dict(ast.literal_eval(sys.argv[1]))
    for option in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg.pop(option)
    cfg.work_dir, cfg.load_from = merged.replace('.pth', ''), merged
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    weights = torch.load(merged)['state_dict']
    trained = runner.train()
    trained = getattr(trained, 'module', trained).state_dict()
    assert trained.keys() == weights.keys() and any(not torch.equal(trained[key], weights[key]) for key in weights)
    runner.test()
'''


@pytest.fixture(scope='module')
def merged(tmp_path_factory):
    """What the tool writes for every config, by its name: checkpoints, with their configs beside them."""
    folder, files = tmp_path_factory.mktemp('merged'), {}
    spec = importlib.util.spec_from_file_location('merge_tool', ROOT / 'tools/merge.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))  # a second for each
        for name, path in CONFIGS.items():
            config, checkpoint = folder / f'{name}_small.py', folder / f'{name}_small.pth'
            config.write_text(Config(dict(SMALL[path.parent.name], _base_=str(path))).pretty_text)
            cfg = Config.fromfile(config)
            with DefaultScope.overwrite_default_scope(cfg.default_scope):
                torch.save(dict(state_dict=MODELS.build(copy.deepcopy(cfg.model)).state_dict(), meta={}), checkpoint)
            files[name] = folder / f'{name}.pth'
            patch.setattr(tool, 'load_config', lambda *_, cfg=cfg: cfg)  # reading it again takes another
            patch.setattr(sys, 'argv', ['merge.py', str(config), str(checkpoint), str(files[name])])
            tool.main()
    return files


@pytest.mark.parametrize('name', CONFIGS)
def test_nothing_of_ours_is_left(merged, name):
    cfg = Config.fromfile(merged[name].with_suffix('.py')).to_dict()
    ours = {'liera', 'fast'}

    def look(node, key):
        if isinstance(node, dict):
            assert ours.isdisjoint(node), key
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(child, (dict, list, tuple)):
                look(child, f'{key}.{name}')
            elif isinstance(child, str):
                assert not child.startswith(('LieRA', 'Device', 'FullyShard', 'liera')), f'{key}.{name}: {child}'

    look(cfg, 'cfg')
    assert not any('adapter' in key for key in torch.load(merged[name])['state_dict'])


def test_coco_configs_train_and_test_without_this_package(merged, run_stock, tmp_path):
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(2):
        cv2.imwrite(str(tmp_path / f'{i}.jpg'), rng.integers(0, 255, (64, 64, 3)).astype(np.uint8))
        images.append(dict(id=i, file_name=f'{i}.jpg', width=64, height=64))
        annotations.append(dict(id=i + 1, image_id=i, category_id=1, bbox=[8, 8, 40, 40], area=1600, iscrowd=0,
                                segmentation=[[8, 8, 48, 8, 48, 48, 8, 48]]))
    annotations = dict(images=images, annotations=annotations, categories=[dict(id=1, name='person')])
    (tmp_path / 'all.json').write_text(json.dumps(annotations))
    options = {
        'optim_wrapper.type': 'OptimWrapper',  # autocast of MMEngine needs a GPU
        'train_cfg.max_epochs': 1,
        'log_level': 'ERROR',
        'train_dataloader.dataset.pipeline.2.scale': (64, 64),
        'train_dataloader.dataset.pipeline.2.ratio_range': (1., 1.),
        'train_dataloader.dataset.pipeline.3.crop_size': (64, 64),
        'test_dataloader.dataset.pipeline.1.scale': (64, 64),
        'test_evaluator.ann_file': str(tmp_path / 'all.json'),
        'train_dataloader.batch_size': 2,
        'train_dataloader.pin_memory': False,
        'model.test_cfg.rcnn.score_thr': 0.,
        'param_scheduler.0.start_factor': 1.,
    }
    for split in ('train', 'test'):
        options.update({f'{split}_dataloader.{option}': value for option, value in dict(
            num_workers=0, persistent_workers=False).items()})
        options.update({f'{split}_dataloader.dataset.{option}': value for option, value in dict(
            data_root='', ann_file=str(tmp_path / 'all.json'), data_prefix=dict(img=str(tmp_path)),
            metainfo=dict(classes=['person'])).items()})
    # Methods and ranks are in the weights alone; of configs that came out the same one is enough
    different = {Config.fromfile(merged[name].with_suffix('.py')).pretty_text: name for name in COCO}
    different = sorted(different.values())
    assert len(COCO) >= 14 and len(different) >= 3
    run_stock(TRAIN_AND_TEST, options, *(merged[name] for name in different), cwd=tmp_path)
    assert sorted(osp.basename(path.parent) for path in merged[COCO[0]].parent.glob('*/epoch_1.pth')) == different
