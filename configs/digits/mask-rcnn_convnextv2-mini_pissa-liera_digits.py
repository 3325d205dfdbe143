# PiSSA in the Lie algebra, W ⊙ (1 + Δ), rank 4
_base_ = 'mask-rcnn_convnextv2-mini_pissa_digits.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
