"""Half precision is too coarse for coordinates and sums."""
import functools
from typing import Callable, List

import torch
from torch import Tensor


def same_precision(*tensors: Tensor) -> List[Tensor]:
    """Cast to the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def without_autocast(operator: Callable) -> Callable:
    """The operator, whose first argument is a tensor, in the precision that it chooses itself."""

    @functools.wraps(operator)
    def run(tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return operator(tensor, *args, **kwargs)

    return run
