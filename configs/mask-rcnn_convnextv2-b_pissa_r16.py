# PiSSA, W + Δ, rank 16 (Table 7)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

# alpha = rank: the factors start as the leading part of W itself, as in PiSSA's paper
model = dict(backbone=dict(liera=dict(method='pissa', update='additive', alpha=16)))
