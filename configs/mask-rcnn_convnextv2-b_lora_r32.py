# LoRA, W + Δ, rank 32: the paper's baseline (Table 2)
_base_ = 'mask-rcnn_convnextv2-b_liera_r32.py'

model = dict(backbone=dict(liera=dict(update='additive')))
