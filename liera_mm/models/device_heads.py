"""Region proposals and RoI heads of two-stage detectors that never make the host wait for the device in training.

In MMDetection's, numbers of positive samples, kept boxes or RoIs of a level are read from the device hundreds of times a
step. Here all images go together, in tensors of fixed shapes. The results are MMDetection's, to rounding: the same
assignments, the same random choice in distribution, the same losses. In testing these classes are MMDetection's own.
"""
import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmdet.models.losses import CrossEntropyLoss, L1Loss, SmoothL1Loss
from mmdet.models.roi_heads import SingleRoIExtractor, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures.mask.mask_target import mask_target_single
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn.modules.utils import _pair

from ..core.kernels import ops_for
from ..core.kernels.roi import roi_pool
from .masks import DeviceMasks
from .targets import Boxes, Samples, assign, decode, encode, image_sizes, pad_boxes, sample, take, unsupported

MASKS_AT_ONCE = 32  # the mask head gets a multiple of this many RoIs: every other number would have cuDNN plan anew


class Proposals(Sequence):
    """The proposals of each image. The first look at them waits for the device, which :class:`DeviceRoIHead` does without.

    Attributes:
        padded (list[InstanceData]): The same, filled up to one number, and ``valid`` says which are there.
    """

    def __init__(self, padded: List[InstanceData]):
        self.padded = padded

    @functools.cached_property
    def _there(self) -> List[InstanceData]:
        results = [each[each.valid] for each in self.padded]
        for result in results:
            del result.valid
        return results

    def __getitem__(self, index: Any) -> Any:
        return self._there[index]

    def __len__(self) -> int:
        return len(self.padded)


@MODELS.register_module()
class DeviceRPNHead(RPNHead):
    """MMDetection's ``RPNHead``, whose targets, losses and proposals in training are those of the whole batch at once.

    With an assigner, sampler, coder or loss that is not the usual one of Mask R-CNN, it does what ``RPNHead`` does.
    """

    def loss_by_feat(self,
                     cls_scores: List[Tensor],
                     bbox_preds: List[Tensor],
                     batch_gt_instances: List[InstanceData],
                     batch_img_metas: List[dict],
                     batch_gt_instances_ignore: Optional[List[Optional[InstanceData]]] = None) -> Dict[str, List[Tensor]]:
        if unsupported(self.assigner, self.sampler, self.bbox_coder) or not self._usual_losses():
            return super().loss_by_feat(cls_scores, bbox_preds, batch_gt_instances, batch_img_metas,
                                        batch_gt_instances_ignore)
        sizes, device = tuple(tuple(score.shape[-2:]) for score in cls_scores), cls_scores[0].device
        anchors = torch.cat(_anchors(self.prior_generator, sizes, torch.float32, device))
        scores = torch.cat([_by_anchor(score, 1)[..., 0] for score in cls_scores], 1)
        deltas = torch.cat([_by_anchor(delta, 4) for delta in bbox_preds], 1)
        gts = pad_boxes(batch_gt_instances, anchors)
        ignored = pad_boxes(batch_gt_instances_ignore or [None] * len(scores), anchors)
        with torch.no_grad():
            assigned = assign(self.assigner, anchors, gts, ignored, self._inside(anchors, sizes, batch_img_metas))
            samples = sample(self.sampler, assigned)
        index, positive = samples.index, samples.positive
        taken = positive.sum(1).clamp(min=1) + samples.negative.sum(1).clamp(min=1)
        weight = 1. if self.train_cfg['pos_weight'] <= 0 else self.train_cfg['pos_weight']
        loss_cls = self.loss_cls(
            take(scores, index).flatten(), positive.flatten().float(),
            (positive * weight + samples.negative).flatten(), avg_factor=taken.sum())
        index, positive = index[:, :samples.slots], positive[:, :samples.slots]
        targets = encode(self.bbox_coder, anchors[index], take(gts.boxes, take(assigned, index).sub(1).clamp(min=0)))
        loss_bbox = _box_loss(self.loss_bbox, take(deltas, index), targets, positive, taken.sum())
        return dict(loss_rpn_cls=[loss_cls], loss_rpn_bbox=[loss_bbox])

    @torch.no_grad()
    def predict_by_feat(self,
                        cls_scores: List[Tensor],
                        bbox_preds: List[Tensor],
                        score_factors: Optional[List[Tensor]] = None,
                        batch_img_metas: Optional[List[dict]] = None,
                        cfg: Optional[dict] = None,
                        rescale: bool = False,
                        with_nms: bool = True) -> Sequence[InstanceData]:
        if (not self.training or cfg is None or rescale or not with_nms or not self.use_sigmoid_cls
                or unsupported(self.assigner, self.sampler, self.bbox_coder)
                or (cfg.nms or {}).keys() != {'type', 'iou_threshold'} or cfg.nms.type != 'nms' or cfg.max_per_img < 0):
            return super().predict_by_feat(cls_scores, bbox_preds, score_factors, batch_img_metas, cfg, rescale, with_nms)
        sizes, device = tuple(tuple(score.shape[-2:]) for score in cls_scores), cls_scores[0].device
        anchors = _anchors(self.prior_generator, sizes, cls_scores[0].dtype, device)
        limits = image_sizes(batch_img_metas, device)
        per_level = cfg.get('nms_pre', -1)
        longest = max(map(len, anchors)) if per_level <= 0 else min(per_level, max(map(len, anchors)))
        boxes, scores = [], []
        for score, delta, priors in zip(cls_scores, bbox_preds, anchors):
            score = _by_anchor(score, 1)[..., 0].sigmoid()
            score, index = score.topk(min(longest, len(priors)))
            box = decode(self.bbox_coder, priors[index], take(_by_anchor(delta, 4), index), limits).float()
            padding = longest - len(index[0])
            boxes.append(F.pad(box, (0, 0, 0, padding)))
            scores.append(F.pad(score.float(), (0, padding), value=-1.))
        boxes, scores = torch.stack(boxes, 1), torch.stack(scores, 1)  # (N, levels, longest)
        if cfg.get('min_bbox_size', -1) >= 0:
            large = (boxes[..., 2:] - boxes[..., :2] > cfg.min_bbox_size).all(-1)
            boxes, scores = boxes * large[..., None], torch.where(large, scores, -1.)
        kept = ops_for(boxes).nms_kept(boxes.flatten(0, 1), float(np.float32(cfg.nms.iou_threshold))).view_as(scores)
        scores, index = torch.where(kept, scores, -1.).flatten(1).topk(min(cfg.max_per_img, scores[0].numel()))
        valid = scores >= 0
        boxes = take(boxes.flatten(1, 2), index) * valid[..., None]
        return Proposals([InstanceData(bboxes=b, scores=s, labels=torch.zeros_like(s, dtype=torch.long), valid=v)
                          for b, s, v in zip(boxes, scores, valid)])

    def _usual_losses(self) -> bool:
        return (type(self.loss_cls) is CrossEntropyLoss and self.loss_cls.use_sigmoid and self.loss_cls.class_weight is None
                and type(self.loss_bbox) in (L1Loss, SmoothL1Loss) and not self.reg_decoded_bbox)

    def _inside(self, anchors: Tensor, sizes: Tuple[Tuple[int, int], ...], metas: Sequence[dict]) -> Optional[Tensor]:
        """Anchors of each image that lie in it, (N, P); None for all."""
        covers = [all(min(-(-meta['pad_shape'][axis] // stride[1 - axis]), size[axis]) == size[axis]
                      for stride, size in zip(self.prior_generator.strides, sizes) for axis in (0, 1)) for meta in metas]
        inside = None
        if not all(covers):
            flags = [torch.cat(_flags(self.prior_generator, sizes, tuple(meta['pad_shape'][:2]), anchors.device))
                     for meta in metas]
            inside = torch.stack(flags)
        border = self.train_cfg['allowed_border']
        if border >= 0:
            limits = image_sizes(metas, anchors.device)[:, None] + border
            near = (anchors[:, :2] >= -border).all(1) & (anchors[:, 2:] < limits).all(2)
            inside = near if inside is None else inside & near
        return inside


@MODELS.register_module()
class DeviceRoIHead(StandardRoIHead):
    """MMDetection's ``StandardRoIHead``, whose RoIs, targets and losses in training are those of the whole batch at once.

    The number of positive RoIs, which is the mask head's batch, is the only one that the host asks for: after the box head's
    work has been queued, so that the device never waits.

    With an assigner, sampler, coder or loss that is not the usual one of Mask R-CNN, it does what ``StandardRoIHead`` does.
    """

    def loss(self, x: Tuple[Tensor], rpn_results_list: Sequence[InstanceData],
             batch_data_samples: list) -> Dict[str, Tensor]:
        if not self._usual():
            return super().loss(x, rpn_results_list, batch_data_samples)
        gt_instances, ignored_instances, _ = unpack_gt_instances(batch_data_samples)
        if isinstance(rpn_results_list, Proposals):
            proposals, usable = (torch.stack([each[key] for each in rpn_results_list.padded]) for key in ('bboxes', 'valid'))
        else:
            proposals, usable, _ = pad_boxes(rpn_results_list, x[0])
        gts = pad_boxes(gt_instances, x[0])
        boxes, samples, gt_index = self._sample(proposals, usable, gts, pad_boxes(ignored_instances, x[0]))
        labels = torch.where(samples.positive, take(gts.labels, gt_index), self.bbox_head.num_classes)
        counts, counted = samples.positive.sum(1).to('cpu', non_blocking=True), None
        if boxes.is_cuda:
            counted = torch.cuda.Event()
            counted.record()
        losses = self._box_losses(x, boxes, samples, labels, take(gts.boxes, gt_index))
        if self.with_mask:
            if counted is not None:
                counted.synchronize()
            losses['loss_mask'] = self._mask_loss(x, boxes, gt_index, labels, counts.tolist(), gt_instances)
        return losses

    @torch.no_grad()
    def _sample(self, proposals: Tensor, usable: Tensor, gts: Boxes, ignored: Boxes) -> Tuple[Tensor, Samples, Tensor]:
        """RoIs (N, S, 4), zero where samples fill up; the samples; and the box of the ground truth of each, (N, S)."""
        assigned = assign(self.bbox_assigner, proposals, gts, ignored, usable)
        if self.bbox_sampler.add_gt_as_proposals:
            numbers = torch.arange(1, 1 + gts.valid.shape[1], device=assigned.device)
            assigned = torch.cat([torch.where(gts.valid, numbers, -1), assigned], 1)
            proposals = torch.cat([gts.boxes, proposals], 1)
        samples = sample(self.bbox_sampler, assigned)
        boxes = take(proposals, samples.index) * (samples.positive | samples.negative)[..., None]
        return boxes, samples, take(assigned, samples.index).sub(1).clamp(min=0)

    def _box_losses(self, x: Tuple[Tensor], boxes: Tensor, samples: Samples, labels: Tensor,
                    gts: Tensor) -> Dict[str, Tensor]:
        head, slots = self.bbox_head, samples.slots
        results = self._bbox_forward(x, _rois(boxes))
        taken = samples.positive | samples.negative
        weight = 1. if self.train_cfg.pos_weight <= 0 else self.train_cfg.pos_weight
        scores, count = results['cls_score'], taken.sum()
        right = (scores.argmax(1) == labels.flatten()) & taken.flatten()
        losses = dict(
            loss_cls=head.loss_cls(scores, labels.flatten(), (samples.positive * weight + samples.negative).flatten(),
                                   avg_factor=count.clamp(min=1)),
            acc=right.float().sum(0, keepdim=True) * 100 / count.clamp(min=1))
        positive, deltas = samples.positive[:, :slots], results['bbox_pred']
        deltas = deltas.view(*labels.shape, -1, 4)[:, :slots]
        classes = torch.zeros_like(labels) if head.reg_class_agnostic else labels.clamp(max=head.num_classes - 1)
        deltas = deltas.gather(2, classes[:, :slots, None, None].expand(-1, -1, 1, 4))[:, :, 0]
        targets = encode(head.bbox_coder, boxes[:, :slots], gts[:, :slots])
        losses['loss_bbox'] = _box_loss(head.loss_bbox, deltas, targets, positive, count)
        return losses

    def _mask_loss(self, x: Tuple[Tensor], boxes: Tensor, gt_index: Tensor, labels: Tensor, counts: List[int],
                   instances: List[InstanceData]) -> Tensor:
        head, total = self.mask_head, sum(counts)
        rois = _rois(boxes).view(*labels.shape, 5)
        rois = torch.cat([roi[:count] for roi, count in zip(rois, counts)])
        padding = max(-total % MASKS_AT_ONCE, MASKS_AT_ONCE * (total == 0))
        predictions = self._mask_forward(x, F.pad(rois, (0, 0, 0, padding)))['mask_preds'][:total]
        if total == 0:
            return predictions.sum()
        targets = [_mask_targets(box[:count], index[:count], instance.masks, self.train_cfg)
                   for box, index, count, instance in zip(boxes, gt_index, counts, instances) if count]
        labels = torch.cat([label[:count] for label, count in zip(labels, counts)])
        return head.loss_mask(predictions, torch.cat(targets), torch.zeros_like(labels) if head.class_agnostic else labels)

    def _usual(self) -> bool:
        head = self.bbox_head
        return (not unsupported(self.bbox_assigner, self.bbox_sampler, head.bbox_coder) and not self.with_shared_head
                and type(head).loss is BBoxHead.loss and type(head).loss_and_target is BBoxHead.loss_and_target
                and type(head.loss_cls) is CrossEntropyLoss and not head.loss_cls.use_sigmoid
                and head.loss_cls.class_weight is None and type(head.loss_bbox) in (L1Loss, SmoothL1Loss)
                and not head.reg_decoded_bbox and head.with_cls and head.with_reg
                and not (self.with_mask and self.share_roi_extractor))


@MODELS.register_module()
class DeviceRoIExtractor(SingleRoIExtractor):
    """MMDetection's ``SingleRoIExtractor``, but in training all RoIs are pooled at once, each from the level of its own."""

    def forward(self, feats: Tuple[Tensor], rois: Tensor, roi_scale_factor: Optional[float] = None) -> Tensor:
        usual = all(getattr(layer, 'aligned', False) and layer.sampling_ratio == 0 and layer.pool_mode == 'avg'
                    and layer.output_size[0] == layer.output_size[1] for layer in self.roi_layers)
        deterministic = torch.are_deterministic_algorithms_enabled()
        if not (self.training and usual) or len(feats) == 1 or len(rois) == 0 or deterministic:
            return super().forward(feats, rois, roi_scale_factor)
        rois = rois.type_as(feats[0])
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        scales = [layer.spatial_scale for layer in self.roi_layers]
        return roi_pool(feats, rois, levels, scales, self.roi_layers[0].output_size[0])


@functools.lru_cache(maxsize=16)
def _anchors(generator: Any, sizes: Tuple[Tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> List[Tensor]:
    return generator.grid_priors(sizes, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _flags(generator: Any, sizes: Tuple[Tuple[int, int], ...], shape: Tuple[int, int], device: torch.device) -> List[Tensor]:
    return generator.valid_flags(sizes, shape, device)


def _by_anchor(predictions: Tensor, channels: int) -> Tensor:
    """From (N, A · channels, H, W) to (N, H · W · A, channels)."""
    return predictions.permute(0, 2, 3, 1).reshape(len(predictions), -1, channels)


def _box_loss(loss: torch.nn.Module, deltas: Tensor, targets: Tensor, positive: Tensor, count: Tensor) -> Tensor:
    """Of the positive samples. The others are their own targets, since these losses look at weights whether all are zero."""
    targets = torch.where(positive[..., None], targets, deltas.detach())
    return loss(deltas.reshape(-1, 4), targets.reshape(-1, 4), avg_factor=count)


def _rois(boxes: Tensor) -> Tensor:
    """From (N, S, 4) to (N · S, 5), the image first."""
    image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(-1, boxes.shape[1], -1)
    return torch.cat([image, boxes], 2).flatten(0, 1)


def _mask_targets(boxes: Tensor, index: Tensor, masks: Any, cfg: Any) -> Tensor:
    """Of positive RoIs, (K, height, width)."""
    if not isinstance(masks, DeviceMasks):
        return mask_target_single(boxes, index, masks, cfg)
    x1, y1, x2, y2 = boxes.unbind(1)
    boxes = torch.stack([x1.clamp(0, masks.width), y1.clamp(0, masks.height), x2.clamp(0, masks.width),
                         y2.clamp(0, masks.height)], 1)
    return masks.crops(boxes, _pair(cfg.mask_size), index, not cfg.get('soft_mask_target', False)).float()
