"""What code gets that reads the weight of an adapted layer: the effective weight, into which nothing can be written."""
import copy
from typing import Any, Callable, Dict, Iterator, NoReturn, Sequence, Set

import torch
from torch import Tensor, nn

from .errors import SetupError


class EffectiveWeight(Tensor):
    """The effective weight that an adapted layer has now. Writing into it is an error, for it would be lost.

    So it is with its views, ``.data`` and ``.detach()``; all that is computed from it is a plain tensor. It passes for an
    ``nn.Parameter``, as which code knows the weight of a layer, and ``nn.Parameter(weight)`` is one like any other.

    Raises:
        SetupError: If it is written into.
    """
    _is_param = True  # what isinstance(..., nn.Parameter) and Module.get_parameter() go by

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            _refuse(func.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            own = {_memory(value) for value in (*args, *kwargs.values()) if isinstance(value, cls)}
            return _marked(result, own)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    def set_(self, *args: Any, **kwargs: Any) -> NoReturn:  # torch does not ask __torch_function__ about it
        _refuse('set_')

    def __setattr__(self, name: str, value: Any) -> None:
        if name == '_is_param':  # by nn.Parameter, of the tensor that it is about to return
            self.__class__ = nn.Parameter
        else:
            super().__setattr__(name, value)

    # Copies and files know nothing of this package

    def __deepcopy__(self, memo: Dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _refuse(name: str) -> NoReturn:
    raise SetupError(
        f'{name} would write into the weight of an adapted layer, which is computed from its frozen weight and its adapter: '
        'that would be lost.',
        'Do this before adapt(), or after liera_mm.merge_and_unload(model). The values of the frozen weight are in '
        'frozen_weight, and clone() gives a copy of this one')


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Dict[str, Any]) -> bool:
    """Whether a function of torch writes into an effective weight that it is given."""
    name = getattr(func, '__name__', '')
    first = next(iter((*args, *kwargs.values())), None)
    if name == 'requires_grad_' and first.is_leaf:  # nn.Parameter() calls it
        return False
    in_place = (name.endswith('_') and not name.endswith('__')
                or name.startswith('__i') and hasattr(Tensor, f'__{name[3:]}')  # __iadd__, not __invert__
                or name == '__setitem__'
                or name == '__set__' and args[1] is not None  # of data, requires_grad, grad
                or kwargs.get('inplace') is True)
    written = [first if in_place else None, kwargs.get('out')]
    return any(isinstance(tensor, EffectiveWeight) for value in written
               for tensor in (value if isinstance(value, (list, tuple)) else [value]))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _marked(result: Any, own: Set[int]) -> Any:
    """A result, as an effective weight where it is in the memory of one."""
    if type(result) in (list, tuple):
        return type(result)(_marked(each, own) for each in result)
    shares = type(result) is Tensor and result.layout is torch.strided and _memory(result) in own
    return result.as_subclass(EffectiveWeight) if shares else result
