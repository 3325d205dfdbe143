# LieRA, rank 2 (Table 1)
_base_ = 'convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(rank=2, alpha=4)))
