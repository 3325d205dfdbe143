# Everything trained: mmpretrain's backbone as it is (Table 1)
_base_ = '../_base_/convnextv2-b_vtab.py'

model = dict(backbone=dict(type='mmpretrain.ConvNeXt'))
# a tenth of the adapters' rate: Table 8's for this backbone
optim_wrapper = dict(optimizer=dict(lr=1e-4))
custom_hooks = []
