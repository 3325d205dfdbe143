# A Faster R-CNN for the photographs of a user, some dozens to some thousands (docs/own_data.md): MobileNetV2 with ImageNet
# weights, adapted by LieRA. Classes and num_classes are read from the annotations. Anchors are 16 to 362 pixels large, on
# images of 400; features begin at stride 8, which halves the time on a CPU. A config says where its data are.
_base_ = 'faster-rcnn_mobilenetv2_transfer.py'

auto_classes = True
strides = [8, 16, 32, 64, 128]
model = dict(
    backbone=dict(backbone=dict(out_indices=(2, 4, 7)), liera=dict(rank=4)),
    neck=dict(in_channels=[32, 96, 1280], num_outs=len(strides)),
    rpn_head=dict(anchor_generator=dict(octave_base_scale=2, strides=strides)),
    roi_head=dict(bbox_roi_extractor=dict(featmap_strides=strides[:3]), bbox_head=dict(num_classes=None)))

scale = (400, 400)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PhotoMetricDistortion'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='RepeatDataset',
        times=1,
        dataset=dict(type='CocoDataset', filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline)))
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric='bbox')
test_evaluator = val_evaluator

train_cfg = dict(val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
