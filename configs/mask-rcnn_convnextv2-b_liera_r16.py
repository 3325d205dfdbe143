# LieRA, W ⊙ (1 + Δ), rank 16 on every convolution of the backbone: 17.27 M parameters (Table 2)
_base_ = '_base_/mask-rcnn_convnextv2-b_coco.py'

model = dict(backbone=dict(liera=dict(rank=16, update='taylor')))
