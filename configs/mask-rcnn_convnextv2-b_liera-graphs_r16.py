# Steps that do not wait for the host (docs/performance.md): images of one size, CUDA graphs of all that comes before the
# proposals, and heads that take a batch at once. Not tested on a GPU yet
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

model = dict(
    data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size={{_base_.image_size}}, pad_mask=True)]),
    rpn_head=dict(type='DeviceRPNHead'),
    roi_head=dict(
        type='DeviceRoIHead',
        bbox_roi_extractor=dict(type='DeviceRoIExtractor'),
        mask_roi_extractor=dict(type='DeviceRoIExtractor')))
custom_hooks = [dict(type='LieRAHook'), dict(type='CUDAGraphHook', modules=['backbone', 'neck', 'rpn_head'])]
