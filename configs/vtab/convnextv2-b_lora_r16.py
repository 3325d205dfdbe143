# LoRA, W + Δ, rank 16: the paper's baseline (Table 1)
_base_ = 'convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(update='additive')))
