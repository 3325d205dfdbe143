"""Backbones whose frozen weights must come from somewhere."""
import contextlib
import json
import os
import re
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, PretrainedInit
from mmpretrain.models.backbones import ConvNeXt
from torch import Tensor, nn

from ..core.adapt import BEFORE
from ..core.adapted import adapter_names, intended_parameters, without_adapters
from ..core.checkpoint import differences, digest
from ..core.errors import SetupError
from ..core.merging import unmerge
from ..core.targets import is_norm, layer_kind
from ..core.text import some
from ..core.wrappers import plain_names
from ..version import __version__
from .weight_files import check_prefix, convnext_names

# The norms that detection puts behind every stage; classification checkpoints don't have them, and at their initial ones
# and zeros the lateral convolutions of the neck make up for what a trained scale would do.
OUTPUT_NORM = re.compile(r'norm\d+\.(weight|bias)')


# In a state dict, the entry of a backbone's record: a tensor, since EMAHook and others take every entry for one
RECORD = 'liera_record'


class Base(NamedTuple):
    """Frozen weights that can be had again.

    Attributes:
        source: ``checkpoint`` and ``prefix`` as of MMEngine's ``Pretrained``, and the ``option`` of the config that gave
            them: ``init_cfg`` or ``load_from``.
        fingerprint: A short hash of every frozen tensor that came from there, by name.
    """
    source: Dict[str, Optional[str]]
    fingerprint: Dict[str, str]


class PretrainedBackbone:
    """Mixed into a backbone: remembers which of its weights were loaded, and insists on the pretrained ones.

    MMEngine only logs a pretrained weight that does not fit, and never loads any when testing; frozen weights that stay
    random would make everything trained on top of them worthless.

    A state dict need not have the frozen weights. Where it has a record of them instead (:meth:`base_record`), they are
    fetched from where they came from, checked, and loaded together with the rest, whoever loads it.
    """
    added = ('loaded_names', 'loaded_elsewhere', 'frozen_base', 'fetched_bases')  # what restore_class() takes away
    loaded_names: Set[str] = frozenset()
    loaded_elsewhere: Set[str] = frozenset()
    frozen_base: Optional[Base] = None
    fetched_bases: Tuple[Dict[str, Optional[str]], ...] = ()

    def init_weights(self) -> None:
        """Initialise, then load the pretrained weights of ``init_cfg``.

        Raises:
            SetupError: If there are pretrained weights, and one of the frozen tensors is not among them.
        """
        source = self._configured_source()
        before, self.loaded_names = self.loaded_names, frozenset()
        try:
            with without_adapters(self), _same_flags(self), loads() as tensors:
                super().init_weights()
        except AssertionError:
            if source is not None and source['prefix']:
                check_prefix(source['checkpoint'], source['prefix'], 'init_cfg.prefix of the backbone')
            raise
        except IndexError:  # Swin wants names that begin with backbone.
            if source is not None:
                self.check_base(f'{source["checkpoint"]} does not fit {type(self).__name__}')
            raise
        self.note_elsewhere(tensors)
        self.loaded_names |= before
        if source is not None:
            self.check_base(f'{source["checkpoint"]} does not fit {type(self).__name__}')
            self.set_base(source, self.loaded_names - self.loaded_elsewhere)

    def note_elsewhere(self, tensors: Sequence[Tensor]) -> None:
        """Remember those of the tensors, to which a state dict was copied, that did not get it as parts of this backbone.

        A part may have an ``init_cfg`` of its own, and constructors load what they like: neither can be had again.
        """
        known = set(map(id, tensors))
        names = {name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in known}
        self.loaded_elsewhere |= names - self.loaded_names
        self.loaded_names |= names

    def set_base(self, source: Dict[str, Optional[str]], names: Set[str]) -> None:
        """Remember that the frozen tensors of those names came from that source; see :class:`Base`."""
        state, trained = self.state_dict(), self._trained()
        frozen = {name for name, _ in self.named_parameters() if name not in trained}
        self.frozen_base = Base(source, {name: digest(state[name]) for name in state if name in frozen & names})

    def base_card(self) -> Dict[str, str]:
        """What is known of the base of an adapter: entries of :class:`liera_mm.core.card.Card`."""
        source = self.frozen_base.source if self.frozen_base else {}
        file = source.get('checkpoint') or ''
        if '://' not in file:
            file = os.path.basename(file)  # the folders are of this machine
        theirs = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith('liera_mm'))
        return dict(base_model=theirs.__name__,
                    base_source=file + (f', below {source["prefix"]}' if source.get('prefix') else ''))

    def base_in_place(self) -> bool:
        """Whether the frozen tensors that came from the source of :attr:`frozen_base` are still those."""
        return self.frozen_base is not None and not self._other_tensors(self.frozen_base.fingerprint)

    def base_record(self, states: Sequence[Dict[str, Tensor]]) -> Dict[str, Any]:
        """What a checkpoint says about this backbone, in plain types: settings, and what its state dicts may leave out.

        Args:
            states: State dicts of this backbone. A tensor may be left out if all of them have the one of its source.
        """
        base = self.frozen_base or Base({}, {})
        same = {name: value for name, value in base.fingerprint.items()
                if all(digest(state[name]) == value for state in states)}
        return dict(version=__version__, liera=self._settings(), source=base.source, fingerprint=same)

    def check_settings(self, record: Dict[str, Any]) -> None:
        """Check that a checkpoint's factors mean what they would mean in this backbone.

        Raises:
            SetupError: If they were trained with another update, rank, alpha or target; names the difference.
        """
        theirs = record['liera'] and {**BEFORE, **record['liera']}
        different = differences(theirs or {}, self._settings() or {})
        if different:
            raise SetupError(f'the checkpoint was trained with other liera settings: {different}',
                             'Use the config in the work dir of that checkpoint. If it is this one, defaults have changed '
                             'since: set what differs in its liera=dict(...)')

    def check_base(self, what: str) -> None:
        """Raise a SetupError that begins with ``what`` if a frozen weight or a norm's statistics were never loaded."""
        known = self._trained() | self.loaded_names | adapter_names(self)
        missing = [name for name, tensor in self.state_dict().items()
                   if tensor.is_floating_point() and name not in known and not self._needs_no_loading(name)]
        if missing:
            raise SetupError(
                f'{what}: {len(missing)} frozen tensors would stay random, among them {", ".join(missing[:3])}.',
                "Check the backbone's arch and the checkpoint and prefix of its init_cfg=dict(type='Pretrained', ...), "
                'give a whole checkpoint as load_from, or name what is new, to train it, in liera=dict(train=[...]).')

    def _needs_no_loading(self, name: str) -> bool:
        """Whether a frozen tensor that was not loaded is what it should be all the same, rather than random."""
        prefix, _, leaf = name.rpartition('.')
        module, trained = self.get_submodule(prefix), self._trained()
        if leaf in module._buffers:  # is computed, but for the statistics of norms; those of new norms begin with these
            loaded = f'{prefix}.weight' in self.loaded_names
            return not is_norm(module) or not loaded and any(f'{prefix}.{key}' in trained for key in module._parameters)
        parameters = module._parameters
        # A layer is zero by design, such as the offsets of a deformable convolution; or it has another such tensor
        if layer_kind(module) is not None and parameters.get('weight') is not None and (
                not parameters['weight'].any() or leaf != 'bias' and not parameters[leaf].any()):
            return True
        return bool(OUTPUT_NORM.fullmatch(name))

    def _trained(self) -> Set[str]:
        return intended_parameters(self) if hasattr(self, 'liera') else set()

    @property
    def sharding_units(self) -> Iterable[nn.Module]:
        """The parts that ``FullyShardStrategy`` gathers one by one: modules that the forward pass calls."""
        return [self]

    def train(self, mode: bool = True) -> 'PretrainedBackbone':
        with _same_flags(self):  # a backbone's own frozen_stages would freeze the adapters in them
            super().train(mode)  # that of mmdet's and mmpretrain's backbones returns None
        return self

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
        own = plain_names(own, (prefix + name for name in (RECORD, *self.state_dict())))
        state_dict.update(own)
        if prefix + RECORD in state_dict:
            record = decode_record(state_dict.pop(prefix + RECORD))
            self.check_settings(record)
            if record['fingerprint']:
                self._fetch_base(record['source'], record['fingerprint'])
                ours = self.state_dict()
                state_dict.update({prefix + name: ours[name] for name in record['fingerprint']})
        model = state_dict.get(f'{prefix}model')
        if isinstance(model, Mapping):  # where authors and timm have the weights, next to what they were trained with
            state_dict.update({f'{prefix}{name}': tensor for name, tensor in state_dict.pop(f'{prefix}model').items()})
        if isinstance(self, ConvNeXt):
            convnext_names(state_dict, prefix)
        for name, ours in self.state_dict().items():
            theirs = state_dict.get(prefix + name)
            if theirs is None:
                continue
            if {theirs.dim(), ours.dim()} == {2, 4} and theirs.numel() == ours.numel():
                state_dict[prefix + name] = theirs.reshape(ours.shape)  # Linear and 1x1 forms of one layer
        unmerge(self)
        self.versions_before_load = _versions(self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _settings(self) -> Optional[Dict[str, Any]]:
        """The arguments of adapt(), in plain types as a file gives them back; None if there are no adapters."""
        return json.loads(json.dumps(getattr(self, 'liera', None)))

    def _configured_source(self) -> Optional[Dict[str, Optional[str]]]:
        init_cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        return next((dict(option='init_cfg', checkpoint=cfg['checkpoint'], prefix=cfg.get('prefix'))
                     for cfg in init_cfgs if cfg.get('checkpoint')), None)

    def _fetch_base(self, recorded: Dict[str, Optional[str]], fingerprint: Dict[str, str]) -> None:
        """Have the frozen weights that a checkpoint was trained on: those in place, or loaded as they were for training.

        Raises:
            SetupError: If they cannot be had from where they were; or if others are there, naming those that differ.
        """
        if not self._other_tensors(fingerprint):
            return
        if recorded in self.fetched_bases:
            raise SetupError(f'{recorded["checkpoint"]} leaves out frozen weights, and names itself as their source.',
                             'It was overwritten by the training that started from it: put the file of that time there')
        configured = self._configured_source()
        if configured is None:  # taken out by mmdet's init_detector, for instance
            sources = [recorded]
        else:  # the weights of load_from had replaced those of the config
            sources = [configured] if recorded['option'] == 'init_cfg' else [recorded, configured]
        problems: List[str] = []
        for source in sources:
            try:
                self.fetched_bases += (recorded, )
                self._load_base(source)
            except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
                problems.append(f'{source["checkpoint"]} cannot be loaded ({str(error).splitlines()[0]:.200})')
                continue
            finally:
                self.fetched_bases = self.fetched_bases[:-1]
            different = self._other_tensors(fingerprint)
            if not different:
                self.frozen_base = Base(source, fingerprint)
                return
            problems.append(f'{source["checkpoint"]} has others: {some(different)} of {len(fingerprint)} tensors differ')
        key = 'model.backbone.backbone' if hasattr(type(self), 'original_class') else 'model.backbone'
        raise SetupError(
            f'the checkpoint was trained on frozen weights that are not there: {"; ".join(problems)}.',
            f'Say where they are with --cfg-options {key}.init_cfg.type=Pretrained {key}.init_cfg.checkpoint=FILE '
            f'{key}.init_cfg.prefix=PREFIX (backbone. if FILE is a whole detector)')

    def _load_base(self, source: Dict[str, Optional[str]]) -> None:
        cfg = dict(checkpoint=source['checkpoint'], prefix=source['prefix'])
        with without_adapters(self):
            initialise = super().init_weights
            if source['option'] == 'load_from' or initialise.__func__ is BaseModule.init_weights:
                PretrainedInit(**cfg)(self)
            else:  # converts the weights in its own way
                self.init_cfg, self.is_init = ConfigDict(type='Pretrained', **cfg), False
                with _same_flags(self):
                    initialise()

    def _other_tensors(self, fingerprint: Dict[str, str]) -> Set[str]:
        ours = self.state_dict()
        return {name for name, value in fingerprint.items() if name not in ours or digest(ours[name]) != value}


def note_loaded(backbone: PretrainedBackbone, *_: Any) -> None:
    """Hook that runs when a state dict has been loaded: tensors that it was copied to are loaded.

    What the state dict had does not tell, since modules resize, rename and drop tensors while they load.
    """
    before = vars(backbone).pop('versions_before_load', {})
    backbone.loaded_names = backbone.loaded_names | {name for name, version in _versions(backbone).items()
                                         if before.get(name) != version}


@contextlib.contextmanager
def loads() -> Iterator[List[Tensor]]:
    """A context that collects the tensors to which state dicts are copied in it, whatever module is loaded."""
    tensors, load = [], nn.Module._load_from_state_dict

    def load_and_collect(module, *args, **kwargs):
        before = _marks({**module._parameters, **module._buffers})
        load(module, *args, **kwargs)
        own = {**module._parameters, **module._buffers}
        tensors.extend(own[name] for name, mark in _marks(own).items() if before.get(name) != mark)

    nn.Module._load_from_state_dict = load_and_collect
    try:
        yield tensors
    finally:
        nn.Module._load_from_state_dict = load


def _versions(module: nn.Module) -> Dict[str, Tuple[int, Optional[int]]]:
    return _marks(module.state_dict(keep_vars=True))


def _marks(tensors: Mapping[str, Optional[Tensor]]) -> Dict[str, Tuple[int, Optional[int]]]:
    """What changes about every tensor, by name, when something is copied to it, or put in its place."""
    return {name: (id(tensor), None if tensor.is_inference() else tensor._version)
            for name, tensor in tensors.items() if tensor is not None}


@contextlib.contextmanager
def _same_flags(module: nn.Module) -> Iterator[None]:
    """A context that leaves ``requires_grad`` of every parameter as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def pretrained_backbones(model: nn.Module) -> Iterator[Tuple[str, PretrainedBackbone]]:
    """Name and backbone of every :class:`PretrainedBackbone` in a model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PretrainedBackbone))


def encode_record(record: Dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def decode_record(tensor: Tensor) -> Dict[str, Any]:
    return json.loads(bytes(tensor.tolist()))
