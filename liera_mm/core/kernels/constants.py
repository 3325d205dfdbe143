"""Numbers that the host gives to the device, without waiting for it."""
import contextlib
from typing import Any, Dict, Iterator, Optional, Sequence

import torch
from torch import Tensor

_kept: Optional[Dict[Any, Tensor]] = None


def constant(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers, (len(values),): a new one, or of those that are kept the one with the same numbers."""
    key = (*values, dtype, device)
    tensor = None if _kept is None else _kept.get(key)
    if tensor is None:
        tensor = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
        if _kept is not None:
            _kept[key] = tensor
    return tensor


@contextlib.contextmanager
def keep_constants(kept: Dict[Any, Tensor]) -> Iterator[None]:
    """A context in which constants are kept in a dict, in all threads.

    A CUDA graph can copy nothing from the host while it is captured, and reads its constants whenever it is replayed. So the
    same is computed before, in this context, and the dict lives as long as the graph.
    """
    global _kept
    before, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = before
