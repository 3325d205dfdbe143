"""Backbones whose frozen weights must come from somewhere, and loaders for where they come from."""
import re
from importlib import resources
from typing import Dict, Set

from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import load_file
from torch import Tensor

from ..adapt import without_adapters
from ..errors import SetupError

# The norms that detection puts behind every stage; classification checkpoints don't have them, and at their initial ones
# and zeros the lateral convolutions of the neck make up for what a trained scale would do.
OUTPUT_NORM = re.compile(r'norm\d+\.(weight|bias)')


class PretrainedBackbone:
    """Mixed into a backbone: remembers which of its weights were loaded, and insists on the pretrained ones.

    MMEngine only logs a pretrained weight that does not fit, and never loads any when testing; frozen weights that stay
    random would make everything trained on top of them worthless.
    """
    loaded: Set[str] = frozenset()

    def init_weights(self) -> None:
        """Initialise, then load the pretrained weights of ``init_cfg``.

        Raises:
            SetupError: If there are pretrained weights, and one of the frozen tensors is not among them.
        """
        with without_adapters(self):
            super().init_weights()
        init_cfgs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg or {}]
        source = next((cfg['checkpoint'] for cfg in init_cfgs if cfg.get('type') == 'Pretrained'), None)
        if source is not None:
            self.check_base(f'{source} does not fit {type(self).__name__}')

    def check_base(self, what: str) -> None:
        """Raise a SetupError that begins with ``what`` if a frozen weight or a norm's statistics were never loaded."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = [
            name for name, tensor in self.state_dict().items()
            if tensor.is_floating_point() and name not in trained and name not in self.loaded
            and '.adapter.' not in name and not OUTPUT_NORM.fullmatch(name)
        ]
        if missing:
            raise SetupError(
                f'{what}: {len(missing)} frozen tensors would stay random, among them {", ".join(missing[:3])}.',
                "Check the backbone's arch and the checkpoint and prefix of its init_cfg=dict(type='Pretrained', ...), or "
                'give a whole checkpoint as load_from.')

    def train(self, mode: bool = True) -> 'PretrainedBackbone':
        super().train(mode)  # that of mmdet's and mmpretrain's backbones returns None
        return self

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        for name, ours in self.state_dict().items():
            theirs = state_dict.get(prefix + name)
            if theirs is None:
                continue
            if {theirs.dim(), ours.dim()} == {2, 4} and theirs.numel() == ours.numel():
                theirs = state_dict[prefix + name] = theirs.reshape(ours.shape)  # Linear and 1x1 forms of one layer
            if theirs.shape == ours.shape:
                self.loaded = self.loaded | {name}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@CheckpointLoader.register_scheme(prefixes=r'.*\.safetensors$')
def load_from_safetensors(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Load a local safetensors file wherever MMEngine takes a checkpoint."""
    return load_file(filename, device=str(map_location or 'cpu'))


@CheckpointLoader.register_scheme(prefixes='liera://')
def load_from_package(filename: str, map_location=None) -> Dict[str, Tensor]:
    """Load weights that ship with this package: ``liera://NAME``.

    Raises:
        FileNotFoundError: If there are no weights of that name; the message lists those that ship.
    """
    folder = resources.files('liera_mm') / 'weights'
    file = folder / f'{filename[len("liera://"):]}.safetensors'
    if not file.is_file():
        names = sorted(f.name[:-len('.safetensors')] for f in folder.iterdir() if f.name.endswith('.safetensors'))
        raise FileNotFoundError(f'{filename} does not ship with liera_mm; there are {", ".join(names)}')
    with resources.as_file(file) as path:
        return load_from_safetensors(str(path), map_location)
