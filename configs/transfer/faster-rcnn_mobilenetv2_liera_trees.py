# LieRA, rank 8, and Δ itself on depthwise kernels, on tree crowns
_base_ = '../_base_/faster-rcnn_mobilenetv2_trees.py'

model = dict(backbone=dict(liera=dict(rank=8, overrides=[dict(targets=['depthwise'], method='dense')])))
