"""What the tests of the operators share."""
import importlib.util

import pytest
import torch

from liera_mm import compat

compat.install()

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))]
compiled = importlib.util.find_spec('mmcv._ext').origin != 'torchvision'
fallback_only = pytest.mark.skipif(compiled, reason='mmcv has its compiled operators here')


def tensors(device, *arrays):
    return [torch.from_numpy(array).to(device) for array in arrays]
