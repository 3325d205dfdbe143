# LieRA, rank 8, and Δ itself on depthwise kernels, on blood cells
_base_ = '../_base_/faster-rcnn_mobilenetv2_cells.py'

model = dict(backbone=dict(liera=dict(rank=8, overrides=[dict(targets=['depthwise'], method='dense')])))

# The detector learns at the rate that suits it beside full fine-tuning too, adapters at half of it (docs/transfer.md)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(adapter=dict(lr_mult=0.5))))
