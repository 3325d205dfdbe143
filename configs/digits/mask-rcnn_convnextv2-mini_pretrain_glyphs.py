# The second stage of tools/model_converters/pretrain_mini.py, which makes the weights that the digits configs start from:
# the whole detector trains on printed letters and shapes over procedural textures.
_base_ = 'mask-rcnn_convnextv2-mini_full_digits.py'

classes = tuple('ABCDEFGHJKLMNPQRSTUVWXYZ') + ('circle', 'ring', 'triangle', 'square', 'star', 'cross')
data_root = 'data/glyphs/'

model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(init_cfg=dict(_delete_=True, type='Xavier', layer='Conv2d', distribution='uniform')),
    rpn_head=dict(init_cfg=dict(_delete_=True, type='Normal', layer='Conv2d', std=0.01)),
    roi_head=dict(init_cfg=None, bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))))

train_dataloader = dict(
    dataset=dict(
        indices=9600,
        data_root=data_root,
        metainfo=dict(classes=classes),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='RandomResize', scale=(160, 160), ratio_range=(0.6, 1.6), keep_ratio=True),
            dict(type='RandomCrop', crop_size=(160, 160), allow_negative_crop=True),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(4, 4)),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs')
        ]))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min_ratio=0.01, convert_to_iter_based=True)
]
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=1), logger=dict(interval=50))
