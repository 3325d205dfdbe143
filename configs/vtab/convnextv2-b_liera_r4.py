# LieRA, rank 4 (Table 1)
_base_ = 'convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(rank=4, alpha=8)))
