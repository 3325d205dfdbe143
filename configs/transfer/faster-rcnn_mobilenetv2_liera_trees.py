# LieRA, W ⊙ (1 + Δ), rank 4, on tree crowns
_base_ = '../_base_/faster-rcnn_mobilenetv2_trees.py'

model = dict(backbone=dict(liera=dict(rank=4)))
