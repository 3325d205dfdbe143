# LieRA with fewer parameters: Δ itself for depthwise kernels, where it is smaller than its factors, rank 4 elsewhere
_base_ = 'mask-rcnn_convnextv2-mini_liera_digits.py'

model = dict(backbone=dict(liera=dict(overrides=[dict(targets=['depthwise'], method='dense')])))
