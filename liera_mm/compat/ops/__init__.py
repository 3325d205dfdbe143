"""MMCV's operators, by the names and with the arguments of ``mmcv._ext``, on torchvision and plain torch."""
import inspect

import torchvision  # noqa: F401  (registers torch.ops.torchvision)

from . import attention, carafe, deform_conv, focal_loss, masked_conv, nms, psa_mask, roi, rotated
from .precision import without_autocast

OPERATORS = {
    name: without_autocast(member)
    for module in (attention, carafe, deform_conv, focal_loss, masked_conv, nms, psa_mask, roi, rotated)
    for name, member in vars(module).items()
    if inspect.isfunction(member) and member.__module__ == module.__name__ and not name.startswith('_')
}
