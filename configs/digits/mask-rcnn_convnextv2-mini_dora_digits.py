# DoRA, rank 4
_base_ = 'mask-rcnn_convnextv2-mini_liera_digits.py'

model = dict(backbone=dict(liera=dict(method='dora', update='additive')))
