# LoRA, W + Δ, rank 16: the paper's baseline (Table 2)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(update='additive')))
