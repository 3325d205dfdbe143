"""What checkpoints of trainings have and lack: loaded into the model of their config, and written without frozen weights."""
import os
import random
from pathlib import Path
from typing import Any, Container, Dict, Iterable, List, Mapping, Union

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from ..core.checkpoint import digest, load_adapter, write_atomically
from ..core.errors import SetupError
from ..core.wrappers import plain_names
from ..models.pretrained import RECORD, encode_record, pretrained_backbones
from .safe_loading import read_checkpoint

# Reading


def load_trained(model: nn.Module, path: Union[str, os.PathLike], config: str,
                 may_lack: Iterable[str] = ()) -> Dict[str, Any]:
    """Load a checkpoint of a training into the model of its config, strictly; frozen weights that it lacks are fetched.

    Args:
        model: The model.
        path: The checkpoint.
        config: What messages call the config.
        may_lack: Names of tensors that stay as they are where the checkpoint lacks them.

    Returns:
        The checkpoint.

    Raises:
        SetupError: If it is damaged, or was trained with another config or on other frozen weights.
    """
    checkpoint = read_checkpoint(path, 'cpu')
    check_backbones(model, checkpoint)
    state, ours = named_as_in(model, checkpoint.get('state_dict', checkpoint)), model.state_dict()
    state = {**{name: ours[name] for name in may_lack}, **state}
    try:
        load_state_dict(model, _without_doubles(state, ours.keys()), strict=True)
    except SetupError as error:
        problem, remedy = str(error).splitlines()
        raise SetupError(f'{path} was not trained with {config}: {problem:.300}', remedy) from None
    except RuntimeError as error:
        raise SetupError(f'{path} was not trained with {config}: {str(error).splitlines()[-1]:.300}',
                         'Use the config in the work dir of that checkpoint') from None
    return checkpoint


def named_as_in(model: nn.Module, state: Mapping[str, torch.Tensor], start: str = '') -> Dict[str, torch.Tensor]:
    """The state dict of a checkpoint with the names that a model knows (:func:`plain_names`), records included.

    Args:
        model: The model.
        state: Its state dict, or one of its average.
        start: What names begin with besides, as those of an average do.
    """
    known = [*model.state_dict(), *(f'{name}.{RECORD}' for name, _ in pretrained_backbones(model))]
    return plain_names(state, [f'{start}{name}' for name in known])


def check_backbones(model: nn.Module, checkpoint: Dict[str, Any]) -> None:
    """Raise a SetupError if a checkpoint is of an adapted backbone, and the model has none there.

    MMEngine would drop the adapters, and leave the frozen weights that the checkpoint lacks random.
    """
    ours = [f'.{name}.{RECORD}' for name, _ in pretrained_backbones(model)]
    records = [name for name in named_as_in(model, checkpoint.get('state_dict', checkpoint)) if name.endswith(f'.{RECORD}')]
    other = [name[:-len(RECORD) - 1] for name in records if not any(our.endswith(f'.{name}') for our in ours)]
    if other:
        raise SetupError(f'the checkpoint was trained with adapters in {other[0]}, and the model of this config has no '
                         'LieRABackbone or LieRAConvNeXt there',
                         'Use the config in the work dir of that checkpoint; or tools/merge.py with that one, which makes a '
                         'checkpoint for the detector as it was')


def adapted_backbones(model: nn.Module) -> Dict[str, nn.Module]:
    """The backbones of a model that have adapters, by name."""
    return {name: backbone for name, backbone in pretrained_backbones(model) if hasattr(backbone, 'liera')}


def load_adapter_file(model: nn.Module, path: Union[str, os.PathLike], config: str, name: str = 'default') -> None:
    """Load a file of :func:`liera_mm.save_adapter` into the adapted backbone of a detector, as the adapter of that name.

    Raises:
        SetupError: If there is no such file, or it is damaged, or of other settings or frozen weights.
    """
    if Path(path).is_dir():
        raise SetupError(f'{path} is a folder, and no adapter file', 'Give the path of the file')
    if not Path(path).is_file():
        beside = sorted(map(str, Path(path).parent.glob('*.safetensors')))
        raise SetupError(f'Adapter not found: {path}',
                         f'There are {", ".join(beside)}' if beside else 'Give a file that liera_mm.save_adapter wrote')
    try:
        for backbone in adapted_backbones(model).values():
            load_adapter(backbone, path, name)
    except ValueError as error:
        raise SetupError(str(error), f'Give an adapter that was trained with {config}, or its own config') from None


def _without_doubles(state: Dict[str, torch.Tensor], known: Container[str]) -> Dict[str, torch.Tensor]:
    """A state dict without what it also has under a name that is known.

    Some detectors give one of their parts to another when they first compute, as DDQ does, from when on their state dict has
    it twice.
    """
    others = {name for name in state if name not in known and '.adapter.' not in name}
    ours = {digest(tensor) for name, tensor in state.items() if name in known} if others else set()
    return {name: tensor for name, tensor in state.items() if name not in others or digest(tensor) not in ours}


# Writing


@register_backend('checkpoints')
class CheckpointBackend(LocalBackend):
    """Local files such that a checkpoint is never lost: not by being killed while saving, nor by a full disk.

    ``put`` writes a file whole or not at all. ``remove`` waits until the next ``put`` has succeeded, for MMEngine removes
    the old checkpoint before it saves the new one.
    """
    outdated: List[str] = []  # of all instances, since MMEngine removes with one and saves with others

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        for partial in path.parent.glob(f'{path.name}.*.partial'):  # of a process that was killed
            partial.unlink()
        try:
            write_atomically(path, obj)
        except OSError as error:
            raise SetupError(f'The checkpoint {path} could not be saved: {error}',
                             'Make room for it; the one before it is intact, and --resume continues from there') from None
        while self.outdated:
            old = Path(self.outdated.pop())
            if old.absolute() != path.absolute():
                old.unlink(missing_ok=True)

    def remove(self, filepath: Union[str, Path]) -> None:
        self.outdated.append(os.fspath(filepath))


class CheckpointWithoutBase(Hook):
    """Leaves frozen weights out of checkpoints where these can be had again; LieRAHook registers it.

    In their place is a record of where they came from and a fingerprint, with which
    :class:`~liera_mm.models.PretrainedBackbone` fetches and checks them when the checkpoint is loaded.
    """
    priority = 'LOWEST'  # after EMAHook, which exchanges the entries of two state dicts

    def __init__(self):
        self.logged = False

    def before_save_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        leave_out_base(model, checkpoint)
        if not self.logged:
            for name, backbone in pretrained_backbones(model):
                _log(runner, name, backbone, checkpoint['meta']['liera'][name])
        self.logged = True


def leave_out_base(model: nn.Module, checkpoint: Dict[str, Any]) -> None:
    """Take out of a checkpoint, in place, the frozen weights that can be had again; their records go in."""
    states = [('', checkpoint['state_dict'])]
    if 'ema_state_dict' in checkpoint:
        states.append(('module.', checkpoint['ema_state_dict']))
    checkpoint['meta']['liera'] = {}
    for name, backbone in pretrained_backbones(model):
        prefixes = [(f'{wrapper}{name}.', state) for wrapper, state in states]
        record = backbone.base_record([
            {key[len(prefix):]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            for prefix, state in prefixes])
        for prefix, state in prefixes:
            for key in record['fingerprint']:
                del state[prefix + key]
            state[prefix + RECORD] = encode_record(record)
        checkpoint['meta']['liera'][name] = record


def _log(runner: Runner, name: str, backbone: nn.Module, record: Dict[str, Any]) -> None:
    frozen = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
    kept = frozen & backbone.loaded_names - record['fingerprint'].keys()
    if kept:
        runner.logger.warning(f'LieRA  checkpoints hold {len(kept)} frozen tensors of {name}: these cannot be had again '
                              'from init_cfg or load_from')
    if record['fingerprint']:
        runner.logger.info(f'LieRA  checkpoints leave out {len(record["fingerprint"])} frozen tensors of {name}, which are '
                           f'those of {record["source"]["checkpoint"]}')


def random_state() -> Dict[str, Any]:
    """The state of all random numbers of this process, in types that a checkpoint can hold."""
    name, key, *rest = np.random.get_state()
    state = dict(python=random.getstate(), numpy=(name, key.tolist(), *rest), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Put back what :func:`random_state` gave."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available() and 'cuda' in state:
        torch.cuda.set_rng_state(state['cuda'].cpu())
