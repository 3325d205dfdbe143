from . import paramwise  # noqa: F401  (MMEngine's constructor of optimizers learns of adapters)
from .graphs import CUDAGraphHook
from .hook import LieRAHook
from .sharding import FullyShardStrategy

__all__ = ['CUDAGraphHook', 'FullyShardStrategy', 'LieRAHook']
