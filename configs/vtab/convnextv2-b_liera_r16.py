# LieRA, W ⊙ (1 + Δ), rank 16 on stem, downsampling and depthwise layers: 14,383,424 factors (Table 1)
_base_ = '../_base_/convnextv2-b_vtab.py'

# alpha = 2 · rank, the ratio of the paper's Tables 9 and 10; its classification settings give none
model = dict(backbone=dict(liera=dict(rank=16, alpha=32, update='taylor', targets=['conv', 'depthwise'])))
