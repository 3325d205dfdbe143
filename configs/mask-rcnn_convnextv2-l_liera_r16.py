# LieRA with ConvNeXt-V2-L: as with B, which the paper has
_base_ = ['mask-rcnn_convnextv2-b_liera_r16.py', '_base_/fully_shard.py']

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/convnext-v2/convnext-v2-large_3rdparty-fcmae_in1k_20230104-bf38df92.pth'
model = dict(
    backbone=dict(arch='large', init_cfg=dict(checkpoint=checkpoint)), neck=dict(in_channels=[192, 384, 768, 1536]))
