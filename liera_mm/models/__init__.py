from .backbones import LieRABackbone, LieRAConvNeXt
from .pretrained import PretrainedBackbone

__all__ = ['LieRABackbone', 'LieRAConvNeXt', 'PretrainedBackbone']
