# PiSSA in the Lie algebra, W ⊙ (1 + Δ), rank 16: "PISSA+Ours" of Table 7
_base_ = 'mask-rcnn_convnextv2-b_pissa_r16.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
