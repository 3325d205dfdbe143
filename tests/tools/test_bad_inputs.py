"""A table of bad inputs, through the tools: each ends in two lines, which are in docs/errors.md, and trains nothing.

They run in this process, for another one takes seconds to start; LIERA_MM_WRITE_DOCS=1 writes the table of the docs.
"""
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
from safetensors.torch import load_file, save_file

from liera_mm.engine.checkpoint import read_checkpoint
from liera_mm.engine.cli import exit_clearly

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


def torn(run):
    evaluate()(run)
    content = run.arguments[0].read_bytes()
    run.arguments[0].write_bytes(content[:len(content) // 2])


def both(*changes):
    return lambda run: [change(run) for change in changes]


ONE_PIXEL = cv2.imencode('.jpg', np.full((1, 1, 3), 200, np.uint8))[1].tobytes()

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
               "type='LieRAConvNeXt', arch='atto', liera=dict(rank=4))))"), 'adapted already'),
    'no convolutions': (
        config(DIGITS, "model = dict(backbone=dict(_delete_=True, type='LieRABackbone', liera=dict(rank=4), "
               "backbone=dict(type='NoConvolutions')))"), 'no convolution and no linear layer'),
    'no hook': (options(custom_hooks='[]'), 'no LieRAHook'),
    'hook without adapted layers': (
        config(FULL, "custom_hooks = [dict(type='LieRAHook')]"), 'found no adapted backbone'),
    'base weights with NaN': (base_weights(lambda weight: weight[0].fill_(torch.nan)), f'{LAYER}.weight'),
    'base weights with NaN, PiSSA': (
        both(base_weights(lambda weight: weight[0].fill_(torch.nan)), liera(method='pissa')), f'{LAYER}.weight'),
    'layer of zeros': (base_weights(torch.Tensor.zero_), LAYER),
    'layer of zeros, dense, exp': (both(base_weights(torch.Tensor.zero_), liera(method='dense', update='exp')), LAYER),
    'base weights of another architecture': (
        options(**{'model.backbone.arch.channels': '[24,48,96,128]', 'model.neck.in_channels': '[24,48,96,128]'}),
        'does not fit LieRAConvNeXt'),
    'checkpoint of other settings': (both(evaluate(), liera(alpha=16)), 'alpha 8, here 16'),
    'checkpoint of another head': (
        both(evaluate(), options(**{'model.roi_head.bbox_head.fc_out_channels': 64})), 'the shape of roi_head.bbox_head'),
    'checkpoint without adapters': (
        evaluate(lambda checkpoint: [checkpoint['state_dict'].pop(name) for name in [*checkpoint['state_dict']]
                                     if '.adapter.' in name]), 'of adapters'),
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
    'torn annotations': (
        lambda run: (run.data / 'annotations/instances_train2017.json').write_text('{"images": ['), 'no JSON file'),
    'annotations of another format': (
        lambda run: (run.data / 'annotations/instances_train2017.json').write_text('[]'), 'no list of images'),
    'corrupt JPEG': (image(lambda data: b'\xff\xd8' + bytes(1000)), 'failed to load image'),
    'truncated JPEG': (image(lambda data: data[:len(data) // 2]), 'failed to load image'),
    'corrupt JPEG to test on': (both(evaluate(), image(lambda data: b'no image', 'val')), 'failed to load image'),
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
    return {name: runpy.run_path(f'tools/{name}.py')['main'] for name in ('train', 'test')}


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
        argv = [run.config, *run.arguments, '--work-dir', run.work_dir, '--cfg-options', f'data_root={run.data}']
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
    assert says in problem and remedy
    assert not [*run.work_dir.glob('*.pth')]
    said = f'`{problem}`<br>`{remedy}`'.replace(str(run.data), 'DATA').replace(str(run.folder), 'FOLDER')
    if WRITE:
        documented[f'| {name} |'] = said
    assert documented[f'| {name} |'] == said


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


def test_rank_above_the_dimensions(start):
    log = log_of(start(liera(rank=30)))
    assert 'the rank is above the dimensions of 16 layers, such as backbone.downsample_layers.0.0' in log


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
