# LieRA, W ⊙ (1 + Δ), rank 4, on blood cells
_base_ = '../_base_/faster-rcnn_mobilenetv2_cells.py'

model = dict(backbone=dict(liera=dict(rank=4)))
