"""Layers that compute with their effective weight.

An adapted layer is the object it was before: its class becomes a subclass of its old one, its parameters keep their
names, and it gains one child, ``adapter``, that holds the trained tensors. So state-dict keys, references to the layer and
``isinstance`` checks stay valid. Its attribute ``weight`` gives the effective weight to whoever reads it: to the layer's own
forward pass, whatever that does, and to modules that use a layer's weight without calling the layer.
"""
import functools
import inspect
from contextlib import nullcontext
from typing import Any, List, NoReturn, Optional, Sequence, Tuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy, _symbolic_trace

from .algebra import METHODS
from .errors import SetupError
from .factors import at_least_float32
from .group import MULTIPLICATIVE, UPDATES
from .kernels import builtin_only
from .kernels.weight import moved_weights
from .perturbation import Perturbation
from .reading import EffectiveWeight

_is_fx_tracing = getattr(_symbolic_trace, 'is_fx_symbolic_tracing', _symbolic_trace.is_fx_tracing)


class AdaptedLayer:
    """What all adapted layers share; mixed into a layer with a frozen ``weight``.

    Attributes:
        adapter (nn.Module): Gives Δ when called, in the shape of ``weight``; its parameters are what trains.
        method (str): Name of the parameterisation of Δ, a key of ``algebra.METHODS``.
        update (str): Name of the rule that applies Δ to the weight, a key of ``group.UPDATES``.
        unmerged_weight (Tensor | None): The frozen weight while the parameter holds the effective one.
        read (nn.Parameter): The parameter that ``weight`` was read of last.
        merge_later (bool | None): While the adapter is off, where the layer is merged as if Δ were 0: whether it is to be
            merged when it is on again. Else None.
    """
    merge_later: Optional[bool] = None
    original_class: Type[nn.Module]
    added = ('adapter', 'unmerged_weight', 'method', 'update', 'read', 'merge_later')  # what restore_class() takes away

    @property
    def weight(self) -> Tensor:
        """The effective weight, for code that reads it: an :class:`EffectiveWeight`, into which nothing can be written.

        So it is while the layer is merged, where the parameter holds it. The parameter itself while its adapter is taken
        out (:func:`without_adapters`) to load or initialise what it had before; and while it is in shards, where torch
        reads it to manage them. Another parameter cannot take its place.
        """
        parameter = self._parameters['weight']
        if not torch.compiler.is_compiling():
            self.__dict__['read'] = parameter
        if self._modules.get('adapter') is None or hasattr(parameter, 'to_local'):
            return parameter
        weight = parameter if self.merged else self.effective_weight()
        # No compiler, tracer or transform knows the class
        plain = torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter) or builtin_only()
        return weight if plain else weight.as_subclass(EffectiveWeight)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._refuse()

    def __delattr__(self, name: str) -> None:
        if name == 'weight':
            self._refuse('To have it in shards, use fully_shard(model) (FSDP2), not FullyShardedDataParallel. Else call '
                         'liera_mm.merge_and_unload(model) first')
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        # Where nn.Module.__setattr__ leads; weight norm, spectral norm and pruning add weight_g, weight_orig and the like.
        # load_state_dict(assign=True) replaces the weight while its adapter is taken out
        replaced = name == 'weight' and self._modules.get('adapter') is not None
        if replaced or (name.startswith('weight_') and name not in self._parameters):
            if 'weight' not in self._parameters:  # the old weight norm reads it and deletes it before it adds others
                others = dict(self._parameters)
                self._parameters.clear()
                self._parameters.update(weight=self.read, **others)
            self._refuse()
        super().register_parameter(name, param)

    def _refuse(self, remedy: str = 'Call liera_mm.merge_and_unload(model) first; or do this before adapt(). The values of '
                                    'the frozen weight are in frozen_weight') -> NoReturn:
        raise SetupError(f'the weight of an adapted {self.original_class.__name__} cannot be replaced: its adapter would be '
                         'lost, or applied to another weight than it was trained on.', remedy)

    @property
    def frozen_weight(self) -> Tensor:
        """The weight that was there before :meth:`adapt`: the parameter ``weight`` of the state dict, merged or not."""
        return self.unmerged_weight if self.merged else self._parameters['weight']

    def effective_weight(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """The weight that the layer computes with, in the shape and memory format of the frozen one.

        The arithmetic is in float32, or in the factors' precision where that is higher, under autocast too.

        Args:
            dtype: Of the result; by default that of the frozen weight.
        """
        if not torch.compiler.is_compiling() and _is_fx_tracing() and not self.merged:
            proxy = _traced_weight(self, dtype)
            if proxy is not None:
                return proxy
        return effective_weights([self], dtype)[0]

    @property
    def merged(self) -> bool:
        # Asked of every layer in every forward pass: this is a quarter of what going through nn.Module costs
        return self._buffers['unmerged_weight'] is not None

    @property
    def untrained(self) -> bool:
        """Whether the adapter is as it was at the start, where the layer computes with the frozen weight itself."""
        return self.adapter.is_meta or self.adapter.at_start(self.frozen_weight)

    def start_anew(self) -> None:
        """Let the adapter start from the frozen weight that is there now; one without values gets some if the weight has."""
        weight = self.frozen_weight
        (self.adapter.reset if self.adapter.is_meta == weight.is_meta else self.adapter.begin)(weight)

    @torch.inference_mode(False)  # or else the parameter could not be trained, nor merged again, outside of it
    @torch.no_grad()
    def merge(self) -> None:
        """Let the parameter hold the effective weight, and keep the frozen one aside. Repeating it changes nothing."""
        if self.merge_later is not None:
            self.merge_later = True
        elif not self.merged:
            parameter = self._parameters['weight']
            frozen, parameter.data = parameter.data, self.effective_weight()
            self.unmerged_weight = frozen

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit: the very tensor is put back."""
        if self.merge_later is not None:
            self.merge_later = False
        elif self.merged:
            self._parameters['weight'].data, self.unmerged_weight = self.unmerged_weight, None

    def switch_off(self) -> None:
        """Compute with the frozen weight until :meth:`switch_on`; what is merged or unmerged between takes effect then."""
        later = self.merged
        self.unmerge()
        self.unmerged_weight, self.merge_later = self._parameters['weight'].data, later

    def switch_on(self) -> None:
        later, self.merge_later = self.merge_later, None
        self.unmerge()
        if later:
            self.merge()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # A checkpoint holds the frozen weight next to its factors, merged or not: loading must not apply Δ twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + 'weight'] = self.unmerged_weight

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.unmerge()
        adapter = self._modules.get('adapter')
        base_alone = prefix + 'weight' in state_dict and not any(key.startswith(prefix + 'adapter.') for key in state_dict)
        start_anew = base_alone and adapter is not None and self.untrained
        if adapter is not None:
            self._modules['adapter'] = None  # some layers derive more from the weight that they load
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            if adapter is not None:
                self._modules['adapter'] = adapter
            if self.merge_later is not None:  # another tensor, if it was assigned
                self.unmerged_weight = self._parameters['weight'].data
        if start_anew:
            self.start_anew()

    def _apply(self, *args, **kwargs):
        adapter, weight = self._modules.get('adapter'), self._parameters['weight']
        if adapter is None or hasattr(weight, 'to_local'):
            return super()._apply(*args, **kwargs)
        empty = weight.is_meta
        # In another precision, or on another device, which sums in another order, norms have other values
        start_anew = adapter.rescales and self.untrained
        super()._apply(*args, **kwargs)
        weight = self._parameters['weight']
        if empty and not weight.is_meta:  # to_empty(), after which tensors are whatever was in memory
            adapter.begin(weight)
        elif start_anew:
            self.start_anew()
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        raise SetupError(f'torch.jit.script cannot compile an adapted {self.original_class.__name__}.',
                         'Call liera_mm.merge_and_unload(model) first; or use torch.jit.trace')

    def __reduce__(self):
        # Classes made for subclasses of torch's layers exist at run time only: pickle by the class they were made from.
        # A copy of one whose adapter is off is merged, with the frozen weight, until it is asked for another
        return _restore, (self.original_class, ), {**self.__dict__, 'merge_later': None}


# torch's forward passes, with the effective weight in the dtype of autocast, rather than cast to it from that of the frozen


def _linear(self, input: Tensor) -> Tensor:
    return F.linear(input, self.effective_weight(_operand_dtype(self)), self.bias)


def _conv(self, input: Tensor) -> Tensor:
    return self._conv_forward(input, self.effective_weight(_operand_dtype(self)), self.bias)


def _conv_transpose(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
    spatial_dims = len(self.kernel_size)
    output_padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size, spatial_dims,
                                          self.dilation)
    conv_transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial_dims - 1]
    weight = self.effective_weight(_operand_dtype(self))
    return conv_transpose(input, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


# Subclasses of torch's layers whose forward pass ends in super().forward() reach these
_FORWARDS = {
    base: type(base.__name__, (base, ), dict(forward=forward))
    for forward, bases in {
        _linear: [nn.Linear],
        _conv: [nn.Conv1d, nn.Conv2d, nn.Conv3d],
        _conv_transpose: [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d],
    }.items() for base in bases
}


@functools.cache
def adapted_class(cls: Type[nn.Module]) -> Type[AdaptedLayer]:
    """The adapted counterpart of a layer class."""
    forwards = [_FORWARDS[base] for base in cls.__mro__ if base in _FORWARDS]
    own = [] if cls in _FORWARDS else [cls]
    # torch.fx keeps the layers of torch as they are, and knows them by their module
    namespace = dict(original_class=cls, __module__=cls.__module__, __qualname__=f'Adapted{cls.__qualname__}')
    return type(f'Adapted{cls.__name__}', (AdaptedLayer, *own, *forwards), namespace)


def check_layer(layer: nn.Module) -> None:
    """Check that a layer computes with a weight that can be perturbed.

    Raises:
        TypeError: If it does not; says why.
    """
    weight, computed = layer._parameters.get('weight'), inspect.getattr_static(type(layer), 'weight', None)
    if weight is None or computed is not None:
        raise TypeError('its weight is computed from other parameters (a parametrization or weight norm); remove that first')
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise TypeError(f'its weight is of type {weight.dtype} (quantised, or packed), which no Δ can be applied to')
    if weight.layout is not torch.strided:
        raise TypeError(f'its weight is {weight.layout}, which no Δ can be applied to')
    if weight.dim() < 2 or not weight.numel():
        raise TypeError(f'its weight has the shape {tuple(weight.shape)}, which is no matrix or kernel')
    for name in (*vars(AdaptedLayer), *AdaptedLayer.added):
        if hasattr(layer, name) and not (name == 'weight' or hasattr(nn.Module, name)):
            raise TypeError(f'it has an attribute called {name} already')


def geometry(layer: nn.Module) -> Tuple[int, bool]:
    """Groups of a layer, and whether its weight has the inputs in its first dimension, as transposed convolutions have.

    Layers of other classes than torch's say so by the same attributes. The weight of transformers' ``Conv1D``, known by
    ``nf``, is that of a transposed convolution with kernels of size 1.
    """
    groups = getattr(layer, 'groups', 1)
    if not isinstance(groups, int) or groups < 1 or layer._parameters['weight'].shape[0] % groups:
        groups = 1  # not those of a convolution
    return groups, bool(getattr(layer, 'transposed', hasattr(layer, 'nf')))


def effective_weights(layers: Sequence[nn.Module], dtype: Optional[torch.dtype] = None) -> List[Tensor]:
    """:meth:`AdaptedLayer.effective_weight` of many layers, and the plain weight of those that are not adapted.

    Layers that are alike in shape and settings share every operation: a few launches on a GPU for a whole backbone.
    """
    weights, groups, formula = {}, {}, builtin_only()
    held = {layer: layer._parameters['weight'] if isinstance(layer, AdaptedLayer) else layer.weight for layer in layers}
    device = held[layers[0]].device.type
    with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
        for layer, weight in held.items():
            result = dtype or weight.dtype
            if not isinstance(layer, AdaptedLayer) or layer.merged:
                weights[layer] = weight.to(result)
                continue
            adapter = layer.adapter
            factors = None if formula else adapter.factors()
            if factors is None:
                moved = _by_formula(weight, adapter, layer.update, result)
                weights[layer] = moved if formula else _in_format_of(weight, moved)
                continue
            if adapter.rescales:  # which takes a norm of it
                result = torch.promote_types(factors[0].dtype, weight.dtype)
            relative = adapter.rms is not None
            alike = (weight.shape, weight.dtype, weight.device, factors[0].shape, factors[0].dtype, relative, layer.update,
                     adapter.scale, result)
            groups.setdefault(alike, {})[layer] = factors
        for (*_, relative, update, scale, result), group in groups.items():
            a, b = zip(*group.values())
            rms = [at_least_float32(layer.adapter.rms) for layer in group] if relative else None
            moved = moved_weights([held[layer] for layer in group], a, b, scale, update, result, rms)
            for layer, tensor in zip(group, moved):
                weight = held[layer]
                weights[layer] = _in_format_of(weight, layer.adapter.finish(tensor).to(dtype or weight.dtype))
    return [weights[layer] for layer in layers]


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which convolutions and linear layers take a tensor here: that of autocast, where it is on."""
    device = tensor.device.type
    autocast = tensor.dtype != torch.float64 and device in ('cpu', 'cuda') and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def _operand_dtype(layer: AdaptedLayer) -> torch.dtype:
    return autocast_dtype(layer._parameters['weight'])


def _by_formula(weight: Tensor, adapter: Perturbation, update: str, dtype: torch.dtype) -> Tensor:
    """The effective weight in operators of torch alone."""
    return adapter.finish(UPDATES[update](at_least_float32(weight), adapter())).to(dtype)


def _traced_weight(layer: AdaptedLayer, dtype: Optional[torch.dtype]) -> Optional[Proxy]:
    """The effective weight as a node in the graph that torch.fx.symbolic_trace makes, so that its adapter keeps training.

    None while torch traces by other means. Without this, the graph would have the values of now as a constant.
    """
    parameter = getattr(layer.adapter, next(iter(layer.adapter._parameters)))
    if not isinstance(parameter, Proxy):
        return None
    tracer = parameter.tracer
    path = tracer.path_of_module(layer)
    frozen, adapter = (tracer.create_proxy('get_attr', f'{path}.{name}'.lstrip('.'), (), {})
                       for name in ('frozen_weight', 'adapter'))
    args = frozen, adapter, layer.update, dtype or layer._parameters['weight'].dtype
    return tracer.create_proxy('call_function', _by_formula, args, {})


def _in_format_of(frozen: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the memory format of a frozen weight.

    Strides of dimensions of size one move no element, but torch tells by them whether a depthwise or 1x1 kernel is in
    channels-last format.
    """
    strides = frozen.stride()
    if any(size > 1 and own != other for size, own, other in zip(tensor.shape, tensor.stride(), strides)):
        return torch.empty_like(frozen, dtype=tensor.dtype).copy_(tensor)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _restore(original_class: Type[nn.Module]) -> AdaptedLayer:
    adapted = adapted_class(original_class)
    return adapted.__new__(adapted)


@torch.inference_mode(False)  # tensors that are made in it could never train
def adapt_layer(layer: nn.Module, method: str, update: str, scale: str, rank: int, alpha: float, **options: Any) -> None:
    """Turn one layer into its adapted counterpart, in place. Its outputs stay as they were until the adapter trains.

    The arguments are those of :func:`liera_mm.adapt`; ``options`` are those that some methods alone have.

    Raises:
        TypeError: If the layer cannot be adapted (see :func:`check_layer`), or not by this method.
    """
    check_layer(layer)
    groups, transposed = geometry(layer)
    relative = scale == 'relative' and update in MULTIPLICATIVE
    kind = METHODS[method]
    options = {name: options[name] for name in kind.options if name in options}
    adapter = kind(layer.weight.detach(), groups, rank, alpha, transposed, relative, **options)
    layer.adapter = adapter.train(layer.training)
    layer.register_buffer('unmerged_weight', None, persistent=False)
    layer.method, layer.update = method, update
    layer.__class__ = adapted_class(type(layer))


def restore_class(module: nn.Module) -> None:
    """Give a module of a class of this package its nearest base class that is none, without what ours have ``added``."""
    classes = type(module).__mro__
    for cls in filter(_is_ours, classes):
        for name in vars(cls).get('added', ()):
            if name in module.__dict__ or name in module._modules or name in module._buffers:
                delattr(module, name)
    module.__class__ = next(cls for cls in classes if not _is_ours(cls))


def _is_ours(cls: type) -> bool:
    return issubclass(cls, AdaptedLayer) or cls.__module__.partition('.')[0] == __name__.partition('.')[0]
