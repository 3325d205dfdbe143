# MiLoRA, W + Δ, rank 16 (a row of Table 3, here for detection)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

# alpha = rank: the factors start as the minor part of W itself, as in MiLoRA's paper
model = dict(backbone=dict(liera=dict(method='milora', update='additive', alpha=16)))
