# LieRA, rank 8 (Table 1)
_base_ = 'convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(rank=8, alpha=16)))
