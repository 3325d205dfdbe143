"""The operators of :mod:`torch_ops` as Triton kernels for CUDA: same names, same arguments, same results to rounding.

Shapes: N images, T tokens (pixels) an image, C channels, J hidden channels. Statistics and sums are float32 throughout.
"""
from .block import (
    gelu,
    gelu_grad,
    layer_norm,
    layer_norm_grad,
    residual,
    response,
    response_grad,
    scaled_weights,
    weight_grad,
)
from .depthwise import depthwise, depthwise_weight_grad
from .nms import nms, nms_kept
from .rescale import rescaled, rescaled_grad
from .roi import roi_pool, roi_pool_grad
from .weight import moved_weights, product_grads

__all__ = [
    'depthwise', 'depthwise_weight_grad', 'gelu', 'gelu_grad', 'layer_norm', 'layer_norm_grad', 'moved_weights', 'nms',
    'nms_kept', 'product_grads', 'rescaled', 'rescaled_grad', 'residual', 'response', 'response_grad', 'roi_pool',
    'roi_pool_grad', 'scaled_weights', 'weight_grad'
]
