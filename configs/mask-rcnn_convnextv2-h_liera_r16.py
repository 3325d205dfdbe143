# LieRA with ConvNeXt-V2-H: as with B, which the paper has
_base_ = ['mask-rcnn_convnextv2-b_liera_r16.py', '_base_/fully_shard.py']

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-huge_3rdparty-fcmae_in1k_20230104-fe43ae6c.pth'
model = dict(
    backbone=dict(arch='huge', init_cfg=dict(checkpoint=checkpoint)), neck=dict(in_channels=[352, 704, 1408, 2816]))
