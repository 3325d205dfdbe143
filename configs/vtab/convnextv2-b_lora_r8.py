# LoRA, W + Δ, rank 8: the paper's baseline (Table 1)
_base_ = 'convnextv2-b_liera_r8.py'

model = dict(backbone=dict(liera=dict(update='additive')))
