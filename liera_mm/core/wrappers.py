"""Models inside of others: compiled, replicated on several devices, averaged; and models in shards.

Every public function reaches through what holds a model, also where a part of it is wrapped and not the whole: names are
those that the model has without. Of a model in shards (``fully_shard``, FSDP2) the tensors are gathered to be read, for
which all processes have to call the function; those functions that would write to them refuse it.
"""
import contextlib
import functools
import re
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional

import torch
from torch import Tensor, nn

from .errors import SetupError

# Classes that hold a model, in torch and in MMEngine, and the attribute it is in. Going by name costs no import
INNER = dict(
    OptimizedModule='_orig_mod',  # torch.compile
    DataParallel='module',
    DistributedDataParallel='module',  # and MMDistributedDataParallel
    CheckpointWrapper='_checkpoint_wrapped_module',
    AveragedModel='module',
    BaseAveragedModel='module',  # ExponentialMovingAverage and the like
)
# Those that have taken note of the parameters there are, and would pass over new ones
FIXED = ('DistributedDataParallel', 'FullyShardedDataParallel', 'FSDPModule', 'AveragedModel', 'BaseAveragedModel')


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of all wrappers; the model itself if there are none."""
    while (inner := _inner_name(model)) is not None:
        model = model._modules[inner]
    return model


def through_wrappers(function: Callable[..., Any], does: str = 'writes') -> Callable[..., Any]:
    """Decorate a function of a model such that wrappers of the model, and of its parts, are not there for it.

    Where the function returns the model, the caller has the wrapper back. What is made inside can be trained, even if the
    caller is in inference mode.

    Args:
        function: Takes a model first.
        does: What the function does with tensors of the model: ``looks`` at their names and shapes; ``reads`` them, and
            finds them whole where they are in shards; ``writes`` to them, which raises a SetupError for shards; or
            ``adds`` parameters, which raises a ValueError for all wrappers that must come later.
    """

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if does == 'adds':
            _refuse_fixed(model)
        if does == 'writes':
            refuse_shards(model)
        whole = gathered(model) if does == 'reads' else contextlib.nullcontext()
        with torch.inference_mode(False), _bare(model) as bare, whole:
            result = function(bare, *args, **kwargs)
        return model if result is bare else result

    return call


def plain_names(state: Mapping[str, Tensor], known: Iterable[str]) -> Dict[str, Tensor]:
    """A state dict with the names that a model knows, where it has others only because one of the models was wrapped.

    Such as ``backbone._orig_mod.conv1.weight``, of a part that was compiled, for ``backbone.conv1.weight``.
    """
    known = {_plain_name(name): name for name in known} | {name: name for name in known}
    named = {known.get(name, known.get(_plain_name(name), name)): tensor for name, tensor in state.items()}
    return named if len(named) == len(state) else dict(state)


def _plain_name(name: str) -> str:
    return re.sub(r'(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.', '', name).removeprefix('module.')


def _refuse_fixed(model: nn.Module) -> None:
    for name, module in model.named_modules():
        fixed = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in FIXED), None)
        if fixed is not None:
            raise ValueError(f'{name or "the model"} is inside of {fixed}, which would not see the new parameters: adapt '
                             'the model first, then wrap it')


def in_shards(model: nn.Module) -> bool:
    """Whether torch's ``fully_shard`` (FSDP2) manages parameters of a model."""
    return any(cls.__name__ == 'FSDPModule' for module in model.modules() for cls in type(module).__mro__)


def refuse_shards(model: nn.Module) -> None:
    """Raise a SetupError if a model is in shards: what one writes to tensors that are gathered is lost."""
    if in_shards(model):
        raise SetupError('The model is in shards (fully_shard): its adapters can be read, but not loaded, exchanged, merged '
                         'or switched off.',
                         'Do this before fully_shard(); or with a model that is whole, and an adapter file of this one: '
                         'save_adapter(), called by all processes')


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which a model has whole parameters in place of shards, to be read. All processes have to enter it."""
    for module in model.modules():
        if hasattr(module, 'reshard'):
            module.reshard()
    shards = [(module, name, shard) for module in model.modules() for name, shard in module._parameters.items()
              if hasattr(shard, 'full_tensor')]
    whole = {id(shard): nn.Parameter(shard.detach().full_tensor(), shard.requires_grad)
             for shard in {id(shard): shard for _, _, shard in shards}.values()}
    for module, name, shard in shards:
        module._parameters[name] = whole[id(shard)]
    try:
        yield
    finally:
        for module, name, shard in shards:
            module._parameters[name] = shard


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
