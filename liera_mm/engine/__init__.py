from .hook import LieRAHook

__all__ = ['LieRAHook']
