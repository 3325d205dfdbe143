# LieRA without the Taylor approximation, W ⊙ exp(Δ), rank 16 (Table 6)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(update='exp')))
