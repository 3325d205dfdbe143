# LieRA, rank 8, on blood cells
_base_ = '../_base_/faster-rcnn_mobilenetv2_cells.py'

model = dict(backbone=dict(liera=dict(rank=8, alpha=32)))
