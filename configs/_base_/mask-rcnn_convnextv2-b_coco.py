# Mask R-CNN with ConvNeXt-V2-B on COCO 2017: MMDetection's projects/ConvNeXt-V2 with its 3x schedule cut to the paper's
# 12 epochs (Table 8). The backbone is frozen here; the configs that inherit this one say what of it trains.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py'
]
custom_imports = dict(imports=['liera_mm'], allow_failed_imports=False)

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-base_3rdparty-fcmae_in1k_20230104-8a798eaf.pth'
image_size = (1024, 1024)

model = dict(
    backbone=dict(
        _delete_=True,
        type='LieRAConvNeXt',
        arch='base',
        out_indices=[0, 1, 2, 3],
        drop_path_rate=0.4,  # the paper gives none; this is MMDetection's for this backbone
        layer_scale_init_value=0.,
        use_grn=True,
        gap_before_final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    neck=dict(in_channels=[128, 256, 512, 1024]),
    data_preprocessor=dict(
        type='DeviceMaskPreprocessor',
        non_blocking=True,
        # One size of images, as MMDetection's large-scale jitter has it, so that one CUDA graph is enough
        batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]),
    rpn_head=dict(type='DeviceRPNHead'),
    roi_head=dict(
        type='DeviceRoIHead',
        bbox_roi_extractor=dict(type='DeviceRoIExtractor'),
        mask_roi_extractor=dict(type='DeviceRoIExtractor')),
    train_cfg=dict(
        rpn=dict(sampler=dict(type='DeviceRandomSampler')), rcnn=dict(sampler=dict(type='DeviceRandomSampler'))),
    test_cfg=dict(rpn=dict(nms=dict(type='nms')), rcnn=dict(nms=dict(type='soft_nms'))))

# Large-scale jitter
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=image_size,
        recompute_bbox=True,
        allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDeviceInputs')
]
train_dataloader = dict(batch_size=4, num_workers=8, pin_memory=True, dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=32)  # 8 GPUs x 4 images

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)
]

# Gradients lie in the buckets that are all-reduced. No buffer changes in training, so none is broadcast
model_wrapper_cfg = dict(type='MMDistributedDataParallel', broadcast_buffers=False, gradient_as_bucket_view=True)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
custom_hooks = [dict(type='LieRAHook'), dict(type='CUDAGraphHook')]
