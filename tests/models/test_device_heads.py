"""Heads that work on a batch at once have the losses, gradients and proposals of MMDetection's heads."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import SingleRoIExtractor, StandardRoIHead
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch.utils._python_dispatch import TorchDispatchMode

from liera_mm.engine.cli import load_config
from liera_mm.models import DeviceRoIExtractor, DeviceRoIHead, DeviceRPNHead
from liera_mm.models.device_heads import Proposals
from liera_mm.models.masks import DeviceMasks
from liera_mm.models.targets import unsupported

pytestmark = pytest.mark.usefixtures('one_thread')

CONFIGS = Path(__file__).parents[2] / 'configs'
ALL = 10**6  # as many samples: all are taken, and nothing is random
STRIDES = [4, 8, 16, 32, 64]
SIZE = 96, 128
PROPOSALS = dict(nms_pre=200, max_per_img=100, nms=dict(type='nms', iou_threshold=.7), min_bbox_size=0)


def rpn_config(num=ALL, assigner=None, sampler=None, coder=None, **kwargs):
    return dict(
        in_channels=8, feat_channels=8,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[.5, 1., 2.], strides=STRIDES),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', **(coder or {})),
        loss_cls=kwargs.pop('loss_cls', dict(type='CrossEntropyLoss', use_sigmoid=True)),
        loss_bbox=kwargs.pop('loss_bbox', dict(type='L1Loss')),
        train_cfg=ConfigDict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.7, neg_iou_thr=.3, min_pos_iou=.3, **(assigner or {})),
            sampler={**dict(type='RandomSampler', num=num, pos_fraction=.5, add_gt_as_proposals=False), **(sampler or {})},
            **{**dict(allowed_border=-1, pos_weight=-1), **kwargs}),
        test_cfg=ConfigDict(PROPOSALS))


def roi_config(cls, extractor, num=ALL, assigner=None, head=None, mask=True, **kwargs):
    layer = dict(type='RoIAlign', sampling_ratio=0)
    extractor = dict(type=extractor, out_channels=8, featmap_strides=STRIDES[:4], finest_scale=16)
    config = dict(
        type=cls,
        bbox_roi_extractor=dict(extractor, roi_layer=dict(layer, output_size=7)),
        bbox_head={**dict(
            type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=16, roi_feat_size=7, num_classes=5,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[.1, .1, .2, .2]),
            loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='L1Loss')), **(head or {})},
        mask_roi_extractor=dict(extractor, roi_layer=dict(layer, output_size=14)),
        mask_head=dict(type='FCNMaskHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=5,
                       loss_mask=dict(type='CrossEntropyLoss', use_mask=True)),
        train_cfg=ConfigDict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.5, min_pos_iou=.5, **(assigner or {})),
            sampler=dict(type='RandomSampler', num=num, pos_fraction=.25, add_gt_as_proposals=kwargs.pop('add_gt', True)),
            **{**dict(mask_size=28, pos_weight=-1), **kwargs}))
    if not mask:
        del config['mask_roi_extractor'], config['mask_head']
    return config


def some_boxes(count):
    corner, size = torch.rand(count, 2) * torch.tensor([110., 80.]), 6 + 50 * torch.rand(count, 2)
    return torch.cat([corner, torch.minimum(corner + size, torch.tensor([128., 96.]))], 1)


def samples(counts=(3, 0, 12, 1), masks='device', shapes=None):
    result = []
    for image, count in enumerate(counts):
        shape = shapes[image] if shapes else SIZE
        sample = DetDataSample(metainfo=dict(img_shape=shape, pad_shape=shape, ori_shape=shape, scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(bboxes=some_boxes(count), labels=torch.randint(0, 5, (count, )))
        if masks == 'polygon':
            shapes_ = [[np.array([x1, y1, x2, y1, x2, y2])] for x1, y1, x2, y2 in sample.gt_instances.bboxes.tolist()]
            sample.gt_instances.masks = PolygonMasks(shapes_, *SIZE)
        else:
            bitmap = (np.random.RandomState(image).rand(count, *SIZE) < .5).astype(np.uint8)
            sample.gt_instances.masks = (
                DeviceMasks(torch.from_numpy(bitmap)) if masks == 'device' else BitmapMasks(bitmap, *SIZE))
        sample.ignored_instances = InstanceData(bboxes=some_boxes(image % 2), labels=torch.zeros(image % 2).long())
        result.append(sample)
    return result


def features(images=4, levels=5):
    return tuple(torch.randn(images, 8, -(-SIZE[0] // stride), -(-SIZE[1] // stride), requires_grad=True)
                 for stride in STRIDES[:levels])


def build(config):
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(1)
        model = MODELS.build(config)
        model.init_weights()
        for parameter in model.parameters():  # large enough for boxes to move
            parameter.data += .05 * torch.randn_like(parameter)
        return model.train()


def assert_same(ours, theirs, run):
    """Losses and gradients of two heads with the same weights, on the same features."""
    results = []
    for head in (ours, theirs):
        torch.manual_seed(2)
        x = features()
        losses = run(head, x)
        total = sum(sum(value) if isinstance(value, list) else value for name, value in losses.items() if 'loss' in name)
        grads = torch.autograd.grad(total.sum(), [*x, *head.parameters()], allow_unused=True)
        sums = {name: sum(value).sum() if isinstance(value, list) else value.sum() for name, value in losses.items()}
        results.append((sums, [torch.zeros(()) if grad is None else grad for grad in grads]))
    (our_losses, our_grads), (their_losses, their_grads) = results
    assert our_losses.keys() == their_losses.keys()
    for name, value in our_losses.items():
        torch.testing.assert_close(value, their_losses[name], rtol=1e-5, atol=1e-6)
    for a, b in zip(our_grads, their_grads):
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-4, atol=1e-6)
    return our_losses


# Region proposals


def rpn_loss(data):
    for each in data:
        each.gt_instances.labels = torch.zeros_like(each.gt_instances.labels)  # as detectors have it

    def run(head, x):
        return head.loss_by_feat(*head(x), [s.gt_instances for s in data], [s.metainfo for s in data],
                                 [s.ignored_instances for s in data])

    return run


@pytest.mark.parametrize('counts', [(3, 0, 12, 1), (0, 0, 0, 0), (30, 2, 2, 5)])
@pytest.mark.parametrize('options', [
    {}, dict(allowed_border=0), dict(allowed_border=16), dict(pos_weight=2.), dict(assigner=dict(ignore_iof_thr=.5)),
    dict(loss_bbox=dict(type='SmoothL1Loss', beta=.11, loss_weight=2.)), dict(sampler=dict(neg_pos_ub=ALL)),
    dict(coder=dict(target_stds=[.5, .5, .2, .2]))], ids=lambda options: '-'.join(options) or 'usual')
def test_losses_of_the_rpn(counts, options):
    ours, theirs = (build(dict(type=cls, **rpn_config(**options))) for cls in ('DeviceRPNHead', 'RPNHead'))
    losses = assert_same(ours, theirs, rpn_loss(samples(counts)))
    assert losses['loss_rpn_cls'] > 0 and (losses['loss_rpn_bbox'] > 0) == (sum(counts) > 0)


def test_losses_of_images_that_were_padded():
    ours, theirs = (build(dict(type=cls, **rpn_config())) for cls in ('DeviceRPNHead', 'RPNHead'))
    assert_same(ours, theirs, rpn_loss(samples(shapes=[(96, 128), (64, 96), (32, 128), (70, 100)])))


LEFT_TO_MMDETECTION = [dict(nms=None), dict(nms=dict(type='soft_nms')), dict(nms=dict(type='nms', iou_thr=.7)),
                       dict(nms=dict(type='nms', iou_threshold=.7, max_num=9)), dict(max_per_img=-1)]


@pytest.mark.parametrize('options', [
    {}, dict(min_bbox_size=12), dict(min_bbox_size=-1), dict(nms_pre=20), dict(nms_pre=-1), dict(max_per_img=5000),
    dict(nms=dict(type='nms', iou_threshold=.1)), dict(min_bbox_size=1000), *LEFT_TO_MMDETECTION], ids=str)
def test_proposals(options):
    ours, theirs = (build(dict(type=cls, **rpn_config())) for cls in ('DeviceRPNHead', 'RPNHead'))
    metas = [s.metainfo for s in samples(shapes=[(96, 128), (64, 96), (32, 128), (70, 100)])]
    x, cfg = features(), ConfigDict({**PROPOSALS, **options})
    results = [head.predict_by_feat(*head(x), batch_img_metas=metas, cfg=cfg) for head in (ours, theirs)]
    assert isinstance(results[0], Proposals) == (options not in LEFT_TO_MMDETECTION)
    assert options in LEFT_TO_MMDETECTION or len({len(padded) for padded in results[0].padded}) == 1
    for our, their in zip(*results):
        assert set(our.keys()) == set(their.keys()) and len(our) == len(their)  # in the order of a set
        assert (len(our) > 4) == (options != dict(min_bbox_size=1000))
        torch.testing.assert_close(our.bboxes, their.bboxes)
        torch.testing.assert_close(our.scores, their.scores, check_dtype=False)


def test_proposals_for_any_roi_head():
    """Stock heads find the proposals that are there, and may keep something in them."""
    rpn, roi = build(dict(type='DeviceRPNHead', **rpn_config())), build(roi_config('StandardRoIHead', 'SingleRoIExtractor'))
    x, data = features(), samples()
    few = ConfigDict(PROPOSALS, nms=dict(type='nms', iou_threshold=.1))
    _, proposals = rpn.loss_and_predict(x, copy.deepcopy(data), proposal_cfg=few)
    there = [len(padded[padded.valid]) for padded in proposals.padded]
    assert there != [len(padded) for padded in proposals.padded]
    roi.loss(x[:4], proposals, data)
    assert [len(each.priors) for each in proposals] == there


def test_testing_is_mmdetections():
    ours, theirs = (build(dict(type=cls, **rpn_config())).eval() for cls in ('DeviceRPNHead', 'RPNHead'))
    x, data = features(), samples()
    for our, their in zip(ours.predict(x, data), theirs.predict(x, data)):
        assert set(our.keys()) == set(their.keys()) and all(torch.equal(our[key], their[key]) for key in their.keys())  # noqa: SIM118


@pytest.mark.parametrize('options', [
    dict(loss_cls=dict(type='FocalLoss', use_sigmoid=True)), dict(sampler=dict(type='PseudoSampler')),
    dict(assigner=dict(iou_calculator=dict(type='BboxOverlaps2D', dtype='fp16'))),
    dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, class_weight=[2.]))], ids=lambda o: next(iter(o)))
def test_other_settings_are_mmdetections(options):
    ours, theirs = (build(dict(type=cls, **rpn_config(**options))) for cls in ('DeviceRPNHead', 'RPNHead'))
    assert_same(ours, theirs, rpn_loss(samples()))


# RoIs


def roi_loss(data, padded=False, there=40, seed=None):

    def run(head, x):
        torch.manual_seed(3)
        proposals = []
        for count in (there, there, 3, there):
            boxes = InstanceData(bboxes=some_boxes(count), scores=torch.rand(count), labels=torch.zeros(count).long())
            valid, filled = torch.rand(50).argsort().argsort() < count, some_boxes(50)
            if padded and isinstance(head, DeviceRoIHead):
                filled[valid] = boxes.bboxes
                boxes = InstanceData(bboxes=filled, scores=torch.zeros(50), labels=torch.zeros(50).long(), valid=valid)
            proposals.append(boxes)
        if padded and isinstance(head, DeviceRoIHead):
            proposals = Proposals(proposals)
        torch.manual_seed(seed or 0)
        return head.loss(x, proposals, copy.deepcopy(data))

    return run


def both(**options):
    return (build(roi_config(*names, **options)) for names in [
        ('DeviceRoIHead', 'DeviceRoIExtractor'), ('StandardRoIHead', 'SingleRoIExtractor')])


@pytest.mark.parametrize('counts', [(3, 0, 12, 1), (0, 0, 0, 0), (30, 2, 2, 5)])
@pytest.mark.parametrize('options', [
    {}, dict(add_gt=False), dict(pos_weight=2.), dict(assigner=dict(match_low_quality=False)),
    dict(assigner=dict(ignore_iof_thr=.3)), dict(head=dict(loss_bbox=dict(type='SmoothL1Loss', beta=.5))), dict(mask=False),
    dict(head=dict(reg_class_agnostic=True)), dict(soft_mask_target=True)], ids=lambda options: '-'.join(options) or 'usual')
def test_losses_of_rois(counts, options):
    losses = assert_same(*both(**options), roi_loss(samples(counts), padded=True))
    assert losses['loss_cls'] > 0 and losses.get('loss_mask', 1) >= (sum(counts) > 0) * 1e-3


@pytest.mark.parametrize('masks', ['device', 'bitmap', 'polygon'])
@pytest.mark.parametrize('padded', [True, False])
def test_kinds_of_masks(masks, padded):
    assert_same(*both(), roi_loss(samples(masks=masks), padded))


def test_no_proposals_at_all():
    assert_same(*both(), roi_loss(samples((2, 0, 1, 1)), there=0))


def test_losses_of_a_random_half_of_the_samples():
    """The mean over many draws is the same, to four standard errors."""
    data, (ours, theirs) = samples((30, 0, 12, 1)), both(num=24)
    torch.manual_seed(2)
    x, draws = features(), []
    for head in (ours, theirs):
        with torch.no_grad():
            losses = [roi_loss(data, padded=True, seed=seed)(head, x) for seed in range(60)]
        draws.append(torch.stack([torch.stack([value.sum() for value in each.values()]) for each in losses]))
    (a, b), error = (draw.mean(0) for draw in draws), sum(draw.var(0) / len(draw) for draw in draws).sqrt()
    assert ((a - b).abs() <= 4 * error).all()


@pytest.mark.parametrize('options', [
    dict(head=dict(reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss'))),
    dict(head=dict(loss_cls=dict(type='CrossEntropyLoss', class_weight=[1., 1., 1., 1., 1., .5])))],
                         ids=['decoded', 'class_weight'])
def test_other_roi_settings_are_mmdetections(options):
    assert_same(*both(**options), roi_loss(samples(), padded=True))


def test_the_extractor_pools_every_roi_from_its_level():
    extractors = [cls(dict(type='RoIAlign', output_size=7, sampling_ratio=0), 8, STRIDES[:4], finest_scale=16).train()
                  for cls in (DeviceRoIExtractor, SingleRoIExtractor)]
    image = torch.randint(0, 4, (60, 1)).float()
    rois = torch.cat([image, some_boxes(60) * torch.rand(60, 1)], 1)
    rois[3:6, 1:] = 0
    results = []
    for extractor in extractors:
        torch.manual_seed(4)
        x = features(levels=4)
        out = extractor(x, rois)
        results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    assert torch.equal(extractors[0].eval()(features(levels=4), rois[:0]), torch.zeros(0, 8, 7, 7))


class NoWaiting(TorchDispatchMode):
    """Raises at what makes the host wait for a device, or copies from it."""
    WAITS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        assert name not in self.WAITS, name
        if name in ('index', 'index_put', 'index_put_'):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits(monkeypatch):
    """On a CPU nothing waits, but the operators that would are seen."""
    rpn = build(dict(type='DeviceRPNHead', **rpn_config(num=64, allowed_border=0)))
    roi = build(roi_config('DeviceRoIHead', 'DeviceRoIExtractor', num=32))
    monkeypatch.setattr('liera_mm.models.masks.roi_align',
                        lambda masks, rois, size, *_: masks.new_zeros(len(rois), 1, *size))
    # On a device, kernels of their own do these
    monkeypatch.setattr('liera_mm.core.kernels.torch_ops.roi_pool', lambda features, rois, _, scales, bins: features[0][
        rois[:, 0].long(), :1, :1].expand(-1, bins, bins, -1).contiguous())
    monkeypatch.setattr('liera_mm.core.kernels.torch_ops.nms_kept', lambda boxes, threshold: boxes[..., 2] > 5)
    x, data = features(), samples()
    with NoWaiting():
        losses, proposals = rpn.loss_and_predict(x, copy.deepcopy(data), proposal_cfg=ConfigDict(PROPOSALS))
        losses.update(roi.loss(x[:4], proposals, data))
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'acc', 'loss_bbox', 'loss_mask'} == losses.keys()
    theirs = build(dict(type='RPNHead', **rpn_config(num=64)))
    with pytest.raises(AssertionError), NoWaiting():
        theirs.loss_and_predict(x, data, proposal_cfg=ConfigDict(PROPOSALS))


def test_classes_build_from_mmdets_scope():
    assert isinstance(build(dict(type='mmdet.RPNHead', **rpn_config())), RPNHead)
    assert isinstance(build(dict(type='DeviceRPNHead', **rpn_config())), DeviceRPNHead)
    assert isinstance(build(roi_config('DeviceRoIHead', 'SingleRoIExtractor')), StandardRoIHead)


@pytest.mark.parametrize('name', ['mask-rcnn_convnextv2-b_liera_r16.py', 'digits/mask-rcnn_convnextv2-mini_liera_digits.py'])
def test_nothing_in_our_configs_is_left_to_mmdetection(name):
    model = load_config(str(CONFIGS / name)).model
    rpn = build(dict(model.rpn_head, type='DeviceRPNHead', train_cfg=model.train_cfg.rpn, test_cfg=model.test_cfg.rpn,
                     init_cfg=None))
    assert not unsupported(rpn.assigner, rpn.sampler, rpn.bbox_coder) and rpn._usual_losses()
    roi = build(dict(model.roi_head, type='DeviceRoIHead', train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn,
                     init_cfg=None))
    assert roi._usual()
