# LoRA, W + Δ, rank 2: the paper's baseline (Table 1)
_base_ = 'convnextv2-b_liera_r2.py'

model = dict(backbone=dict(liera=dict(update='additive')))
