"""Models inside of others: compiled, replicated on several devices, in shards, averaged.

Every public function reaches through them, also where a part of a model is wrapped and not the whole: names are those that
the model has without them.
"""
import contextlib
import functools
from typing import Any, Callable, Iterator, Optional

import torch
from torch import nn

# Classes that hold a model, in torch and in MMEngine, and the attribute it is in. Going by name costs no import
INNER = dict(
    OptimizedModule='_orig_mod',  # torch.compile
    DataParallel='module',
    DistributedDataParallel='module',  # and MMDistributedDataParallel
    FullyShardedDataParallel='_fsdp_wrapped_module',
    CheckpointWrapper='_checkpoint_wrapped_module',
    AveragedModel='module',
    BaseAveragedModel='module',  # ExponentialMovingAverage and the like
)
# Those that have taken note of the parameters there are, and would pass over new ones
FIXED = ('DistributedDataParallel', 'FullyShardedDataParallel', 'AveragedModel', 'BaseAveragedModel')


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of all wrappers; the model itself if there are none."""
    while (inner := _inner_name(model)) is not None:
        model = model._modules[inner]
    return model


def through_wrappers(function: Callable[..., Any], refuse_fixed: bool = False) -> Callable[..., Any]:
    """Decorate a function of a model such that wrappers of the model, and of its parts, are not there for it.

    Where the function returns the model, the caller has the wrapper back. What is made inside can be trained, even if the
    caller is in inference mode.

    Args:
        function: Takes a model first.
        refuse_fixed: Whether to raise a ValueError for wrappers that must come after the function, for it makes parameters.
    """

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if refuse_fixed:
            _refuse_fixed(model)
        with torch.inference_mode(False), _bare(model) as bare:
            result = function(bare, *args, **kwargs)
        return model if result is bare else result

    return call


def _refuse_fixed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        fixed = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FIXED), None)
        if fixed is not None:
            raise ValueError(f'{name or "the model"} is inside of {fixed}, which would not see the new parameters: adapt '
                             'the model first, then wrap it')


@contextlib.contextmanager
def _bare(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which neither a model nor its parts are wrapped."""
    model = unwrap(model)
    wrapped = []
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and _inner_name(child) is not None:
                wrapped.append((parent, name, child))
                parent._modules[name] = unwrap(child)  # while modules() is going, which so goes on inside
    try:
        yield model
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def _inner_name(model: nn.Module) -> Optional[str]:
    for cls in type(model).__mro__:
        inner = INNER.get(cls.__name__)
        if inner is not None and isinstance(model._modules.get(inner), nn.Module):
            return inner
    return None
