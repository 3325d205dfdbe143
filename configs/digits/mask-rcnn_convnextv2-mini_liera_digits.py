# LieRA, W ⊙ (1 + Δ), rank 4
_base_ = '../_base_/mask-rcnn_convnextv2-mini_digits.py'

model = dict(backbone=dict(liera=dict(rank=4, update='taylor')))
