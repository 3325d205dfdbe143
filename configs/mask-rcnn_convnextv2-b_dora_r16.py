# DoRA, rank 16 (Table 7)
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(method='dora', update='additive')))
