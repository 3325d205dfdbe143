# LieRA, rank 8, and Δ itself on depthwise kernels, on blood cells
_base_ = '../_base_/faster-rcnn_mobilenetv2_cells.py'

model = dict(backbone=dict(liera=dict(rank=8, overrides=[dict(targets=['depthwise'], method='dense')])))
