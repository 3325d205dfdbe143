"""A table of bad inputs, through the tools: each ends in two lines, which are in docs/errors.md, and trains nothing.

They run in this process, for another one takes seconds to start; LIERA_MM_WRITE_DOCS=1 writes the table of the docs.
"""
import io
import json
import os
import re
import runpy
import shutil
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from PIL import Image
from pycocotools import mask as rle
from safetensors.torch import load_file, save_file

from liera_mm.engine.cli import exit_clearly
from liera_mm.engine.safe_loading import read_checkpoint

ROOT = Path(__file__).parents[2]
DOCS = ROOT / 'docs/errors.md'
DIGITS = 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
FULL = 'configs/digits/mask-rcnn_convnextv2-mini_full_digits.py'
BASE = resources.files('liera_mm') / 'weights/mask-rcnn_convnextv2-mini_glyphs.safetensors'
LAYER = 'backbone.stages.1.0.depthwise_conv'
WRITE = bool(os.environ.get('LIERA_MM_WRITE_DOCS'))


# Ways to break a run: functions of its config, options and data

def liera(**settings):
    return options(**{f'model.backbone.liera.{name}': value for name, value in settings.items()})


def options(**given):

    def change(run):
        run.options += [f'{name}={value}' for name, value in given.items()]

    return change


def config(base, text):
    """A config of its own."""

    def change(run):
        run.config = run.folder / 'config.py'
        run.config.write_text(f'_base_ = {str(ROOT / base)!r}\n{text}')

    return change


def wrapped(inner, outer):
    """The edit on a ConvNeXt, with arguments that the ConvNeXt and LieRABackbone have besides."""
    return config(FULL, "default_hooks = dict(liera=dict(type='LieRAHook'))\nmodel = dict(backbone=dict(_delete_=True, type="
                  f"'LieRABackbone', backbone=dict(type='mmpretrain.ConvNeXt', arch='atto', {inner}), {outer}))")


def base_weights(edit):
    """Pretrained weights of which a tensor, that of LAYER, was edited."""

    def change(run):
        weights = load_file(BASE)
        edit(weights[f'{LAYER}.weight'])
        save_file(weights, run.folder / 'base.safetensors')
        run.options.append(f'model.backbone.init_cfg.checkpoint={run.folder}/base.safetensors')

    return change


def annotations(edit, split='train'):

    def change(run):
        path = run.data / f'annotations/instances_{split}2017.json'
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


def each(entries, split='train', **changes):
    """Annotations of which all entries of a list have other values: given, or functions of the entry; None removes one."""

    def edit(content):
        for entry in content[entries]:
            for key, value in changes.items():
                value = value(entry) if callable(value) else value
                entry.pop(key, None)
                if value is not None:
                    entry[key] = value

    return annotations(edit, split)


def first(entries, key, value=None, split='train'):
    """Annotations of which the first entry of a list has another value, or None."""

    def edit(content):
        content[entries][0].pop(key)
        if value is not None:
            content[entries][0][key] = value

    return annotations(edit, split)


def repeat(entries, split='train', **changes):
    """Annotations with a changed copy of the first entry of a list."""
    return annotations(lambda content: content[entries].append(dict(content[entries][0], **changes)), split)


def corners(annotation):
    x, y, w, h = annotation['bbox']
    return [x, y, x + w, y + h]


def outside(annotation):
    x, y, w, h = annotation['bbox']
    return [x + 500, y, w, h]


def turned(data):
    """A JPEG that is stored lying, with an orientation in EXIF that turns it."""
    image, file = Image.open(io.BytesIO(data)).resize((160, 120)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, 'jpeg', exif=exif)
    return file.getvalue()


def annotated_lying(content):
    image = min(content['images'], key=lambda image: image['file_name'])
    image.update(width=160, height=120)
    for annotation in content['annotations']:
        if annotation['image_id'] == image['id']:
            annotation['segmentation'] = [[1, 2, 30, 2, 30, 40]]


def rename_categories(content):
    for category in content['categories']:
        category['name'] = f'digit {category["name"]}'


def image(data, split='train'):
    """Write these bytes, made from those that are there, in the place of the first image; None removes it."""

    def change(run):
        path = min((run.data / f'{split}2017').iterdir())
        content = data(path.read_bytes())
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return change


def evaluate(edit=lambda checkpoint: None):
    """tools/test.py, on an edited checkpoint of a training."""

    def change(run):
        run.tool, run.arguments = 'test', [run.folder / 'epoch_1.pth']
        checkpoint = read_checkpoint(run.trained, 'cpu')
        edit(checkpoint)
        torch.save(checkpoint, run.arguments[0])

    return change


def without_adapters(run):
    run.config = FULL


def torn(run):
    evaluate()(run)
    content = run.arguments[0].read_bytes()
    run.arguments[0].write_bytes(content[:len(content) // 2])


def both(*changes):
    return lambda run: [change(run) for change in changes]


def argument(*arguments):
    return lambda run: run.arguments.extend(arguments)


def predict(*arguments):
    """tools/predict.py, with the checkpoint of a training."""

    def change(run):
        evaluate()(run)
        run.tool = 'predict'
        run.arguments += [str(argument).format(data=run.data, folder=run.folder) for argument in arguments]

    return change


def look(run):
    """tools/check_data.py."""
    run.tool = 'check_data'


def remove_annotations(run):
    shutil.rmtree(run.data / 'annotations')


HEADS = 'model.roi_head.{}_head.num_classes'
ONE_PIXEL = cv2.imencode('.jpg', np.full((1, 1, 3), 200, np.uint8))[1].tobytes()

BOXES = """
model = dict(roi_head=dict(mask_head=None))
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]))
"""
BAD_INPUTS = {
    'rank 0': (liera(rank=0), 'rank must be a whole number of at least 1, not 0'),
    'negative rank': (liera(rank=-4), 'rank must be a whole number of at least 1, not -4'),
    'alpha 0': (liera(alpha=0), 'alpha must be a positive number, not 0'),
    'unknown method': (liera(method='lorra'), "did you mean 'lora'"),
    'unknown update': (liera(update='tailor'), "did you mean 'taylor'"),
    'unknown setting': (liera(ranks=4), "did you mean 'rank'"),
    'targets that match nothing': (liera(targets='stage.*,'), "'stage.*' matches no layer; did you mean 'stages.*'"),
    'adapting twice': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, type='LieRABackbone', liera=dict(rank=4), backbone=dict("
               "type='LieRAConvNeXt', arch='atto', liera=dict(rank=4))))"), 'adapted already, as'),
    'no convolutions': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, type='LieRABackbone', liera=dict(rank=4), "
               "backbone=dict(type='NoConvolutions')))"), 'no convolution and no linear layer'),
    'no hook': (options(custom_hooks='[]'), 'no LieRAHook'),
    'a hook that is no dict': (options(custom_hooks='LieRAHook'), "has custom_hooks='LieRAHook'"),
    'a dict without its bracket': (options(custom_hooks="[dict(type='LieRAHook']"), 'cannot be read'),
    'an entry that is not there': (options(**{'custom_hooks.1.type': 'EMAHook'}), 'where custom_hooks is'),
    'a misspelt option': (options(**{'optim_wraper.optimizer.lr': .1}), 'changes nothing: the config has no optim_wraper'),
    'a variable of the config': (options(max_epochs=2), 'max_epochs is a variable of the config, used up'),
    'an option without what it is in': (options(lr=.1), 'lr changes nothing: the config has no lr'),
    'an option of MMDetection 2': (options(seed=1), 'seed changes nothing: the config has no seed'),
    'imports that are not there': (options(**{'custom_imports.imports': '[nowhere]'}), 'nowhere, of --cfg-options'),
    'an option without a value': (lambda run: run.options.append('resume'), "'resume', which is no KEY=VALUE"),
    'half of validation turned off': (
        options(val_dataloader=None), 'val_dataloader, val_cfg, and val_evaluator should be either all None or not None'),
    'a model without its train_cfg': (options(**{'model.train_cfg': None}), "'NoneType' object has no attribute 'get'"),
    'a model without a backbone': (options(**{'model.backbone': None}), 'has backbone=None, where a dict with a type'),
    'a model without a backbone in the config': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, depth=50))"), "has backbone={'depth': 50}, where a dict"),
    'a text for a number': (options(**{'train_cfg.max_epochs': 'two'}), "invalid literal for int() with base 10: 'two'"),
    'no training': (
        options(train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None), 'has no train_dataloader'),
    'resume with a path': (options(resume='epoch_1.pth'), "has resume='epoch_1.pth', where True or False belongs"),
    'a batch size of 0': (options(**{'train_dataloader.batch_size': 0}), 'got batch_size=0'),
    'liera that is a number': (options(**{'model.backbone.liera': 8}), '8 is no dict'),
    'hook without adapted layers': (
        config(FULL, "custom_hooks = [dict(type='LieRAHook')]"), 'found no adapted backbone'),
    'adapters with a learning rate of 0': (
        options(**{'optim_wrapper.paramwise_cfg.custom_keys': '{"backbone": dict(lr_mult=0.)}'}), 'would never move'),
    'a rate without its name': (
        options(**{'optim_wrapper.paramwise_cfg.custom_keys.backbone': .1}),
        'has optim_wrapper.paramwise_cfg.custom_keys.backbone=0.1, where dict(lr_mult=..., decay_mult=...) belongs'),
    'a misspelt rule of rates': (
        options(**{'optim_wrapper.paramwise_cfg.norm_decay_mul': 0.}), 'paramwise_cfg.norm_decay_mul, which nothing reads'),
    'rates of a misspelt part': (
        options(**{'optim_wrapper.paramwise_cfg.custom_keys.bakbone.lr_mult': .1}), 'in the name of no parameter'),
    'a misspelt setting of an average': (
        options(custom_hooks="[dict(type='LieRAHook'),dict(type='EMAHook',momentm=.1)]"), 'ExponentialMovingAverage'),
    'a misspelt setting beside its own': (
        options(**{'model.test_cfg.rcnn.score_th': .1}), 'rcnn.score_th and model.test_cfg.rcnn.score_thr, one of which'),
    'a misspelt setting of the checkpoints': (
        options(**{'default_hooks.checkpoint.intervall': 1}), 'checkpoint.intervall, which nothing reads'),
    'rates that are a list': (
        options(**{'optim_wrapper.paramwise_cfg.custom_keys': [.1]}),
        'has optim_wrapper.paramwise_cfg.custom_keys=[0.1], where dict(...) belongs'),
    'base weights with NaN': (base_weights(lambda weight: weight[0].fill_(torch.nan)), f'{LAYER}.weight'),
    'base weights with NaN, PiSSA': (
        both(base_weights(lambda weight: weight[0].fill_(torch.nan)), liera(method='pissa')), f'{LAYER}.weight'),
    'layer of zeros': (base_weights(torch.Tensor.zero_), LAYER),
    'layer of zeros, atom, additive': (
        both(base_weights(torch.Tensor.zero_), liera(method='atom', update='additive')), LAYER),
    'layer of zeros, dense, exp': (both(base_weights(torch.Tensor.zero_), liera(method='dense', update='exp')), LAYER),
    'base weights of another architecture': (
        options(**{'model.backbone.arch.channels': '[24,48,96,128]', 'model.neck.in_channels': '[24,48,96,128]'}),
        'does not fit LieRAConvNeXt'),
    'checkpoint of other settings': (both(evaluate(), liera(alpha=32)), 'alpha 16, here 32'),
    'checkpoint of another head': (
        both(evaluate(), options(**{'model.roi_head.bbox_head.fc_out_channels': 64})), 'the shape of roi_head.bbox_head'),
    'checkpoint without adapters': (
        evaluate(lambda checkpoint: [checkpoint['state_dict'].pop(name) for name in [*checkpoint['state_dict']]
                                     if '.adapter.' in name]), 'of adapters'),
    'checkpoint with adapters, without the edit': (both(evaluate(), without_adapters), 'with adapters in backbone'),
    'checkpoint with adapters to predict with, without the edit': (
        both(predict('{data}/val2017'), without_adapters), 'with adapters in backbone'),
    'checkpoint with adapters to resume from, without the edit': (
        both(lambda run: run.arguments.extend(['--resume', run.trained]), without_adapters), 'with adapters in backbone'),
    'checkpoint with adapters to start from, without the edit': (
        both(lambda run: run.options.append(f'load_from={run.trained}'), without_adapters), 'with adapters in backbone'),
    'checkpoint with NaN': (
        evaluate(lambda checkpoint: checkpoint['state_dict'][f'{LAYER}.adapter.B'].fill_(torch.nan)), f'{LAYER}.adapter.B'),
    'checkpoint on other base weights': (
        both(evaluate(), base_weights(lambda weight: weight[0].mul_(2))), 'stages.1.0.depthwise_conv.weight of'),
    'torn checkpoint': (torn, 'no checkpoint, or a damaged one'),
    'missing images': (image(lambda data: None), '1 of 6 images'),
    'no annotations': (annotations(lambda content: content['annotations'].clear()), 'no annotation to use'),
    'no annotations, images without any kept': (
        both(annotations(lambda content: content['annotations'].clear()),
             options(**{'train_dataloader.dataset.filter_cfg.filter_empty_gt': False})), 'no annotation to use'),
    'no annotations to validate on': (
        annotations(lambda content: content['annotations'].clear(), 'val'), 'no annotation to use'),
    'all images below min_size': (
        options(**{'train_dataloader.dataset.filter_cfg.min_size': 200}), '6 of them smaller'),
    'other categories': (annotations(rename_categories), 'lacks 10 classes'),
    'other categories to test on': (both(evaluate(), annotations(rename_categories, 'val')), 'lacks 10 classes'),
    'class names in other capitals': (
        both(annotations(lambda content: [c.update(name=f'Digit {c["name"]}') for c in content['categories']]),
             config(DIGITS, "train_dataloader = dict(dataset=dict(metainfo=dict(classes=('digit 0', 'digit 1'))))")),
        "Did you mean 'Digit 0' by 'digit 0'?"),
    'no metainfo': (
        config(DIGITS, 'train_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True)))'), 'lacks 80 classes'),
    'classes without a comma': (
        config(DIGITS, "classes = ('balloon')\nfor_all = dict(dataset=dict(metainfo=dict(classes=classes)))\n"
               "train_dataloader = val_dataloader = for_all"), "classes='balloon'"),
    'classes as MMDetection 2 called them': (
        config(DIGITS, "train_dataloader = dict(dataset=dict(metainfo=dict(_delete_=True, CLASSES=('0', '1'))))"),
        'has CLASSES'),
    'classes that are numbers': (options(**{'train_dataloader.dataset.metainfo.classes': '[0,1]'}), 'which is no text'),
    'categories in another order': (annotations(lambda content: content['categories'].reverse()), 'another order'),
    'a category that is another but for a space': (
        annotations(lambda content: (content['categories'].append(dict(id=11, name='0 ')),
                                     content['annotations'][0].update(category_id=11))), "1 objects of '0 '"),
    'two categories of one name': (repeat('categories', id=99), "'0'"),
    'two categories of one id': (repeat('categories', name='ten'), 'ids of categories'),
    'two images of one id': (repeat('images'), 'ids of images'),
    'two annotations of one id': (repeat('annotations'), 'ids of annotations'),
    'image ids as text in one place': (each('images', id=lambda image: str(image['id'])), 'text for id'),
    'image ids as text in the other': (
        each('annotations', image_id=lambda annotation: str(annotation['image_id'])), 'text for image_id'),
    'category ids as text in one place': (
        each('annotations', category_id=lambda annotation: str(annotation['category_id'])), 'text for category_id'),
    'annotations of other images': (
        each('annotations', image_id=lambda annotation: annotation['image_id'] + 1000), 'of images that it has not'),
    'annotations of categories that are not there': (
        each('annotations', category_id=lambda annotation: annotation['category_id'] - 1), 'no category has'),
    'boxes of area 0': (each('annotations', area=0), 'smaller than a pixel or of area 0'),
    'boxes without a height': (
        each('annotations', bbox=lambda annotation: [*annotation['bbox'][:3], 0]), 'smaller than a pixel or of area 0'),
    'normalised boxes': (
        each('annotations', bbox=lambda annotation: [value / 160 for value in annotation['bbox']]), 'normalised'),
    'normalised boxes to validate on': (
        each('annotations', 'val', bbox=lambda annotation: [value / 160 for value in annotation['bbox']]), 'normalised'),
    'normalised boxes to test on': (
        both(evaluate(), each('annotations', 'val', bbox=lambda annotation: [value / 160 for value in annotation['bbox']])),
        'normalised'),
    'boxes outside their images': (each('annotations', bbox=outside), 'outside their image'),
    'boxes as corners': (each('annotations', bbox=corners), 'look like corners'),
    'boxes as corners, without masks': (
        both(each('annotations', bbox=corners, segmentation=None), config(DIGITS, BOXES)), 'look like corners'),
    'nothing but crowds': (each('annotations', iscrowd=1), 'of crowds'),
    'crowds as text': (each('annotations', iscrowd=lambda annotation: str(annotation['iscrowd'])), "an iscrowd that"),
    'one to ignore as text': (
        annotations(lambda content: content['annotations'][0].update(ignore='False')), "the first is 'False'"),
    'a bbox of text': (first('annotations', 'bbox', ['1', '2', '3', '4']), "['1', '2', '3', '4']"),
    'a bbox of three numbers': (first('annotations', 'bbox', [1, 2, 3]), '[1, 2, 3]'),
    'a bbox that is not finite': (first('annotations', 'bbox', [1, 2, float('nan'), 4]), 'nan'),
    **{f'no {key} of {entries}': (first(entries, key), f'have no {key}') for entries, key in (
        ('images', 'id'), ('images', 'file_name'), ('images', 'height'), ('images', 'width'),
        ('annotations', 'id'), ('annotations', 'image_id'), ('annotations', 'category_id'), ('annotations', 'bbox'),
        ('annotations', 'area'), ('categories', 'id'), ('categories', 'name'))},
    'no iscrowd to validate with': (first('annotations', 'iscrowd', split='val'), 'have no iscrowd'),
    'no masks': (each('annotations', segmentation=None), 'have no segmentation'),
    'one mask missing': (first('annotations', 'segmentation', []), '1 of'),
    'one mask as a flat list': (first('annotations', 'segmentation', [1, 2, 30, 2, 30, 40]), '1 of'),
    'one mask as a text': (first('annotations', 'segmentation', '1 2 30 2 30 40'), '1 of'),
    'one mask as a number': (first('annotations', 'segmentation', 7), '1 of'),
    'one mask of run lengths without a size': (first('annotations', 'segmentation', dict(counts=[3, 4])), '1 of'),
    'run lengths of another size than the image': (
        first('annotations', 'segmentation', dict(size=[60, 80], counts=[40, 60, 4700])), 'has size=[60, 80]'),
    'run lengths whose size is turned': (
        each('annotations', segmentation=lambda annotation: dict(annotation['segmentation'], size=[80, 320])), '31 of 31'),
    'run lengths of too few pixels': (
        first('annotations', 'segmentation', dict(size=[160, 160], counts=[40, 60])), 'counts of 100 pixels'),
    'run lengths that are negative': (
        first('annotations', 'segmentation', dict(size=[160, 160], counts=[40, -60, 25620])), 'unreadable counts'),
    'run lengths that are torn': (
        first('annotations', 'segmentation', dict(size=[160, 160], counts='df4X')), 'unreadable counts'),
    'run lengths of a crowd, to validate with': (
        repeat('annotations', 'val', id=99, iscrowd=1, segmentation=dict(size=[160, 160], counts=[40, 60])),
        'counts of 100 pixels'),
    'a crowd without a mask': (repeat('annotations', id=99, iscrowd=1, segmentation=None), '1 of'),
    'a mask of texts': (first('annotations', 'segmentation', [['1', '2', '30', '2', '30', '40']]), '1 of'),
    'a mask that is not finite': (first('annotations', 'segmentation', [[1, 2, float('nan'), 2, 30, 40]]), '1 of'),
    'a mask of two points to validate with': (
        first('annotations', 'segmentation', [[1, 2, 30, 40]], split='val'), '1 of'),
    'masks of two points': (each('annotations', segmentation=[[1, 2, 3, 4]]), 'without a mask that can be used'),
    'no masks to validate with': (
        both(each('annotations', 'val', segmentation=None), options(**{
            'val_dataloader.dataset.pipeline.2.with_mask': False})), 'have no segmentation'),
    'a mask head, but no masks loaded': (
        options(**{'train_dataloader.dataset.pipeline.1.with_mask': False}), 'loads no masks'),
    'masks evaluated that are not predicted': (config(DIGITS, BOXES), "metric='segm'"),
    'too few classes': (options(**{HEADS.format('bbox'): 3}), 'roi_head.bbox_head.num_classes is 3, but the data have 10'),
    'too many classes': (options(**{HEADS.format('bbox'): 80}), 'roi_head.bbox_head.num_classes is 80'),
    'too many classes of the mask head': (
        options(**{HEADS.format('mask'): 80, 'model.roi_head.mask_head.class_agnostic': False}),
        'roi_head.mask_head.num_classes is 80'),
    'too few classes to test': (
        both(evaluate(), config(DIGITS, "test_dataloader = dict(dataset=dict(metainfo=dict(classes=('0', '1', '2'))))")),
        'num_classes is 10, but the data have 3'),
    'other classes to validate on': (
        both(annotations(lambda content: content['categories'].reverse(), 'val'),
             config(DIGITS, "val_dataloader = dict(dataset=dict(metainfo=dict(classes=tuple('9876543210'))))")),
        'the val data set'),
    'evaluator of other images': (
        lambda run: run.options.append(f'val_evaluator.ann_file={run.data}/annotations/instances_train2017.json'),
        'is of other images'),
    'evaluator to test with of other images': (
        both(evaluate(), lambda run: run.options.append(
            f'test_evaluator.ann_file={run.data}/annotations/instances_train2017.json')), 'is of other images'),
    'evaluator without its file': (options(**{'val_evaluator.ann_file': 'nowhere.json'}), 'missing: nowhere.json'),
    'evaluator without annotations': (options(**{'val_evaluator.ann_file': None}), 'has no ann_file'),
    'evaluator with a file that is none of annotations': (
        lambda run: run.options.append(f'val_evaluator.ann_file={run.data}/train2017/000000000001.jpg'), 'no JSON file'),
    'LVIS without its package': (options(**{'val_evaluator.type': 'LVISMetric'}), 'Package lvis is not installed'),
    'a metric that is none': (options(**{'val_evaluator.metric': 'mAP'}), "metric should be one of 'bbox', 'segm'"),
    'items of a metric that it does not give': (
        options(**{'val_evaluator.metric_items': "['mAP','AP50']"}), "metric_items=['mAP', 'AP50'] of the val evaluator"),
    'a best checkpoint by a metric without its prefix': (
        options(**{'default_hooks.checkpoint.save_best': 'bbox_mAP'}), "CheckpointHook goes by 'bbox_mAP'"),
    'a best checkpoint by a metric that is not evaluated': (
        options(**{'default_hooks.checkpoint.save_best': 'coco/segm_mAP', 'val_evaluator.metric': 'bbox'}),
        "CheckpointHook goes by 'coco/segm_mAP'"),
    'an early stop by a misspelt metric': (
        options(**{'default_hooks.stop': "dict(type='EarlyStoppingHook',monitor='coco/bbox_map')"}),
        "EarlyStoppingHook goes by 'coco/bbox_map'"),
    'a learning rate by a metric that is the loss': (
        options(param_scheduler="[dict(type='ReduceOnPlateauLR',monitor='loss')]"), "ReduceOnPlateauLR goes by 'loss'"),
    'load_from of another model': (
        lambda run: (save_file({'conv.weight': torch.ones(1)}, run.folder / 'other.safetensors'),
                     options(load_from=run.folder / 'other.safetensors')(run)), 'has nothing of this model'),
    'weight decay of norms, of an optimizer without any': (
        options(**{'optim_wrapper.optimizer': "dict(_delete_=True,type='SGD',lr=.01)"}), 'multiplies a weight_decay'),
    'gradients clipped by value over those clipped by norm': (
        config(DIGITS, "optim_wrapper = dict(clip_grad=dict(type='value', clip_value=1.))"), 'clip_grad has max_norm'),
    'a negative learning rate': (options(**{'optim_wrapper.optimizer.lr': -1}), 'Invalid learning rate'),
    'a schedule of no epochs': (options(**{'train_cfg.max_epochs': 0}), 'LR of the config cannot be built'),
    'batches larger than the data': (
        options(**{'train_dataloader.batch_size': 8, 'train_dataloader.drop_last': True, 'param_scheduler': None}),
        'An epoch has no batch'),
    'validation every 0 epochs': (options(**{'train_cfg.val_interval': 0}), 'every 0 epochs'),
    'groups that do not divide the channels': (
        options(**{'model.neck.norm_cfg': "dict(type='GN',num_groups=7)"}), 'must be divisible by num_groups'),
    'batch norms between processes, in one': (
        options(**{'model.neck.norm_cfg': "dict(type='MMSyncBN')"}), 'Default process group has not been initialized'),
    'a misspelt type': (options(**{'val_evaluator.type': 'CocoMetrics'}), 'has a CocoMetrics, which is not registered'),
    'a misspelt type in the model': (options(**{'model.neck.type': 'FPM'}), 'has a FPM, which is not registered'),
    'a misspelt step': (options(**{'train_dataloader.dataset.pipeline.2.type': 'Resise'}), 'has a Resise, which'),
    'a misspelt data set': (options(**{'train_dataloader.dataset.type': 'CocoDatset'}), 'has a CocoDatset, which'),
    'weights without a type': (
        config(DIGITS, "model = dict(backbone=dict(init_cfg=dict(_delete_=True, checkpoint="
               "'liera://mask-rcnn_convnextv2-mini_glyphs')))"),
        'The init_cfg of a LieRAConvNeXt has no type'),
    'weights without the prefix': (
        options(**{'model.backbone.init_cfg.prefix': 'backbon.'}), 'backbone., neck., roi_head., rpn_head.'),
    'weights of the neck without the prefix': (
        options(**{'model.neck.init_cfg.prefix': 'fpn'}), 'fpn. is not in the pretrained model'),
    'mixed precision without a GPU': (argument('--amp'), 'needs a GPU'),
    'mixed precision in the config, without a GPU': (
        options(**{'optim_wrapper.type': 'AmpOptimWrapper'}), 'needs a GPU'),
    'LieRABackbone over another backbone': (
        config(DIGITS, "model = dict(backbone=dict(type='LieRABackbone', backbone=dict(type='ResNet', depth=50)))"),
        'LieRABackbone has no arch'),
    'LieRAConvNeXt over another backbone': (
        options(**{'model.backbone.depth': 50}), 'LieRAConvNeXt has no depth'),
    'liera beside the backbone': (config(DIGITS, 'model = dict(liera=dict(rank=4))'), 'has a MaskRCNN'),
    'liera of a backbone as it was': (
        config(FULL, 'model = dict(backbone=dict(liera=dict(rank=4)))'), 'has a mmpretrain.ConvNeXt'),
    'liera in the backbone of a LieRABackbone': (wrapped('liera=dict(rank=4)', ''), 'has a mmpretrain.ConvNeXt'),
    'misspelt liera': (wrapped('', 'leira=dict(rank=4)'), 'LieRABackbone has no leira'),
    'misspelt backbone': (wrapped('', 'bakcbone=dict(depth=50)'), 'LieRABackbone has no bakcbone'),
    'misspelt liera of LieRAConvNeXt': (options(**{'model.backbone.lierra.rank': 4}), 'LieRAConvNeXt has no lierra'),
    'misspelt argument of the backbone': (wrapped('drop_path_rat=.1', 'liera=dict(rank=4)'), 'with drop_path_rat'),
    'a setting beside liera': (wrapped('', 'rank=4'), 'LieRABackbone has no rank'),
    'an argument of the backbone beside it': (wrapped('', 'frozen_stages=1'), 'LieRABackbone has no frozen_stages'),
    'a text for the backbone': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, type='LieRABackbone', backbone='ResNet'))"),
        "backbone='ResNet', which is no dict"),
    'backbone beside the detector that has it': (
        config(DIGITS, "model = dict(_delete_=True, type='SoftTeacher', detector={{_base_.model}}, "
               "backbone=dict(type='LieRABackbone'))"), 'has a SoftTeacher'),
    'backbone over another, in LieRABackbone': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, type='LieRABackbone', liera=dict(rank=4), backbone=dict("
               "type='SwinTransformer', depth=50)))"), 'SwinTransformer'),
    'EXIF orientation': (both(image(turned), annotations(annotated_lying)), 'EXIF orientation, 6'),
    'torn annotations': (
        lambda run: (run.data / 'annotations/instances_train2017.json').write_text('{"images": ['), 'no JSON file'),
    'annotations with a byte order mark': (
        lambda run: (path := run.data / 'annotations/instances_val2017.json').write_text(
            path.read_text(), encoding='utf-8-sig'), 'BOM'),
    'annotations of another format': (
        lambda run: (run.data / 'annotations/instances_train2017.json').write_text('[]'), 'no list of images'),
    'corrupt JPEG': (image(lambda data: b'\xff\xd8' + bytes(1000)), 'failed to load image'),
    'an image without content': (image(lambda data: b''), 'cannot be read as an image: it is empty'),
    'truncated JPEG': (image(lambda data: data[:len(data) // 2]), 'failed to load image'),
    'corrupt JPEG to test on': (both(evaluate(), image(lambda data: b'no image', 'val')), 'failed to load image'),
    'no annotations for auto_classes': (
        both(options(auto_classes=True), remove_annotations), 'there is no DATA/annotations/instances_train2017.json'),
    'other categories to validate on, for auto_classes': (
        both(options(auto_classes=True), annotations(rename_categories, 'val')), 'have different categories'),
    'no such image to predict': (predict('{data}/val2017/nowhere.jpg'), 'No such image'),
    'no images to predict': (predict('{data}/annotations'), 'There are no images in'),
    'no such adapter to predict with': (
        predict('{data}/val2017', '--adapter', '{folder}/nowhere.safetensors'), 'Adapter not found'),
    'a training checkpoint as an adapter': (
        predict('{data}/val2017', '--adapter', '{folder}/epoch_1.pth'), 'but a checkpoint of torch'),
    'a folder as an adapter': (predict('{data}/val2017', '--adapter', '{folder}'), 'is a folder'),
    'an image that is none, to look at': (
        both(look, image(lambda data: b'no image')), 'cannot be read as an image'),
    'image of another size': (image(lambda data: ONE_PIXEL), 'is 1x1 pixels large, but annotated as 160x160'),
}


@MODELS.register_module()
class NoConvolutions(BaseModule):
    """Nothing to adapt."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)


# Running the tools

@pytest.fixture(scope='module', autouse=True)
def fast():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr('mmengine.device.utils.DEVICE', 'cpu')
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))  # of the config, for the log
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def tools(fast):
    return {name: runpy.run_path(f'tools/{name}.py')['main'] for name in ('train', 'test', 'predict', 'check_data')}


@pytest.fixture(scope='module')
def start(tools, tiny_digits, tmp_path_factory):
    """A function that runs a tool after a change of what it is given; returns the run, with the lines that it ended with."""

    def start(change, trained=None):
        folder = tmp_path_factory.mktemp('run')
        run = SimpleNamespace(
            folder=folder, data=shutil.copytree(tiny_digits, folder / 'data'), work_dir=folder / 'work_dir', trained=trained,
            tool='train', config=DIGITS, arguments=[], end=None,
            options=['train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2',
                     'train_dataloader.dataset.pipeline.2.scale=(64,64)', 'val_dataloader.dataset.pipeline.1.scale=(64,64)',
                     'default_hooks.checkpoint.interval=1', f'experiment_name={folder.name}',
                     *(f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
                       for option in ('num_workers=0', 'persistent_workers=False'))])
        change(run)
        out = ['--work-dir', run.work_dir] if run.tool in ('train', 'test') else ['--out', folder / 'out']
        argv = [run.config, *run.arguments, *out, '--cfg-options', f'data_root={run.data}']
        run.argv = [*map(str, argv), *run.options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [f'tools/{run.tool}.py', *run.argv])
            try:
                exit_clearly(tools[run.tool])
            except SystemExit as exit:
                run.end = exit.code
        return run

    return start


@pytest.fixture(scope='module')
def trained(start):
    """The checkpoint of a training."""
    run = start(lambda run: None)
    assert run.end is None
    return run.work_dir / 'epoch_1.pth'


@pytest.fixture(scope='module')
def documented():
    """The lines of the table in the docs, by what is wrong."""
    text = DOCS.read_text()
    lines = {} if WRITE else dict(re.findall(r'^(\| (?:[^|]*) \|) (.*) \|$', text, re.M))
    yield lines
    if WRITE:
        head = '| what is wrong | what the tools say |\n| --- | --- |\n'
        start, end = text.index(head) + len(head), text.index('\nThe table is written')
        DOCS.write_text(text[:start] + ''.join(f'{name} {said} |\n' for name, said in lines.items()) + text[end:])


@pytest.mark.parametrize('name', BAD_INPUTS)
def test_ends_in_two_lines(name, start, trained, documented):
    change, says = BAD_INPUTS[name]
    run = start(change, trained)
    problem, remedy = run.end.splitlines()
    assert says in problem.replace(str(run.data), 'DATA') and remedy
    assert not [*run.work_dir.glob('*.pth')]
    said = f'`{problem}`<br>`{remedy}`'.replace(str(run.data), 'DATA').replace(str(run.folder), 'FOLDER')
    if WRITE:
        documented[f'| {name} |'] = said
    assert without_numbers(documented[f'| {name} |']) == without_numbers(said)


def without_numbers(text):
    """Newer versions of torch give them in brackets: num_channels (64) must be divisible by num_groups (7)."""
    return re.sub(r' \(\d+\)', '', text)


@pytest.mark.parametrize('tool, option', [
    *(('train', option) for option in (
        'model.neck=None', 'model.data_preprocessor=None', 'model.rpn_head=None', 'model.roi_head.bbox_head=None',
        'model.train_cfg.rcnn=None', 'train_dataloader.dataset.pipeline=None', 'train_dataloader.batch_size=None',
        'optim_wrapper.optimizer=None', 'optim_wrapper.optimizer.lr=fast', 'randomness.seed=x', 'env_cfg=None',
        'log_level=None', 'model.neck=FPN', 'choices=3', 'auto_scale_lr=3')),
    *(('test', option) for option in (
        'model.neck=None', 'model.data_preprocessor=None', 'model.test_cfg.rpn=None', 'test_dataloader.batch_size=None'))])
def test_options_of_another_kind(tool, option, start, trained):
    """What stock MMDetection ends with a traceback; the remedy names the option."""
    run = start(both(*[evaluate()] * (tool == 'test'), lambda run: run.options.append(option)), trained)
    problem, remedy = run.end.splitlines()
    key, value = option.split('=')
    assert key in remedy and value in problem + remedy


def test_docs_have_no_other_rows(documented):
    assert {name.strip('| ') for name in documented} - {'what is wrong', '---'} == BAD_INPUTS.keys()


def test_corrupt_jpeg_in_a_process_that_loads_data(start, run_tool):
    """As a user runs it, in processes of its own."""
    run = start(both(image(lambda data: b'no image'), options(**{'train_dataloader.num_workers': 1})))
    printed = run_tool('train.py', *run.argv, fails=True)
    assert printed.endswith(run.end + '\n') and 'failed to load image' in run.end
    assert 'Traceback' not in printed


# Odd, but no errors

def log_of(run):
    assert run.end is None and [*run.work_dir.glob('epoch_1.pth')]
    return next(run.work_dir.glob('*/*.log')).read_text()


@pytest.mark.parametrize('options', [
    ['val_dataloader=None', 'val_cfg=None', 'val_evaluator=None', 'train_cfg.val_interval=0', 'param_scheduler=None',
     'optim_wrapper.clip_grad=None', 'default_hooks.logger=None', 'default_hooks.timer=None', 'visualizer=None',
     'custom_imports=None', 'resume=None', 'choices=None', 'auto_scale_lr=None', 'optim_wrapper.paramwise_cfg=None',
     'train_dataloader.sampler=None'],
    ['default_hooks=None', 'test_dataloader=None', 'test_cfg=None', 'test_evaluator=None', 'log_processor=None',
     'model.roi_head.mask_head=None', 'val_evaluator.metric=bbox', 'model.train_cfg.rpn_proposal=None']])
def test_what_stock_mmdetection_does_without(options, start):
    run = start(lambda run: run.options.extend(options))
    assert run.end is None and [*run.work_dir.glob('epoch_1.pth')]


@pytest.mark.parametrize('hooks', ['dict(visualization=None)', 'None'])
def test_flips_and_pictures_of_any_config(hooks, start, trained):
    """Of data sets in others, evaluators in a list, and without a hook that draws."""
    text = f'''
test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[{{{{_base_.val_dataloader.dataset}}}}]))
test_evaluator = [{{{{_base_.val_evaluator}}}}, dict(type='DumpDetResults', out_file_path='FOLDER/out.pkl')]
default_hooks = {hooks}
custom_hooks = [dict(type='LieRAHook')]
'''
    run = start(lambda run: both(config(DIGITS, text.replace('FOLDER', str(run.folder))), evaluate(), argument(
        '--tta', '--show-dir', 'shown'), lambda run: run.options.__delitem__(slice(5, 6)))(run), trained)
    assert run.end is None and (run.folder / 'out.pkl').exists()
    assert len([*run.work_dir.glob('*/shown/*.jpg')]) == 3


def test_rank_above_the_dimensions(start):
    log = log_of(start(liera(rank=30)))
    assert 'the rank is above the dimensions of 16 layers, such as backbone.downsample_layers.0.0' in log


def test_run_lengths_as_text(start):
    """As pycocotools and most data sets have them; those of the digits are lists."""

    def text(annotation):
        run_lengths = rle.frPyObjects(annotation['segmentation'], 160, 160)
        return dict(run_lengths, counts=run_lengths['counts'].decode())

    log_of(start(both(each('annotations', segmentation=text), each('annotations', 'val', segmentation=text))))


@pytest.mark.parametrize('count', [1, 6])
def test_images_of_one_pixel(start, count):

    def shrink(run):
        for path in sorted((run.data / 'train2017').iterdir())[:count]:
            path.write_bytes(ONE_PIXEL)

    def annotate(content):
        shrunk = sorted(content['images'], key=lambda image: image['file_name'])[:count]
        for image in shrunk:
            image.update(width=1, height=1)
        for annotation in content['annotations']:
            if annotation['image_id'] in {image['id'] for image in shrunk}:
                annotation.update(bbox=[0, 0, 1, 1], area=1, segmentation=[[0, 0, 1, 0, 1, 1, 0, 1]])

    losses = re.findall(r' loss: (\S+)', log_of(start(both(shrink, annotations(annotate), options(**{
        'default_hooks.logger.interval': 1})))))
    assert len(losses) == 3 and np.isfinite(np.array(losses, float)).all()
