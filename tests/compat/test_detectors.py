"""MMDetection's own detectors on the operators: a training step and a prediction each, at small size."""
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from operators import DEVICES

CONFIGS = Path(mmdet.__file__).parent / '.mim/configs'
DETECTORS = {  # what it needs of mmcv: its config
    'deform_conv': 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'modulated_deform_conv': 'dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'modulated_deform_conv in groups': 'dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py',
    'modulated_deform_conv at another level': 'dyhead/atss_r50_fpn_dyhead_1x_coco.py',
    'deform_conv in the head': 'reppoints/reppoints-moment_r50_fpn_1x_coco.py',
    'deform_conv of anchors': 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'deform_conv of SAConv': 'detectors/cascade-rcnn_r50-sac_1x_coco.py',
    'deform_roi_pool': 'dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py',
    'modulated deform_roi_pool': 'dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py',
    'carafe': 'carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py',
    'masked_conv': 'guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py',
    'masked_conv in the RPN': 'guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'nms_match': 'pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py',
    'masks on the device': 'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py',
    'sigmoid_focal_loss': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'VFNet': 'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'ms_deform_attn': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'Mask2Former': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
}
WITHOUT_A_GPU = {'modulated_deform_conv', 'deform_roi_pool', 'carafe', 'masked_conv', 'nms_match', 'masks on the device'}


pytestmark = pytest.mark.skipif(not CONFIGS.exists(), reason='MMDetection was installed without its configs')


def small(model):
    """The detector with an eighth of its backbone's channels, few queries and few proposals."""
    channels = model.backbone.get('base_channels', 64) // 8
    model.backbone.update(base_channels=channels, init_cfg=None)
    if model.backbone.get('stem_channels'):
        model.backbone.stem_channels //= 8
    for part in (model.get('neck'), model.get('panoptic_head')):
        if part and isinstance(part, list):
            part = part[0]
        if part and isinstance(part.get('in_channels'), list):
            part.in_channels = [c // 8 for c in part.in_channels]
    for stage in (model.get('train_cfg') or {}, model.get('test_cfg') or {}):
        for part in (stage.get('rpn_proposal'), stage.get('rpn')):
            for proposals in part if isinstance(part, list) else [part or {}]:
                if proposals.get('max_per_img'):
                    proposals.max_per_img = 30
        rcnn = stage.get('rcnn') or []
        for part in rcnn if isinstance(rcnn, list) else [rcnn]:
            if part.get('sampler'):
                part.sampler.num = 16
            if part.get('max_per_img'):
                part.max_per_img = 10
    if model.get('num_queries'):
        model.num_queries = 20
    if model.get('panoptic_head'):
        model.panoptic_head.num_queries = 20
        model.train_cfg.num_points = 200
    return model


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', DETECTORS)
def test_training_step_and_prediction(name, device):
    if device == 'cpu' and name not in WITHOUT_A_GPU:
        pytest.skip('on a GPU only, to be quick')
    register_all_modules(False)
    cfg = Config.fromfile(CONFIGS / DETECTORS[name])
    masks = cfg.model.data_preprocessor.get('pad_mask', False)
    if name == 'masks on the device':
        cfg.model.data_preprocessor.type = 'DeviceMaskPreprocessor'
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        detector = MODELS.build(small(cfg.model)).to(device).train()
        for key, parameter in detector.named_parameters():
            if key.endswith('level_embed'):  # of memory that was never written, but for init_weights()
                torch.nn.init.normal_(parameter)
        MessageHub.get_current_instance().update_info('epoch', 0)  # which TOOD looks up
        data = demo_mm_inputs(2, [(3, 96, 96), (3, 80, 96)], num_classes=80, with_mask=masks, device=device)
        loss, _ = detector.parse_losses(detector(**detector.data_preprocessor(data, True), mode='loss'))
        loss.backward()
        assert loss.isfinite()
        gradients = {n: p.grad for n, p in detector.named_parameters() if p.requires_grad}
        assert sum(g is not None and bool(g.any()) for g in gradients.values()) > .5 * len(gradients)
        detector.eval()
        with torch.no_grad():
            data = demo_mm_inputs(1, [(3, 96, 80)], num_classes=80, device=device)  # masked convolutions take one image
            result, = detector(**detector.data_preprocessor(data, False), mode='predict')
        assert result.pred_instances.scores.isfinite().all()
