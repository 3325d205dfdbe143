# FLoRA in the Lie algebra, W ⊙ (1 + Δ), with the same ranks
_base_ = 'mask-rcnn_convnextv2-b_tucker_r16.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
