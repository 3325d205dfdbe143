# LieRA with 3.98 M parameters: Δ itself for depthwise kernels, where it is smaller than its factors, rank 16 elsewhere
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(overrides=[dict(targets=['depthwise'], method='dense')])))
