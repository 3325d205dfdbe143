"""Heads of MMDetection's own detectors against data of other classes, built on the meta device."""
import copy
from pathlib import Path
from types import SimpleNamespace

import mmdet
import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from liera_mm.core.errors import SetupError
from liera_mm.engine.heads import check_heads, check_masks_of_heads, wrong_heads

CONFIGS = Path(mmdet.__file__).parent / '.mim/configs'
BOX, MASK = 'roi_head.bbox_head', 'roi_head.mask_head'
SEGMENTS = [f'panoptic_{head}.num_{kind}_classes' for head in ('head', 'fusion_head') for kind in ('things', 'stuff')]
HEADS = {  # of each config: what has to be set to the number of classes
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco': [f'{BOX}.num_classes'],
    'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco': [*(f'{BOX}.{i}.num_classes' for i in range(3)), f'{MASK}.num_classes'],
    'htc/htc_r50_fpn_1x_coco': [f'{head}.{i}.num_classes' for head in (BOX, MASK) for i in range(3)],
    'scnet/scnet_r50_fpn_1x_coco': [
        *(f'{BOX}.{i}.num_classes' for i in range(3)), f'{MASK}.num_classes', 'roi_head.glbctx_head.num_classes'],
    'ms_rcnn/ms-rcnn_r50_fpn_1x_coco': [f'{head}.num_classes' for head in (BOX, MASK, 'roi_head.mask_iou_head')],
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': [
        f'{head}.num_classes' for head in (BOX, MASK, 'roi_head.point_head')],
    'retinanet/retinanet_r50_fpn_1x_coco': ['bbox_head.num_classes'],
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco': ['bbox_head.num_classes'],
    'atss/atss_r50_fpn_1x_coco': ['bbox_head.num_classes'],
    'yolo/yolov3_d53_8xb8-320-273e_coco': ['bbox_head.num_classes'],
    'yolox/yolox_s_8xb8-300e_coco': ['bbox_head.num_classes'],
    'rtmdet/rtmdet-ins_s_8xb32-300e_coco': ['bbox_head.num_classes'],
    'solo/solo_r50_fpn_1x_coco': ['mask_head.num_classes'],
    'yolact/yolact_r50_1xb8-55e_coco': ['bbox_head.num_classes', 'mask_head.num_classes'],
    'detr/detr_r50_8xb2-150e_coco': ['bbox_head.num_classes'],
    'dino/dino-4scale_r50_8xb2-12e_coco': ['bbox_head.num_classes'],
    'maskformer/maskformer_r50_ms-16xb1-75e_coco': SEGMENTS,
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic': SEGMENTS,
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco': [
        f'{BOX}.num_classes', f'{MASK}.num_classes', 'semantic_head.num_things_classes', 'semantic_head.num_stuff_classes',
        *SEGMENTS[2:]],
    'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.01-coco': ['detector.roi_head.bbox_head.num_classes'],
    'qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval': [
        'detector.roi_head.bbox_head.num_classes'],
}
LEARN_MASKS = {'cascade_rcnn', 'htc', 'scnet', 'ms_rcnn', 'point_rend', 'rtmdet', 'solo', 'yolact', 'maskformer',
               'mask2former', 'panoptic_fpn'}
DATA = SimpleNamespace(metainfo=dict(
    classes=tuple('0123456789'), thing_classes=tuple('0123456789'), stuff_classes=tuple('abc')))

pytestmark = pytest.mark.skipif(not CONFIGS.exists(), reason='MMDetection was installed without its configs')


@pytest.fixture(scope='module', autouse=True)
def registered():
    register_all_modules(False)


def without_init_cfg(node):
    if isinstance(node, dict):
        node.pop('init_cfg', None)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        without_init_cfg(child)


def config_of(name):
    cfg = Config(dict(model=Config.fromfile(CONFIGS / f'{name}.py').model))
    without_init_cfg(cfg.model)
    return cfg


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        return MODELS.build(copy.deepcopy(cfg.model))


@pytest.mark.parametrize('name', HEADS)
def test_heads_of_other_classes(name):
    """The remedy names keys of the config, and with it the heads fit."""
    cfg = config_of(name)
    model = build(cfg)
    with pytest.raises(SetupError) as error:
        check_heads(nn.ModuleDict(dict(module=model)), DATA, cfg.model)
    problem, remedy = error.value.args
    options = dict(option.removeprefix('model.').split('=') for option in remedy.split() if option.startswith('model.'))
    assert options == {key: '3' if 'stuff' in key else '10' for key in HEADS[name]}
    assert problem.startswith(f'{[*options][0]} is ')
    cfg.merge_from_dict({f'model.{key}': int(count) for key, count in options.items()})
    if name.startswith('mask'):
        with pytest.raises(SetupError, match='loss_cls has 134 values of class_weight, and the head 13 classes'):
            check_heads(build(cfg), DATA, cfg.model)
        cfg.model.panoptic_head.loss_cls.class_weight = 13 * [1.] + [.1]
    check_heads(build(cfg), DATA, cfg.model)

    boxes_only = SimpleNamespace(pipeline=SimpleNamespace(transforms=[SimpleNamespace(with_mask=False)]))
    if name.partition('/')[0] in LEARN_MASKS:
        with pytest.raises(SetupError, match='loads no masks'):
            check_masks_of_heads(boxes_only, model)
        boxes_only.pipeline.transforms[0].with_mask = True
    check_masks_of_heads(boxes_only, model)


def test_heads_whose_classes_are_not_those_of_the_data():
    """Those that tell objects from background, and masks that are the same for all classes."""
    cfg = config_of('rpn/rpn_r50_fpn_1x_coco')
    assert not wrong_heads(build(cfg), DATA.metainfo)
    cfg = config_of('mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    cfg.model.roi_head.bbox_head.num_classes = 10
    assert wrong_heads(build(cfg), DATA.metainfo) == {'roi_head.mask_head.num_classes': (80, 10)}
    cfg.model.roi_head.mask_head.class_agnostic = True
    assert not wrong_heads(build(cfg), DATA.metainfo)


def test_a_model_without_a_config():
    model = build(config_of('retinanet/retinanet_r50_fpn_1x_coco'))
    with pytest.raises(SetupError, match='bbox_head.num_classes is 80, but the data have 10 classes'):
        check_heads(model, DATA)
