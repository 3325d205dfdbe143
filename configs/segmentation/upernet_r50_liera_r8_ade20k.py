# The 150 classes of ADE20K with mmsegmentation's UPerNet R50: its config, with README's one edit
_base_ = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
custom_imports = dict(imports=['liera_mm'])
model = dict(backbone=dict(_delete_=True, type='LieRABackbone', backbone={{_base_.model.backbone}}, liera=dict(rank=8)))
custom_hooks = [dict(type='LieRAHook')]
