# DoRA in the Lie algebra, rank 16: "DoRA+Ours" of Table 7
_base_ = 'mask-rcnn_convnextv2-b_dora_r16.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
