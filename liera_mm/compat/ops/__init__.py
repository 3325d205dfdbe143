"""MMCV's operators, by the names and with the arguments of ``mmcv._ext``, on torchvision and plain torch."""
import torchvision  # noqa: F401  (registers torch.ops.torchvision)

from .nms import nms, softnms
from .roi import roi_align_backward, roi_align_forward

OPERATORS = {operator.__name__: operator for operator in (nms, roi_align_backward, roi_align_forward, softnms)}
