# Filter subspace, W + Δ: of each layer with spatial extent, at most 16 filters (atoms) train, their coefficients do not
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

# alpha = rank: the coefficients are those of W itself
model = dict(backbone=dict(liera=dict(method='atom', update='additive', alpha=16, targets=['conv', 'depthwise'])))
