# LieRA, rank 32: 34.54 M parameters in the backbone (Table 2)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(rank=32)))
