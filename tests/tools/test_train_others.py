"""Detectors, classifiers and segmentation from the configs of their packages with README's one edit, on tiny data."""
import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

CLASSIFIER = 'configs/classification/resnet50_liera_r8_cub.py'
SEGMENTATION = 'configs/segmentation/upernet_r50_liera_r8_ade20k.py'
COLOURS = [(150, 0, 0), (0, 150, 0), (0, 0, 150), (150, 150, 0)]


def noise(random, colour, size=32):
    return (random.integers(0, 80, (size, size, 3)) + colour).astype(np.uint8)


@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    """CUB-200-2011's layout: 16 images of four classes to train on, 8 to test on."""
    root, random = tmp_path_factory.mktemp('cub'), np.random.default_rng(0)
    (root / 'images').mkdir()
    files = dict(images=[], image_class_labels=[], train_test_split=[])
    for i in range(24):
        Image.fromarray(noise(random, COLOURS[i % 4])).save(root / f'images/{i}.png')
        for lines, value in zip(files.values(), (f'{i}.png', i % 4 + 1, int(i < 16))):
            lines.append(f'{i + 1} {value}\n')
    for name, lines in files.items():
        (root / f'{name}.txt').write_text(''.join(lines))
    return root


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """ADE20K's layout: a square of one of two classes on a third, 6 images to train on and 3 to validate on."""
    root, random = tmp_path_factory.mktemp('ade'), np.random.default_rng(0)
    for split, count in dict(training=6, validation=3).items():
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels, labels = noise(random, COLOURS[0], 64), np.ones((64, 64), np.uint8)
            pixels[16:48, 16:48] = noise(random, COLOURS[1 + i % 2])
            labels[16:48, 16:48] = 2 + i % 2
            Image.fromarray(pixels).save(root / f'images/{split}/{i}.jpg')
            Image.fromarray(labels).save(root / f'annotations/{split}/{i}.png')
    return root


def weights_of(folder, **backbone):
    """A file with random weights of a backbone."""
    path = folder / 'base.pth'
    torch.save(MODELS.build(backbone).state_dict(), path)
    return path


def on_the_cpu(*splits):
    return [f'{split}_dataloader.{option}' for split in splits for option in ('num_workers=0', 'persistent_workers=False')]


def losses_of(printed):
    return [float(loss) for loss in re.findall(r'\(train\).* loss: (\S+)', printed)]


def merged_model(run_tool, config, checkpoint, folder):
    """The model of the config that tools/merge.py writes, with the weights that it writes."""
    run_tool('merge.py', config, checkpoint, folder / 'plain.pth')
    cfg = Config.fromfile(folder / 'plain.py')
    assert 'liera' not in cfg.pretty_text.lower()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    model.load_state_dict(torch.load(folder / 'plain.pth', weights_only=True)['state_dict'], strict=True)
    return model


def test_detector(tiny_digits, run_tool, tmp_path):
    """Faster R-CNN R50 on data in COCO's layout: trained, tested in a fresh process, and merged."""
    base = weights_of(tmp_path, type='mmdet.ResNet', depth=50, base_channels=8)
    classes = [category['name'] for category in json.loads(
        (tiny_digits / 'annotations/instances_train2017.json').read_text())['categories']]
    config = tmp_path / 'faster-rcnn_r50_liera.py'
    config.write_text(f"""
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['liera_mm'])
model = dict(
    backbone=dict(_delete_=True, type='LieRABackbone', backbone={{{{_base_.model.backbone}}}}, liera=dict(rank=8)),
    roi_head=dict(bbox_head=dict(num_classes={len(classes)})))
default_hooks = dict(liera=dict(type='LieRAHook'))
metainfo = dict(classes={classes})
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = dict(dataset=dict(metainfo=metainfo))
""")
    options = ['--cfg-options', f'data_root={tiny_digits}', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
               *on_the_cpu('train', 'val', 'test'), f'model.backbone.backbone.init_cfg.checkpoint={base}',
               'model.backbone.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]',
               'model.roi_head.bbox_head.fc_out_channels=16', 'model.test_cfg.rcnn.score_thr=0.',
               'model.test_cfg.rpn.max_per_img=50',
               'train_dataloader.dataset.pipeline.2.scale=(160,160)', 'val_dataloader.dataset.pipeline.1.scale=(160,160)',
               'test_dataloader.dataset.pipeline.1.scale=(160,160)']
    printed = run_tool('train.py', config, '--work-dir', tmp_path / 'work', *options)
    assert '53 adapted layers' in printed and 'frozen_stages=1 of LieRAResNet is superseded' in printed
    assert len(losses_of(printed)) == 3 and np.isfinite(losses_of(printed)).all()
    tested = run_tool('test.py', config, tmp_path / 'work/epoch_1.pth', '--work-dir', tmp_path / 'tested', *options)
    metrics = [re.findall(r'coco/bbox_mAP\w*: (\S+)', text) for text in (printed, tested)]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 6
    model = merged_model(run_tool, tmp_path / 'work' / config.name, tmp_path / 'work/epoch_1.pth', tmp_path)
    assert type(model.backbone).__name__ == 'ResNet'
    assert not torch.equal(model.backbone.layer1[0].conv1.weight, torch.load(base)['layer1.0.conv1.weight'])


def test_classifier(birds, run_tool, tmp_path):
    state = MODELS.build(dict(type='mmpretrain.ResNet', depth=50, base_channels=8, stem_channels=8)).state_dict()
    torch.save({f'backbone.{name}': tensor for name, tensor in state.items()}, tmp_path / 'base.pth')
    printed = run_tool(
        'train.py', CLASSIFIER, '--work-dir', tmp_path, '--cfg-options', f'data_root={birds}', 'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1', *on_the_cpu('train', 'val', 'test'),
        'train_dataloader.dataset.pipeline.1.scale=32', 'train_dataloader.dataset.pipeline.2.crop_size=32',
        'val_dataloader.dataset.pipeline.1.scale=32', 'val_dataloader.dataset.pipeline.2.crop_size=32',
        f'model.backbone.backbone.init_cfg.checkpoint={tmp_path / "base.pth"}',
        'model.backbone.backbone.base_channels=8', 'model.backbone.backbone.stem_channels=8', 'model.head.in_channels=256')
    assert '53 adapted layers' in printed
    assert len(losses_of(printed)) == 2 and np.isfinite(losses_of(printed)).all()
    assert len(re.findall(r'accuracy/top1: \S+', printed)) == 1


def test_segmentation(scenes, run_tool, tmp_path):
    pytest.importorskip('mmseg', reason='mmsegmentation is not installed')
    base = weights_of(tmp_path, type='mmseg.ResNetV1c', depth=50, base_channels=8, stem_channels=8)
    printed = run_tool(
        'train.py', SEGMENTATION, '--work-dir', tmp_path, '--cfg-options', f'data_root={scenes}', 'train_cfg.max_iters=3',
        'train_cfg.val_interval=3', 'default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=3',
        *on_the_cpu('train', 'val', 'test'), f'model.pretrained={base}', 'model.data_preprocessor.size=(64,64)',
        'model.backbone.backbone.base_channels=8', 'model.backbone.backbone.stem_channels=8',
        'model.decode_head.in_channels=[32,64,128,256]', 'model.decode_head.channels=16',
        'model.auxiliary_head.in_channels=128', 'model.auxiliary_head.channels=16',
        'train_dataloader.dataset.pipeline.2.scale=(64,64)', 'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)')
    assert '55 adapted layers' in printed
    assert len(losses_of(printed)) == 3 and np.isfinite(losses_of(printed)).all()
    assert len(re.findall(r'mIoU: \S+', printed)) == 1
    model = merged_model(run_tool, tmp_path / 'upernet_r50_liera_r8_ade20k.py', tmp_path / 'iter_3.pth', tmp_path)
    assert type(model.backbone).__name__ == 'ResNetV1c'
