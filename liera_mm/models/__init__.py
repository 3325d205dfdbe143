from .backbones import LieRABackbone
from .convnext import LieRAConvNeXt
from .device_heads import DeviceRoIExtractor, DeviceRoIHead, DeviceRPNHead
from .masks import DeviceMaskPreprocessor, PackDeviceInputs
from .pretrained import PretrainedBackbone
from .samplers import DeviceRandomSampler

__all__ = [
    'DeviceMaskPreprocessor', 'DeviceRPNHead', 'DeviceRandomSampler', 'DeviceRoIExtractor', 'DeviceRoIHead', 'LieRABackbone',
    'LieRAConvNeXt', 'PackDeviceInputs', 'PretrainedBackbone'
]
