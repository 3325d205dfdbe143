# Everything trained: mmpretrain's backbone as it is
_base_ = '_base_/mask-rcnn_convnextv2-b_coco.py'

model = dict(backbone=dict(type='mmpretrain.ConvNeXt'))
custom_hooks = []

# MMDetection's rates for this backbone, lower in earlier layers; adapters did worse with them (docs/transfer.md)
optim_wrapper = dict(
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95, decay_type='layer_wise', num_layers=12))
