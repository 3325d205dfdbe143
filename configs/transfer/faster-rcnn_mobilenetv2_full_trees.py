# Everything trained, on tree crowns: MMDetection's backbone as it is
_base_ = '../_base_/faster-rcnn_mobilenetv2_trees.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 7),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint={{_base_.pretrained}})))
custom_hooks = []

# The best of the rates that were tried (docs/transfer.md)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
