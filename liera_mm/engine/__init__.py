from .graphs import CUDAGraphHook
from .hook import LieRAHook
from .sharding import FullyShardStrategy

__all__ = ['CUDAGraphHook', 'FullyShardStrategy', 'LieRAHook']
