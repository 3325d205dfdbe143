# LieRA, rank 8, on tree crowns
_base_ = '../_base_/faster-rcnn_mobilenetv2_trees.py'

model = dict(backbone=dict(liera=dict(rank=8, alpha=32)))
