# The 200 birds of CUB-200-2011 with mmpretrain's ResNet-50 of ImageNet-21k: its config, with README's one edit
_base_ = 'mmpretrain::resnet/resnet50_8xb8_cub.py'
custom_imports = dict(imports=['liera_mm'])
data_root = 'data/CUB_200_2011'
model = dict(backbone=dict(_delete_=True, type='LieRABackbone', backbone={{_base_.model.backbone}}, liera=dict(rank=8)))
custom_hooks = [dict(type='LieRAHook')]
