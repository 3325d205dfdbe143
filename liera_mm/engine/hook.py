"""The life cycle of an adapted model under MMEngine's Runner."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

from mmengine.dist import all_gather_object, broadcast, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, FlexibleRunner, Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from ..core.adapted import adapter_names
from ..core.card import Card
from ..core.errors import SetupError
from ..core.merging import merge, unmerge
from ..core.report import range_report
from ..core.summary import summary
from ..core.wrappers import in_shards
from ..models.pretrained import RECORD, decode_record, pretrained_backbones
from . import invariants
from .adapter_file import AdapterFile
from .checkpoint import CheckpointWithoutBase, named_as_in, random_state, set_random_state
from .data import DataChecks
from .datasets import listed
from .delta_picture import add_delta_picture
from .param_groups import MergedGroups
from .sharding import FullyShardStrategy
from .watches import GradientWatch, LossWatch


@HOOKS.register_module()
class LieRAHook(Hook):
    """Checks an adapted model before it trains, watches its perturbations, and merges it for evaluation.

    - Before training: exactly the intended tensors train and are in the optimizer, no frozen weight is random, and all are
      finite. The summary table is logged once. ``DataChecks`` looks at data sets, heads and evaluators.
    - While training: the invariants of ``engine/invariants.py`` and ``engine/watches.py``.
    - After each training epoch: the largest |Δ|, the share of Δ <= -1 under ``taylor``, zero weights that cannot move; and
      for TensorBoard and the like a picture of every Δ (see ``engine/delta_picture.py``).
    - During validation and testing the perturbations are merged into the weights; after it the weights are restored. Not
      while the model is in shards (see ``engine/sharding.py``), which this hook makes of it after the checks.
    - Parameter groups of the optimizer with equal settings are one while it trains (see ``engine/param_groups.py``).
    - Checkpoints leave out frozen weights that can be had again, and are never lost (see ``engine/checkpoint.py``).
    - The end of a training leaves an adapter file with its card (see ``engine/adapter_file.py``).
    - A checkpoint to test or resume from must hold all the rest, and have been trained with the same settings.
    - A resumed training draws the random numbers that it would have drawn without the interruption, unless the number of
      processes is another.
    - All processes of a training begin with the tensors of the first, at the same iteration. The log says how long it will
      take from there, also if an epoch has more or fewer iterations than before it was resumed.

    Args:
        card: What the card of the adapter file says beside what a training knows, such as ``license`` and ``data``: entries
            of :class:`liera_mm.core.card.Card`.

    Raises:
        SetupError: If a card has no such entry.
    """
    # Evaluation starts after, and ends before, the swap of weights by EMAHook and the checkpoint of CheckpointHook.
    priority = 'HIGH'

    def __init__(self, card: Optional[Dict[str, Any]] = None):
        unknown = sorted((card or {}).keys() - set(Card.__dataclass_fields__))
        if unknown:
            raise SetupError(f'The card of an adapter has no {unknown[0]}', f'It has {", ".join(Card.__dataclass_fields__)}')
        self.card = card
        self.random_states: Optional[List[Dict[str, Any]]] = None  # of all processes
        self.loaded_from: Dict[str, Tuple[Dict[str, Optional[str]], Set[str]]] = {}
        self.frozen: Dict[str, str] = {}
        self.watch_gradients: Optional[GradientWatch] = None
        self.merged_groups: Dict[str, MergedGroups] = {}

    def before_run(self, runner: Runner) -> None:
        for hook in (CheckpointWithoutBase(), DataChecks(), AdapterFile(self.card)):
            if not any(isinstance(other, type(hook)) for other in runner.hooks):
                runner.register_hook(hook)
        if isinstance(runner, FlexibleRunner) and not isinstance(runner.strategy, FullyShardStrategy):
            return  # MMEngine's strategies save where they like
        for hook in runner.hooks:
            local = '://' not in str(getattr(hook, 'out_dir', None) or runner.work_dir)
            if isinstance(hook, CheckpointHook) and local and not (hook.backend_args or hook.file_client_args):
                hook.backend_args = dict(backend='checkpoints')

    def before_train(self, runner: Runner) -> None:
        model = _unwrap(runner.model)
        backbones = list(pretrained_backbones(model))
        if not backbones:
            raise SetupError(
                'LieRAHook found no adapted backbone in the model.',
                'Set its type to LieRAConvNeXt or LieRABackbone with liera=dict(...), or take the hook out of custom_hooks, '
                'or of default_hooks with default_hooks=dict(liera=None)')
        _start_together(runner, model)
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            loop._max_iters = loop.iter + (loop.max_epochs - loop.epoch) * len(loop.dataloader)
        model.train()  # as the loop will: here a backbone's own frozen_stages freezes what is in them, adapters too
        for name, backbone in backbones:
            backbone.check_base(f'{name} has frozen weights that were never loaded')
            if hasattr(backbone, 'liera') and not invariants.frozen_by_design(model, name):
                invariants.check_trainable(name, backbone)
            if name in self.loaded_from and not backbone.base_in_place():
                backbone.set_base(*self.loaded_from[name])
        invariants.check_finite(model)
        invariants.check_movable(model)
        invariants.check_optimizer(model, runner.optim_wrapper)
        runner.logger.info(f'LieRA\n{summary(model)}')
        too_many = invariants.ranks_above_dimensions(model)
        if too_many:
            runner.logger.warning(
                f'LieRA  the rank is above the dimensions of {len(too_many)} layers, such as {too_many[0]}: their Δ can be '
                "every tensor, for which method='dense' in overrides takes fewer parameters")
        self._shard(runner)
        self._merge_groups(runner)
        self.frozen = invariants.frozen_digests(model)
        self.watch_loss = LossWatch(model, runner.optim_wrapper)
        self.watch_gradients = GradientWatch(model, runner.optim_wrapper)
        invariants.watch_first_step(model, runner.optim_wrapper, runner.logger, self.watch_loss,
                                    getattr(runner.model, 'find_unused_parameters', True))

    def after_train(self, runner: Runner) -> None:
        self.watch_gradients.check()
        self.watch_gradients.remove()
        self.watch_loss.remove()
        for groups in self.merged_groups.values():
            groups.remove()
        self.merged_groups = {}

    def before_test(self, runner: Runner) -> None:
        invariants.check_finite(_unwrap(runner.model))

    def before_train_epoch(self, runner: Runner) -> None:
        if self.random_states is not None and len(self.random_states) == get_world_size():
            set_random_state(self.random_states[get_rank()])

    def after_train_epoch(self, runner: Runner) -> None:
        self.watch_gradients.check()
        # Validation comes next, and a resumed training does not repeat it. Only the first process saves checkpoints
        self.random_states = all_gather_object(random_state())
        model = _unwrap(runner.model)
        invariants.check_frozen(model, self.frozen)
        if not summary(model):
            return
        report = range_report(model)
        runner.logger.info(f'LieRA  largest |Δ|: {report.max_delta:.4g} in {report.max_delta_layer}  '
                           f'Δ <= -1: {report.sign_change_share:.3%}  zero weights: {report.zero_weights}')
        runner.visualizer.add_scalars(
            {
                'liera/max_delta': report.max_delta,
                'liera/sign_change_share': report.sign_change_share,
                'liera/zero_weights': report.zero_weights
            },
            step=runner.epoch + 1)
        add_delta_picture(runner.visualizer, model, runner.epoch + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.watch_gradients is not None:
            self.watch_gradients.check()
        checkpoint['random_states'] = self.random_states
        states = checkpoint.get('param_schedulers')
        if isinstance(states, dict):
            states.update({name: self.merged_groups[name].split_schedulers(states[name])
                           for name in states.keys() & self.merged_groups.keys()})
        elif states and self.merged_groups:
            states[:] = self.merged_groups[''].split_schedulers(states)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = _unwrap(runner.model)
        state = checkpoint.get('state_dict', checkpoint)
        wrapped = any(key.startswith('module.') for key in state)
        theirs = named_as_in(model, state)
        state.clear()
        state.update(theirs)
        if 'ema_state_dict' in checkpoint:
            checkpoint['ema_state_dict'] = named_as_in(model, checkpoint['ema_state_dict'], 'module.')
        fetched = set()
        for name, backbone in pretrained_backbones(model):
            if f'{name}.{RECORD}' in theirs:
                record = decode_record(theirs[f'{name}.{RECORD}'])
                backbone.check_settings(record)
                fetched.update(f'{name}.{key}' for key in record['fingerprint'])
        starts_training = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        if starts_training:
            if not theirs.keys() & model.state_dict().keys():
                raise SetupError(
                    f'{runner._load_from} has nothing of this model: it has {listed(list(theirs))}, the model '
                    f'{listed(list(model.state_dict()))}',
                    'Give a checkpoint of this detector as load_from; weights of its backbone alone go into the init_cfg of '
                    'the backbone, and adapter files to tools/predict.py')
            self._remember_source(runner, 'module.' * wrapped, theirs.keys(), fetched)
            return  # load_from may give a part of the model; before_train checks what must be there
        self.random_states = checkpoint.get('random_states')
        ours = model.state_dict()
        remedy = ('Give a checkpoint that was trained with this config, or the config that this checkpoint was trained '
                  'with; both are in its work_dir.')
        missing = sorted(ours.keys() - theirs.keys() - fetched)
        if missing:
            adapters = len(_adapter_names(model).intersection(missing))
            raise SetupError(
                f'the checkpoint lacks {len(missing)} tensors of this model ({adapters} of adapters), among them '
                f'{", ".join(missing[:3])}.', remedy)
        for name, value in ours.items():
            # squeezed, for Linear and 1x1 forms of one layer are the same
            if name in theirs and theirs[name].squeeze().shape != value.squeeze().shape:
                raise SetupError(
                    f'the shape of {name} is {tuple(theirs[name].shape)} in the checkpoint, {tuple(value.shape)} in this '
                    'model.', remedy)
        if runner._resume:
            invariants.check_whole(checkpoint)
        if runner._resume and isinstance(runner.optim_wrapper, OptimWrapper):
            invariants.check_groups(runner.optim_wrapper, checkpoint)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[Sequence] = None) -> None:
        model = _unwrap(runner.model)
        if batch_idx == 0 and not in_shards(model):
            merge(model)

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict] = None) -> None:
        unmerge(_unwrap(runner.model))

    before_test_iter = before_val_iter
    after_test_epoch = after_val_epoch

    def _merge_groups(self, runner: Runner) -> None:
        wrappers, schedulers = runner.optim_wrapper, runner.param_schedulers or {}
        if not isinstance(wrappers, OptimWrapperDict):
            wrappers, schedulers = {'': wrappers}, {'': schedulers or []}
        self.merged_groups = {name: MergedGroups(wrapper.optimizer, schedulers.get(name) or [])
                              for name, wrapper in wrappers.items()}

    @staticmethod
    def _shard(runner: Runner) -> None:
        strategy = getattr(runner, 'strategy', None)
        if not isinstance(strategy, FullyShardStrategy) or get_world_size() == 1:
            return
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise SetupError('EMAHook averages whole tensors, and FullyShardStrategy leaves none.',
                             'Take EMAHook out of custom_hooks, or train without shards: --cfg-options runner_type=Runner')
        strategy.shard()

    def _remember_source(self, runner: Runner, start: str, names: Set[str], fetched: Set[str]) -> None:
        """Note which frozen weights come from ``load_from``; from the work dir they could be overwritten any time."""
        if Path(runner._load_from).absolute().parent == Path(runner.work_dir).absolute():
            return
        for name, _ in pretrained_backbones(_unwrap(runner.model)):
            given = {key[len(name) + 1:] for key in names if key.startswith(f'{name}.')}
            if given and not any(key.startswith(f'{name}.') for key in fetched):
                source = dict(option='load_from', checkpoint=runner._load_from, prefix=f'{start}{name}.')
                self.loaded_from[name] = (source, given)


def _adapter_names(model: nn.Module) -> Set[str]:
    return {f'{prefix}.{name}' for prefix, backbone in pretrained_backbones(model) for name in adapter_names(backbone)}


def _unwrap(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _start_together(runner: Runner, model: nn.Module) -> None:
    """Give all processes the tensors of the first; another file of weights on one of the nodes must not go unnoticed."""
    iterations = all_gather_object(runner.iter)
    if len(set(iterations)) > 1:
        raise SetupError(f'the processes would start at different iterations: {", ".join(map(str, iterations))}.',
                         'To resume on several nodes, all of them must see the work dir with the checkpoint')
    for tensor in model.state_dict().values():
        broadcast(tensor)
