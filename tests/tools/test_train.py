"""tools/train.py and tools/test.py, each in a process of its own."""
import json
import math
import multiprocessing
import pickle
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.registry import MODELS
from pycocotools.mask import decode

ROOT = Path(__file__).parents[2]
DIGITS = 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
LOOKALIKE = 'configs/mask-rcnn_convnextv2-b_lier\u0430_r16.py'
COCO = 'configs/mask-rcnn_convnextv2-b_liera_r16.py'


@pytest.fixture(scope='module')
def trained(tmp_path_factory, run_tool, tiny_options):
    """Work dir of a training of one epoch, its metrics, and what it printed."""
    work_dir = tmp_path_factory.mktemp('trained')
    printed = run_tool('train.py', DIGITS, '--work-dir', work_dir, *tiny_options)
    return work_dir, metrics_of(work_dir), printed


def metrics_of(work_dir):
    """The last metrics in the only log of a work dir."""
    file, = [*work_dir.glob('*/vis_data/scalars.json')]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {name: value for name, value in lines[-1].items() if name.startswith('coco/')}


def test_training_prints_the_summary(trained):
    assert trained[2].count('34 adapted layers with 226,984 parameters') == 1
    assert 'LieRA  largest |Δ|: ' in trained[2]


def test_no_worker_outlives_the_training(tmp_path, monkeypatch, tiny_options):
    """At exit, torch would wait for each."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, 'argv', [
        'train.py', DIGITS, '--work-dir', str(tmp_path), *tiny_options, 'train_dataloader.num_workers=2',
        'train_dataloader.persistent_workers=True', 'train_cfg.val_interval=9'])
    started, start = [], multiprocessing.Process.start
    monkeypatch.setattr(multiprocessing.Process, 'start', lambda worker: started.append(worker) or start(worker))
    runpy.run_path('tools/train.py')['main']()
    assert len(started) == 2 and not any(worker.is_alive() for worker in started)


@pytest.fixture(scope='module')
def tested(tmp_path_factory, trained, run_tool, tiny_options):
    """Work dir of a test of that checkpoint, and its metrics and predictions."""
    out = tmp_path_factory.mktemp('tested')
    run_tool('test.py', DIGITS, trained[0] / 'epoch_1.pth', '--work-dir', out, '--out', out / 'out.pkl',
             '--show-dir', 'shown', *tiny_options)
    file, = [*out.glob('*/*.json')]
    return out, json.loads(file.read_text()), pickle.loads((out / 'out.pkl').read_bytes())


def test_fresh_process_gives_the_metrics_of_training(trained, tested):
    _, metrics, _ = trained
    assert metrics['coco/bbox_mAP'] > 0 and 'coco/segm_mAP' in metrics
    assert {name: tested[1][name] for name in metrics} == metrics


def test_predictions_are_those_of_the_checkpoint(trained, tested, tiny_digits):
    """Computed here without merging."""
    images = sorted((tiny_digits / 'val2017').glob('*.jpg'))
    work_dir, predictions = trained[0], tested[2]
    assert [prediction['img_path'] for prediction in predictions] == [str(image) for image in images]
    detector = init_detector(str(work_dir / Path(DIGITS).name), str(work_dir / 'epoch_1.pth'), device='cpu')
    expected, ours = inference_detector(detector, str(images[0])).pred_instances, predictions[0]['pred_instances']
    assert len(expected) > 0
    for name in ('bboxes', 'scores', 'labels'):
        torch.testing.assert_close(ours[name], expected[name])
    assert (decode(ours['masks']) == expected.masks.numpy().transpose(1, 2, 0)).mean() > .999


def test_pictures(tested, tiny_digits):
    assert len([*tested[0].glob('*/shown/*.*')]) == len([*(tiny_digits / 'val2017').iterdir()])


def test_test_time_augmentation(trained, tested, run_tool, tiny_options, tmp_path):
    """MMDetection merges boxes only: a mask head has to stay out of it."""
    printed = run_tool('test.py', DIGITS, trained[0] / 'epoch_1.pth', '--work-dir', tmp_path, '--tta',
                       '--out', tmp_path / 'out.pkl', *tiny_options)
    assert printed.count('testing boxes only') == 1
    file, = [*tmp_path.glob('*/*.json')]
    metrics = json.loads(file.read_text())
    assert metrics['coco/bbox_mAP'] > 0 and 'coco/segm_mAP' not in metrics
    instances = [[prediction['pred_instances'] for prediction in predictions]
                 for predictions in (pickle.loads((tmp_path / 'out.pkl').read_bytes()), tested[2])]
    assert any(not torch.equal(flipped['bboxes'], plain['bboxes']) for flipped, plain in zip(*instances))
    assert 'masks' not in instances[0][0]


def test_resume(trained, run_tool, tiny_options, tmp_path):
    """Finds the latest checkpoint of the work dir, and goes on behind it."""
    (tmp_path / 'epoch_1.pth').write_bytes((trained[0] / 'epoch_1.pth').read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    printed = run_tool('train.py', DIGITS, '--work-dir', tmp_path, '--resume', *tiny_options, 'train_cfg.max_epochs=2')
    assert 'resumed epoch: 1, iter: 3' in printed
    assert 'Epoch(train) [2]' in printed and 'Epoch(train) [1]' not in printed
    first, second = (torch.load(tmp_path / f'epoch_{i}.pth', weights_only=False) for i in (1, 2))
    assert second['meta']['epoch'] == 2 and second['meta']['iter'] == 6
    name = 'backbone.stages.0.0.depthwise_conv.adapter.B'
    assert not torch.equal(first['state_dict'][name], second['state_dict'][name])


def test_coco_config_at_a_small_size(run_tool, tiny_coco, tmp_path):
    """The config of the paper, asked for with a Cyrillic letter in its name, on digits that bear the names of COCO."""
    backbone = MODELS.build(dict(type='mmpretrain.ConvNeXt', arch='atto', layer_scale_init_value=0., use_grn=True))
    torch.save({f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}, tmp_path / 'base.pth')
    printed = run_tool(
        'train.py', LOOKALIKE, '--work-dir', tmp_path / 'work_dir', '--cfg-options',
        f'data_root={tiny_coco}', f'model.backbone.init_cfg.checkpoint={tmp_path / "base.pth"}',
        'model.backbone.arch=atto', 'model.neck.in_channels=[40,80,160,320]',
        'model.roi_head.bbox_head.fc_out_channels=16', 'model.train_cfg.rcnn.sampler.num=16',
        'model.train_cfg.rpn_proposal.max_per_img=50', 'optim_wrapper.type=OptimWrapper',
        'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'train_dataloader.dataset.pipeline.2.scale=(64,64)', 'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
        'val_dataloader.dataset.pipeline.1.scale=(64,64)', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1')
    assert f'{LOOKALIKE} has letters that only look like Latin ones; reading {COCO}' in printed
    assert '40 adapted layers' in printed
    losses = re.findall(r'Epoch\(train\) \[1\]\[[12]/2\].* loss: (\S+)', printed)
    assert len(losses) == 2 and all(math.isfinite(float(loss)) for loss in losses)
    assert (tmp_path / 'work_dir/epoch_1.pth').is_file()
