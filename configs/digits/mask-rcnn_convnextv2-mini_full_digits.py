# Everything trained: mmpretrain's backbone as it is
_base_ = '../_base_/mask-rcnn_convnextv2-mini_digits.py'

model = dict(backbone=dict(type='mmpretrain.ConvNeXt'))
custom_hooks = []
