"""Evaluators that are not for the data sets that they are given."""
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.registry import DATASETS, EVALUATOR, DefaultScope
from torch import nn

from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data
from liera_mm.engine.data import check_same_classes
from liera_mm.engine.evaluators import check_evaluator, check_monitored

CLASSES = tuple('0123456789')
FILE = 'annotations/instances_{}2017.json'


def coco(root, split='val', classes=CLASSES, **pipeline):
    return dict(
        type='CocoDataset', data_root=f'{root}/', ann_file=FILE.format(split), data_prefix=dict(img=f'{split}2017/'),
        metainfo=dict(classes=classes), test_mode=True, pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'instances'))])


def concat(*datasets):
    return dict(type='ConcatDataset', datasets=list(datasets))


def metric(root, split='val', **settings):
    return dict(type='CocoMetric', ann_file=f'{root}/{FILE.format(split)}', metric='bbox', **settings)


def several(*metrics, prefixes=('a', 'b')):
    return dict(type='MultiDatasetsEvaluator', metrics=list(metrics), dataset_prefixes=prefixes)


def check(dataset, cfg):
    """As a Runner builds them."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = DATASETS.build(dataset)
        check_same_classes(val=built)
        evaluator = EVALUATOR.build(cfg) if isinstance(cfg, dict) and 'metrics' in cfg else Evaluator(cfg)
        check_evaluator('val', built, evaluator, nn.Identity(), cfg)
    evaluator.dataset_meta = built.metainfo
    return evaluator


def test_several_data_sets(digits):
    """Each with its metric, in whichever order they are nested; of another's images nothing would be found."""
    both = concat(coco(digits), coco(digits, 'train'))
    right = several(metric(digits), metric(digits, 'train'))
    check(both, right)
    check(both, several(dict(type='CocoMetric'), metric(digits, 'train')))
    check(coco(digits), [metric(digits), dict(type='VOCMetric')])
    check(concat(concat(coco(digits)), dict(type='RepeatDataset', times=1, dataset=coco(digits, 'train'))), right)
    for dataset, cfg, problem in (
            (both, several(metric(digits, 'train'), metric(digits)), 'train2017.json, of the evaluator, is of other images'),
            (both, several(metric(digits)), 'is for 2 data sets, and has 1 metrics and 2 dataset_prefixes'),
            (both, several(*right['metrics'], prefixes=('a', )), 'and has 2 metrics and 1 dataset_prefixes'),
            (coco(digits), right, 'a MultiDatasetsEvaluator, and its data set a CocoDataset'),
            (both, metric(digits), 'Several images of the val data sets have the same id, such as 1'),
            (both, dict(type='CocoMetric'), 'Several images of the val data sets have the same id, such as 1'),
            (coco(digits), [metric(digits), metric(digits, 'train', prefix='b')], 'train2017.json, of the evaluator'),
            (concat(coco(digits), coco(digits, classes=CLASSES[:3])), right, 'classes 0, .*, another val data set 0, 1, 2')):
        with pytest.raises(SetupError, match=problem):
            check(dataset, cfg)


@pytest.mark.parametrize('iou_thrs', [[.5], .75, None], ids=str)
def test_thresholds(digits, iou_thrs):
    """pycocotools compares them with .5 and .75, which no list does."""
    evaluator = check(coco(digits), dict(metric(digits), iou_thrs=iou_thrs))
    for image in json.loads((digits / FILE.format('val')).read_text())['images']:
        evaluator.process([dict(img_id=image['id'], ori_shape=(image['height'], image['width']), pred_instances=dict(
            bboxes=torch.tensor([[1., 1., 20., 20.]]), scores=torch.ones(1), labels=torch.zeros(1, dtype=int)))])
    assert 'coco/bbox_mAP_50' in evaluator.evaluate(2)


@pytest.mark.parametrize('ids', [[0, 1, 2], ['a', 'b', 'c']], ids=repr)
def test_ids_of_annotations(digits, tmp_path, ids):
    """For COCO's evaluation, an object with id 0 is never found, and one whose id is a text ends it."""
    content = json.loads((digits / FILE.format('val')).read_text())
    content['annotations'] = [dict(entry, id=number) for entry, number in zip(content['annotations'], ids)]
    (tmp_path / 'val.json').write_text(json.dumps(content))
    dataset = dict(coco(digits), ann_file=str(tmp_path / 'val.json'))
    evaluator = check(dataset, dict(metric(digits), ann_file=str(tmp_path / 'val.json')))
    label = {category['id']: CLASSES.index(category['name']) for category in content['categories']}
    for image in content['images']:
        entries = [entry for entry in content['annotations'] if entry['image_id'] == image['id']]
        x, y, w, h = torch.tensor([entry['bbox'] for entry in entries]).reshape(-1, 4).T
        evaluator.process([dict(
            img_id=image['id'], ori_shape=(image['height'], image['width']), pred_instances=dict(
                bboxes=torch.stack([x, y, x + w, y + h], 1), scores=torch.ones(len(entries)),
                labels=torch.tensor([label[entry['category_id']] for entry in entries], dtype=int)))])
    assert evaluator.evaluate(len(content['images']))['coco/bbox_mAP'] == 1


def test_metrics_that_hooks_go_by(digits):
    """With the names that each evaluator gives, and none that it gives not."""
    dataset = coco(digits)
    all_kinds = dict(metric(digits), metric=['bbox', 'proposal_fast'], classwise=True, prefix='x')
    for cfg, right, wrong in (
            (metric(digits), ['auto'], 'coco/segm_mAP'),
            (all_kinds, ['x/bbox_mAP_s', 'x/AR@300', 'x/3_precision'], 'coco/bbox_mAP'),
            ([metric(digits), dict(type='VOCMetric')], ['coco/bbox_mAP', 'pascal_voc/AP50'], 'mAP'),
            ([metric(digits), dict(type='DumpDetResults', out_file_path='out.pkl')], ['coco/bbox_mAP'], 'mAP')):
        evaluator = check(dataset, cfg)
        check_monitored(evaluator, [CheckpointHook(save_best=right, rule='greater'), CheckpointHook()])
        with pytest.raises(SetupError, match=f"CheckpointHook goes by '{wrong}', and the val evaluator gives "):
            check_monitored(evaluator, [CheckpointHook(save_best=wrong)])
    with DefaultScope.overwrite_default_scope('mmdet'):
        both = EVALUATOR.build(several(metric(digits), dict(type='VOCMetric')))
    check_monitored(both, [EarlyStoppingHook('a/coco/bbox_mAP'), EarlyStoppingHook('b/pascal_voc/mAP')])
    with pytest.raises(SetupError, match="\nDid you mean 'a/coco/bbox_mAP'?"):
        check_monitored(both, [EarlyStoppingHook('coco/bbox_mAP')])


def test_what_hooks_of_others_go_by_is_theirs(digits):

    class Watch(Hook):
        monitor = 'loss'

    check_monitored(check(coco(digits), metric(digits)), [Watch()])


@pytest.mark.parametrize('content, problem', [
    ('[]', 'no list of images, categories, annotations'),
    ('{"images": [', 'no JSON file'),
    (json.dumps(dict(images=[], annotations=[])), 'no list of categories'),
    (json.dumps(dict(images=[], categories=[])), 'no list of annotations'),
    (None, 'The annotation file of the val evaluator is missing: .*/file.json'),
])
def test_files_of_evaluators(tmp_path, content, problem):
    """Wherever in the config they are."""
    path = tmp_path / 'file.json'
    if content is not None:
        path.write_text(content)
    wrong = dict(type='CocoMetric', ann_file=str(path))
    for evaluator in (wrong, [dict(type='VOCMetric'), wrong], several(wrong, dict(wrong, format_only=False))):
        with pytest.raises(SetupError, match=problem):
            check_data(Config(dict(val_evaluator=evaluator)), ['val'])


def test_segments_of_evaluators(tmp_path):
    evaluator = dict(type='CocoPanopticMetric', seg_prefix=str(tmp_path / 'panoptic_val2017/'))
    with pytest.raises(SetupError, match='The folder of segments of the val evaluator is missing: .*panoptic_val2017'):
        check_data(Config(dict(val_evaluator=evaluator)), ['val'])


@pytest.mark.parametrize('changes, problem', [
    (dict(ann_file=['a.json', 'b.json']), 'several files for ann_file(.|\n)*ConcatDataset'),
    (dict(ann_file=''), 'a CocoDataset, has no ann_file'),
    (dict(ann_file='annotations'), 'annotations is a folder'),
    (dict(data_prefix='train2017/'), r"is a text(.|\n)*data_prefix=dict\(img='train2017/'\)"),
])
def test_paths_of_data_sets(digits, changes, problem):
    with pytest.raises(SetupError, match=problem):
        check_data(Config(dict(train_dataloader=dict(dataset=dict(coco(digits, 'train'), **changes)))), ['train'])
