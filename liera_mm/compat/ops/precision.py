"""Half precision is too coarse for coordinates."""
from typing import List

import torch
from torch import Tensor


def same_precision(*tensors: Tensor) -> List[Tensor]:
    """Cast to the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
