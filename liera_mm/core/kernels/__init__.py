"""Fused operators: autograd functions over Triton kernels on CUDA, and over the same operators in plain torch elsewhere."""
from types import ModuleType

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

# Before 3.3, which comes with torch 2.7, its compiler knows no tuples of tensors (tests/core/kernels/test_compilation.py)
HAS_TRITON = triton is not None and tuple(map(int, triton.__version__.split('.')[:2])) >= (3, 3)


def ops_for(*tensors: Tensor) -> ModuleType:
    """The module of operators for these tensors: ``triton_ops`` or ``torch_ops``."""
    # Not is_cuda: before torch 2.6, torch.compile cannot trace it in an autograd function
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    if HAS_TRITON and all(t.device.type == 'cuda' and t.dtype in dtypes for t in tensors):
        from . import triton_ops as ops
    else:
        from . import torch_ops as ops
    return ops


def builtin_only() -> bool:
    """Whether only operators of torch will do: in transforms of torch.func, and for torch.jit.trace.

    These have no rules for our autograd functions, and would not see what is in them.
    """
    return torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
