"""LieRABackbone around the backbones of MMDetection and mmpretrain, as their configs have them: frozen stages and all."""
import copy
import logging

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from liera_mm.core.adapted import adapted_layers, intended_parameters
from liera_mm.core.targets import is_norm

pytestmark = pytest.mark.usefixtures('one_thread')

RESNET = dict(depth=50, base_channels=4, norm_eval=True, frozen_stages=1)
NEXT = dict(RESNET, groups=2, base_width=4)
STAGE_1 = dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1, ), num_channels=(4, ))
HRNET = dict(stage1=STAGE_1, **{
    f'stage{i}': dict(num_modules=1, num_branches=i, block='BASIC', num_blocks=(1, ) * i,
                      num_channels=tuple(4 * 2**j for j in range(i))) for i in (2, 3, 4)})
PLUGIN = dict(cfg=dict(type='ContextBlock', ratio=.25), stages=(False, True, True, True), position='after_conv3')
SMALL_VIT = dict(arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32), img_size=64, patch_size=16)

# Name: config, and how many trained tensors of it have no gradient because nothing uses their output
CASES = {
    'ResNet': (dict(type='mmdet.ResNet', **RESNET), 0),
    'ResNet, all frozen': (dict(type='mmdet.ResNet', **dict(RESNET, frozen_stages=4)), 0),
    'ResNet, plugins': (dict(type='mmdet.ResNet', plugins=[PLUGIN], **RESNET), 0),
    'ResNetV1d': (dict(type='mmdet.ResNetV1d', **RESNET), 0),
    'ResNeXt': (dict(type='mmdet.ResNeXt', **NEXT), 0),
    'RegNet': (dict(type='mmdet.RegNet', arch='regnetx_400mf', frozen_stages=1, norm_eval=True), 0),
    'Res2Net': (dict(type='mmdet.Res2Net', scales=4, base_width=26, **RESNET), 0),
    'ResNeSt': (dict(type='mmdet.ResNeSt', stem_channels=8, radix=2, reduction_factor=4, **RESNET), 0),
    'TridentResNet': (dict(type='mmdet.TridentResNet', trident_dilations=(1, 2, 3), num_branch=3, test_branch_idx=1,
                           **dict(RESNET, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2, ))), 0),
    'DetectoRS_ResNet': (dict(type='mmdet.DetectoRS_ResNet', output_img=True, **RESNET), 0),
    'ResNet, ConvAWS': (dict(type='mmdet.ResNet', conv_cfg=dict(type='ConvAWS'), **RESNET), 0),
    'HRNet': (dict(type='mmdet.HRNet', extra=HRNET, norm_eval=True), 0),
    'MobileNetV2': (dict(type='mmdet.MobileNetV2', widen_factor=.25, out_indices=(2, 4, 6), frozen_stages=1), 2),
    'Darknet': (dict(type='mmdet.Darknet', depth=53, frozen_stages=2), 0),
    'CSPDarknet': (dict(type='mmdet.CSPDarknet', deepen_factor=.33, widen_factor=.125, frozen_stages=1), 0),
    'CSPNeXt': (dict(type='mmdet.CSPNeXt', deepen_factor=.33, widen_factor=.125, frozen_stages=1), 0),
    'EfficientNet': (dict(type='mmdet.EfficientNet', arch='b0', frozen_stages=1, out_indices=(3, 4, 5), norm_eval=True), 0),
    'SwinTransformer': (dict(type='mmdet.SwinTransformer', embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4],
                             window_size=4, frozen_stages=2), 0),
    'PyramidVisionTransformer': (dict(type='mmdet.PyramidVisionTransformer', num_layers=[1, 1, 1, 1], embed_dims=8), 0),
    'PyramidVisionTransformerV2': (
        dict(type='mmdet.PyramidVisionTransformerV2', num_layers=[1, 1, 1, 1], embed_dims=8), 0),
    'HourglassNet': (dict(type='mmdet.HourglassNet', downsample_times=2, num_stacks=1, stage_channels=(8, 8, 8),
                          stage_blocks=(1, 1, 1), feat_channel=8), 4),
    'SSDVGG': (dict(type='mmdet.SSDVGG', depth=11, with_last_pool=False, ceil_mode=True, out_indices=(3, 4),
                    out_feature_indices=(12, 17)), 6),
    'mmpretrain ConvNeXt': (dict(type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 16, 16]),
                                 out_indices=(0, 1, 2, 3), gap_before_final_norm=False, frozen_stages=2), 0),
    'mmpretrain ResNet': (dict(type='mmpretrain.ResNet', depth=50, base_channels=4, expansion=1, stem_channels=4,
                               frozen_stages=2), 0),
    'mmpretrain MobileNetV3': (dict(type='mmpretrain.MobileNetV3', arch='small', frozen_stages=3), 0),
    'mmpretrain EfficientNetV2': (dict(type='mmpretrain.EfficientNetV2', arch='b0', frozen_stages=2), 0),
    'mmpretrain VisionTransformer': (dict(type='mmpretrain.VisionTransformer', **SMALL_VIT, frozen_stages=1), 0),
    'mmpretrain SwinTransformerV2': (dict(
        type='mmpretrain.SwinTransformerV2', img_size=64, window_size=[4, 4, 4, 2], out_indices=(0, 1, 2, 3),
        arch=dict(embed_dims=8, depths=[1] * 4, num_heads=[2] * 4, extra_norm_every_n_blocks=0)), 0),
    'mmpretrain BEiTViT': (dict(type='mmpretrain.BEiTViT', **SMALL_VIT), 0),
    'mmpretrain HorNet': (dict(type='mmpretrain.HorNet', frozen_stages=1, arch=dict(
        base_dim=8, depths=[1, 1, 1, 1], orders=[2, 3, 3, 3],
        dw_cfg=[dict(type='DW', kernel_size=7)] * 4)), 0),
    'mmpretrain RepVGG': (dict(type='mmpretrain.RepVGG', arch=dict(num_blocks=[1, 1, 1, 1], width_factor=[.125] * 4,
                                                                   group_layer_map=None, se_cfg=None),
                               frozen_stages=1), 0),
    'mmpretrain DenseNet': (dict(type='mmpretrain.DenseNet', arch=dict(growth_rate=4, depths=[1, 1, 1, 1], init_channels=8),
                                 frozen_stages=1), 0),
}


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg))


def outputs(model, picture):
    out = model(picture)[1:] if getattr(model, 'output_img', False) else model(picture)
    return [tensor for tensor in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize('name', CASES)
def test_the_edit_alone(name, caplog):
    cfg, unused = CASES[name]
    caplog.set_level(logging.INFO, 'liera_mm')
    torch.manual_seed(1)
    plain = build(cfg)
    plain.init_weights()
    for m in plain.modules():
        if type(m).__name__ == 'TridentConv':  # its memory is not initialised
            nn.init.normal_(m.weight, std=.1)
    model = build(dict(type='LieRABackbone', backbone=cfg, liera=dict(rank=2)))
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    superseded = [message for message in caplog.messages if 'frozen_stages=' in message]
    assert len(superseded) == (cfg.get('frozen_stages', -1) > 0)

    # Norms keep their statistics where they did before
    plain.train()
    model.train()
    modes = {key: m.training for key, m in plain.named_modules() if is_norm(m)}
    assert {key: m.training for key, m in model.named_modules() if key in modes} == modes
    for _ in range(2):
        assert {key for key, p in model.named_parameters() if p.requires_grad} == intended_parameters(model)
        model.eval()
        model.train()
    assert list(adapted_layers(model))

    plain.requires_grad_(False).eval()  # torch's attention chooses its kernel by what trains
    picture = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(outputs(model.eval(), picture), outputs(plain, picture)):
            assert torch.equal(ours, theirs)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()  # with weights so small, and few pixels, statistics of the batch leave no gradient
    sum(out.square().sum() for out in outputs(model, picture)).backward()
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert len(without) == unused, without
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
