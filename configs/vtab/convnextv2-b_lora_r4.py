# LoRA, W + Δ, rank 4: the paper's baseline (Table 1)
_base_ = 'convnextv2-b_liera_r4.py'

model = dict(backbone=dict(liera=dict(update='additive')))
