from .hook import LieRAHook
from .sharding import FullyShardStrategy

__all__ = ['FullyShardStrategy', 'LieRAHook']
