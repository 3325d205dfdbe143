# FLoRA, W + Δ: a Tucker core of rank 16 for channels and 2 for each side of a kernel
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(backbone=dict(liera=dict(method='tucker', kernel_rank=2, update='additive')))
