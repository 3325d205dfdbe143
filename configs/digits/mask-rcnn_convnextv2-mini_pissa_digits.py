# PiSSA, W + Δ, rank 4
_base_ = 'mask-rcnn_convnextv2-mini_liera_digits.py'

# alpha = rank: the factors start as the leading part of W itself, as in PiSSA's paper
model = dict(backbone=dict(liera=dict(method='pissa', update='additive', alpha=4)))
