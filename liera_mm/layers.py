"""Layers that compute with their effective weight.

An adapted layer is the object it was before: its class becomes a subclass of its old one, its parameters keep their
names, and it gains one child, ``adapter``, that holds the trained tensors. So state-dict keys, references to the layer and
``isinstance`` checks stay valid.
"""
import functools
import inspect
from typing import Any, List, Optional, Sequence, Set, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import METHODS, Dora, at_least_float32
from .group import MULTIPLICATIVE, UPDATES
from .kernels.weight import moved_weights


class AdaptedLayer:
    """What all adapted layers share; mixed into a torch layer with a frozen ``weight``.

    Attributes:
        adapter (nn.Module): Gives Δ when called, in the shape of ``weight``; its parameters are what trains.
        method (str): Name of the parameterisation of Δ, a key of ``algebra.METHODS``.
        update (str): Name of the rule that applies Δ to the weight, a key of ``group.UPDATES``.
        unmerged_weight (Tensor | None): The frozen weight while ``weight`` holds the effective one.
    """
    original_class: Type[nn.Module]
    added = ('adapter', 'unmerged_weight', 'method', 'update')  # what restore_class() takes away

    def effective_weight(self, dtype: Optional[torch.dtype] = None) -> Tensor:
        """The weight that the layer computes with, in the shape and memory format of the frozen one.

        The arithmetic is in float32, or in the factors' precision where that is higher, under autocast too.

        Args:
            dtype: Of the result; by default that of the frozen weight.
        """
        return effective_weights([self], dtype)[0]

    @property
    def merged(self) -> bool:
        # Asked of every layer in every forward pass: this is a quarter of what going through nn.Module costs
        return self._buffers['unmerged_weight'] is not None

    @property
    def untrained(self) -> bool:
        """Whether the layer computes with the frozen weight itself, as it does at the start."""
        frozen = self.unmerged_weight if self.merged else self.weight
        return torch.equal(self.effective_weight(), frozen)

    @torch.no_grad()
    def merge(self) -> None:
        """Let ``weight`` hold the effective weight, and keep the frozen one aside. Repeating it changes nothing."""
        if not self.merged:
            frozen, self.weight.data = self.weight.data, self.effective_weight()
            self.unmerged_weight = frozen

    def unmerge(self) -> None:
        """Undo :meth:`merge`, bit for bit: the very tensor is put back."""
        if self.merged:
            self.weight.data, self.unmerged_weight = self.unmerged_weight, None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # A checkpoint holds the frozen weight next to its factors, merged or not: loading must not apply Δ twice.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + 'weight'] = self.unmerged_weight

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self.unmerge()
        base_alone = prefix + 'weight' in state_dict and not any(key.startswith(prefix + 'adapter.') for key in state_dict)
        start_anew = base_alone and 'adapter' in self._modules and self.untrained
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if start_anew:
            self.adapter.reset(self.weight)

    def __reduce__(self):
        # Classes made for subclasses of torch's layers exist at run time only: pickle by the class they were made from.
        return _restore, (self.original_class, ), self.__dict__


class _AdaptedConv(AdaptedLayer):

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.effective_weight(autocast_dtype(self.weight)), self.bias)


class _AdaptedConvTranspose(AdaptedLayer):

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:
        spatial_dims = self.weight.dim() - 2
        output_padding = self._output_padding(input, output_size, self.stride, self.padding, self.kernel_size,
                                              spatial_dims, self.dilation)
        conv_transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial_dims - 1]
        weight = self.effective_weight(autocast_dtype(self.weight))
        return conv_transpose(input, weight, self.bias, self.stride, self.padding, output_padding, self.groups,
                              self.dilation)


class AdaptedLinear(AdaptedLayer, nn.Linear):
    original_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.effective_weight(autocast_dtype(self.weight)), self.bias)


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    original_class = nn.Conv1d


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    original_class = nn.Conv2d


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    original_class = nn.Conv3d


class AdaptedConvTranspose1d(_AdaptedConvTranspose, nn.ConvTranspose1d):
    original_class = nn.ConvTranspose1d


class AdaptedConvTranspose2d(_AdaptedConvTranspose, nn.ConvTranspose2d):
    original_class = nn.ConvTranspose2d


class AdaptedConvTranspose3d(_AdaptedConvTranspose, nn.ConvTranspose3d):
    original_class = nn.ConvTranspose3d


_ADAPTED = {
    adapted.original_class: adapted
    for adapted in (AdaptedLinear, AdaptedConv1d, AdaptedConv2d, AdaptedConv3d, AdaptedConvTranspose1d,
                    AdaptedConvTranspose2d, AdaptedConvTranspose3d)
}


@functools.cache
def adapted_class(cls: Type[nn.Module]) -> Type[AdaptedLayer]:
    """The adapted counterpart of a layer class: torch's linear and convolution classes and their subclasses.

    Raises:
        TypeError: If layers of that class compute with their weight in a way that is not torch's.
    """
    base = next((c for c in cls.__mro__ if c in _ADAPTED), None)
    if base is None:
        raise TypeError(f'{cls.__name__} is none of the layer kinds that can be adapted: '
                        f'{", ".join(c.__name__ for c in _ADAPTED)} and their subclasses')
    if cls is base:
        return _ADAPTED[base]
    for ancestor in cls.__mro__[:cls.__mro__.index(base)]:
        forward = vars(ancestor).get('forward')
        # A forward that only prepares its input and calls super().forward() reaches ours; one that names the weight,
        # or leaves the work to something else, computes with the frozen weight behind our back.
        if forward is not None and ('weight' in _names(forward) or 'super' not in _names(forward)):
            raise TypeError(f'{cls.__name__} computes with its weight in its own forward(), not as {base.__name__} does')
    if cls is nn.modules.linear.NonDynamicallyQuantizableLinear:
        raise TypeError(f'{cls.__name__} is the output projection of nn.MultiheadAttention, which reads the weight '
                        'without calling the layer')
    return type(f'Adapted{cls.__name__}', (cls, _ADAPTED[base]), dict(__module__=__name__, original_class=cls))


def effective_weights(layers: Sequence[nn.Module], dtype: Optional[torch.dtype] = None) -> List[Tensor]:
    """:meth:`AdaptedLayer.effective_weight` of many layers, and the plain weight of those that are not adapted.

    Layers that are alike in shape and settings share every operation: a few launches on a GPU for a whole backbone.
    """
    weights, groups, unmerged = {}, {}, []
    with torch.autocast(layers[0].weight.device.type, enabled=False):
        for layer in layers:
            weight = layer.weight
            result = dtype or weight.dtype
            if not isinstance(layer, AdaptedLayer) or layer.merged:
                weights[layer] = weight.to(result)
                continue
            unmerged.append(layer)
            adapter, factors = layer.adapter, layer.adapter.factors()
            if factors is None:
                weights[layer] = UPDATES[layer.update](at_least_float32(weight), adapter())
                continue
            if isinstance(adapter, Dora):  # which takes a norm of it
                result = torch.promote_types(factors[0].dtype, weight.dtype)
            relative = adapter.rms is not None
            alike = (weight.shape, weight.dtype, weight.device, factors[0].shape, factors[0].dtype, relative, layer.update,
                     adapter.scale, result)
            groups.setdefault(alike, {})[layer] = factors
        for (*_, relative, update, scale, result), group in groups.items():
            a, b = zip(*group.values())
            rms = [at_least_float32(layer.adapter.rms) for layer in group] if relative else None
            frozen = [layer.weight for layer in group]
            weights.update(zip(group, moved_weights(frozen, a, b, scale, update, result, rms)))
        for layer in unmerged:
            effective = layer.adapter.finish(weights[layer]).to(dtype or layer.weight.dtype)
            weights[layer] = _in_format_of(layer.weight, effective)
    return [weights[layer] for layer in layers]


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which convolutions and linear layers take a tensor here: that of autocast, where it is on."""
    device = tensor.device.type
    autocast = tensor.dtype != torch.float64 and device in ('cpu', 'cuda') and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else tensor.dtype


def _in_format_of(frozen: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the memory format of a frozen weight.

    Strides of dimensions of size one move no element, but torch tells by them whether a depthwise or 1x1 kernel is in
    channels-last format.
    """
    strides = frozen.stride()
    if any(size > 1 and own != other for size, own, other in zip(tensor.shape, tensor.stride(), strides)):
        return torch.empty_like(frozen, dtype=tensor.dtype).copy_(tensor)
    return tensor if tensor.stride() == strides else tensor.as_strided(tensor.shape, strides)


def _names(function: Any) -> Set[str]:
    """Names of the globals and attributes that a function and its inner functions use; none of what has no code."""
    code = getattr(inspect.unwrap(function), '__code__', None)
    codes, names = [code] if code else [], set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes.extend(constant for constant in code.co_consts if inspect.iscode(constant))
    return names


def _restore(original_class: Type[nn.Module]) -> AdaptedLayer:
    adapted = adapted_class(original_class)
    return adapted.__new__(adapted)


def adapt_layer(layer: nn.Module, method: str, update: str, scale: str, rank: int, alpha: float) -> None:
    """Turn one layer into its adapted counterpart, in place. Its outputs stay as they were until the adapter trains.

    The arguments are those of :func:`liera_mm.adapt`.

    Raises:
        TypeError: If the layer's class cannot be adapted (see :func:`adapted_class`).
    """
    adapted = adapted_class(type(layer))
    transposed = getattr(layer, 'transposed', False)
    relative = scale == 'relative' and update in MULTIPLICATIVE
    adapter = METHODS[method](layer.weight.detach(), getattr(layer, 'groups', 1), rank, alpha, transposed, relative)
    layer.adapter = adapter.train(layer.training)
    layer.register_buffer('unmerged_weight', None, persistent=False)
    layer.method, layer.update = method, update
    layer.__class__ = adapted


def restore_class(module: nn.Module) -> None:
    """Give a module of a class of this package its nearest base class that is none, without what ours have ``added``."""
    classes = type(module).__mro__
    for cls in filter(_is_ours, classes):
        for name in vars(cls).get('added', ()):
            if name in module.__dict__ or name in module._modules or name in module._buffers:
                delattr(module, name)
    module.__class__ = next(cls for cls in classes if not _is_ours(cls))


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition('.')[0] == __name__.partition('.')[0]
