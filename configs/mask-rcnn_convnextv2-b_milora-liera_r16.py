# MiLoRA in the Lie algebra, W ⊙ (1 + Δ), rank 16
_base_ = 'mask-rcnn_convnextv2-b_milora_r16.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
