# LieRA, W ⊙ (1 + Δ), rank 16 on every convolution of the backbone: 17.27 M parameters (Table 2)
_base_ = '_base_/mask-rcnn_convnextv2-b_coco.py'

# alpha = 2 · rank, the ratio of the paper's Tables 9 and 10; its detection settings give none
model = dict(backbone=dict(liera=dict(rank=16, alpha=32, update='taylor')))
