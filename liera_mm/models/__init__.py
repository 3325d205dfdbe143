from .backbones import LieRABackbone
from .convnext import LieRAConvNeXt
from .masks import DeviceMaskPreprocessor
from .pretrained import PretrainedBackbone
from .samplers import DeviceRandomSampler

__all__ = ['DeviceMaskPreprocessor', 'DeviceRandomSampler', 'LieRABackbone', 'LieRAConvNeXt', 'PretrainedBackbone']
