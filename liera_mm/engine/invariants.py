"""What must hold before and during every training of an adapted model; LieRAHook checks it.

During training that costs one hash of 1024 values of each frozen tensor an epoch, one look at which gradients the first
step has, and one look at the losses and one at the gradients an iteration, before the optimizer's step.
"""
import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn
from torch.optim import Optimizer

from ..core.adapted import adapted_layers, adapter_names, intended_parameters, named_layers
from ..core.checkpoint import digest
from ..core.errors import SetupError
from ..core.group import MULTIPLICATIVE
from ..core.text import some
from ..models.pretrained import pretrained_backbones
from .sharding import local
from .watches import LossWatch, not_finite, optimizers

SAMPLES = 1024  # of each frozen tensor


# Before training


def check_trainable(name: str, backbone: nn.Module) -> None:
    """Raise a SetupError unless exactly those tensors of a backbone train that its ``liera`` config says."""
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    intended = intended_parameters(backbone)
    if trained != intended:
        raise SetupError(
            f'{name} would not train what its liera config says. Trains, but should be frozen: '
            f'{sorted(trained - intended) or "nothing"}. Should train, but is frozen: '
            f'{sorted(intended - trained) or "nothing"}',
            "Leave requires_grad of the backbone alone: no hook that freezes or unfreezes it; what shall not train is for "
            "exclude=[...], what shall train whole for train=[...] in liera=dict(...)")


def frozen_by_design(model: nn.Module, name: str) -> bool:
    """Whether a backbone is in a part of the model of which nothing trains, as the teacher of a semi-supervised detector."""
    parts = name.split('.')[:-1]
    ancestors = [model.get_submodule('.'.join(parts[:i])) for i in range(1, len(parts) + 1)]
    return any(not any(p.requires_grad for p in part.parameters()) for part in ancestors) and any(
        p.requires_grad for p in model.parameters())


def trained_backbones(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Name and backbone of those that are not frozen by design."""
    return [(name, backbone) for name, backbone in pretrained_backbones(model) if not frozen_by_design(model, name)]


def check_optimizer(model: nn.Module, optim_wrapper: Union[OptimWrapper, OptimWrapperDict]) -> None:
    """Raise a SetupError if a trained tensor is not in the optimizer, or if adapters alone rest at a learning rate of 0.

    And if a training has resumed with the settings of another kind of optimizer.
    """
    groups = [group for optimizer in optimizers(optim_wrapper) for group in optimizer.param_groups]
    optimized = {id(p) for group in groups for p in group['params']}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    for optimizer in optimizers(optim_wrapper):
        others = [getattr(optimizer, 'defaults', {}).keys() - group.keys() for group in optimizer.param_groups]
        if any(others):
            raise SetupError(
                f'the optimizer of the checkpoint is no {type(optimizer).__name__}: it has no {some(set().union(*others))}',
                'Resume with the optim_wrapper of the checkpoint, or start from it with load_from, without resume')
    if missing:
        raise SetupError(f'the optimizer lacks {len(missing)} trainable tensors: {", ".join(missing[:3])}.',
                         'It must be built after the model is adapted: adapt through the config, not from a hook')
    at_rest = [group.get('initial_lr', group.get('lr')) == 0 for group in groups]
    if all(at_rest):  # a trial, in which nothing is meant to move
        return
    resting = {id(p) for group, rests in zip(groups, at_rest) if rests for p in group['params']}
    still = [f'{name}.adapter.{key}' for name, layer in adapted_layers(model)
             for key, p in layer.adapter.named_parameters() if id(p) in resting]
    if still:
        raise SetupError(
            f'{len(still)} tensors of adapters would never move, for their learning rate is 0: {some(still)}',
            'Where lr_mult=0 in custom_keys froze the layers before, give their adapters a rate of their own, '
            'optim_wrapper.paramwise_cfg.custom_keys.adapter.lr_mult=1.; what shall not train is for exclude=[...] in '
            'liera=dict(...)')


def check_groups(optim_wrapper: OptimWrapper, checkpoint: Dict[str, Any]) -> None:
    """Raise a SetupError if a training is to resume whose optimizer has other groups of parameters."""
    theirs, ours = ([len(group['params']) for group in groups] for groups in (
        checkpoint.get('optimizer', {}).get('param_groups', ()), optim_wrapper.optimizer.param_groups))
    if theirs and theirs != ours:
        raise SetupError(
            f"the checkpoint's optimizer has {sum(theirs)} tensors in {len(theirs)} groups, this one {sum(ours)} in "
            f'{len(ours)}.',
            'Resume with the optim_wrapper and the MMEngine of the checkpoint (before 0.10.4, frozen tensors are in the '
            'optimizer too), or start from it with load_from')


def check_whole(checkpoint: Dict[str, Any]) -> None:
    """Raise a SetupError if a checkpoint to resume from lacks what a training goes on with, as published ones do."""
    lacking = [key for key in ('meta', 'message_hub') if key not in checkpoint]
    lacking += [f'meta.{key}' for key in ('epoch', 'iter') if key not in checkpoint.get('meta', {'epoch': 0, 'iter': 0})]
    if lacking:
        raise SetupError(f'the checkpoint has no {", ".join(lacking)}, and cannot be resumed from',
                         'Give one that a training wrote; or start from this one with load_from, without resume')


def check_finite(model: nn.Module) -> None:
    """Raise a SetupError if a weight is NaN or infinite."""
    broken = not_finite(model)
    if broken:
        raise SetupError(f'{len(broken)} tensors of the model have values that are not finite: {some(broken)}',
                         'Give intact weights: those of init_cfg, load_from or the checkpoint are damaged')


def check_movable(model: nn.Module) -> None:
    """Raise a SetupError if all of a layer's weight is zero, which no multiplicative update moves, nor some methods."""
    zero = [name for name, layer in adapted_layers(model)
            if (layer.update in MULTIPLICATIVE or layer.adapter.needs_weight) and not layer.frozen_weight.any()]
    if zero:
        raise SetupError(
            f'{len(zero)} adapted layers have nothing but zeros for a weight, which their update or method cannot move: '
            f'{some(zero)}',
            "Give them update='additive', method='lora' or 'dense' in overrides, or targets that leave them out; or check "
            'the pretrained weights')


def ranks_above_dimensions(model: nn.Module) -> List[str]:
    """Names of the layers whose factors have a larger inner dimension than Δ, as a matrix, has rows or columns.

    That is no error: the paper's own configs, with rank 16 on depthwise kernels of 7 rows, have such layers.
    """
    return [name for name, layer in adapted_layers(model) if layer.adapter.oversized]


# While training


def frozen_digests(model: nn.Module) -> Dict[str, str]:
    """A hash of 1024 values of every frozen tensor of the backbones: their parameters, and what adapters keep fixed.

    Of a sharded tensor, of 1024 values that this process holds. Not of backbones that are frozen by design: teachers move.
    """
    digests = {}
    for prefix, backbone in trained_backbones(model):
        parameters, adapters = dict(backbone.named_parameters()), adapter_names(backbone)
        for name, tensor in backbone.state_dict().items():
            if not parameters[name].requires_grad if name in parameters else name in adapters:
                values = local(tensor).flatten()
                digests[f'{prefix}.{name}'] = digest(values[::len(values) // SAMPLES | 1])
    return digests


def check_frozen(model: nn.Module, before: Dict[str, str]) -> None:
    """Raise a SetupError if a frozen tensor has changed since :func:`frozen_digests`, be the model merged or not."""
    now = frozen_digests(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise SetupError(
            f'{len(changed)} of {len(before)} frozen tensors have changed while training: {some(changed)}',
            'Look among custom_hooks for what writes to them or unfreezes them, take it out, and train again: the '
            'perturbations were trained on weights that are gone')


def watch_first_step(model: nn.Module,
                     optim_wrapper: Union[OptimWrapper, OptimWrapperDict],
                     logger: logging.Logger,
                     losses: Optional[LossWatch] = None,
                     find_unused: bool = True) -> None:
    """Have it checked just before the first step of the optimizer which tensors have a gradient.

    It raises a SetupError if a frozen tensor has a gradient, or if an adapter has none although the detector uses its layer,
    or although ``targets`` name the layer. Other trained tensors without a gradient are logged, for detectors have parts
    that they don't use. Frozen tensors without a gradient may be among the optimizer's: MMEngine puts them there, and no
    optimizer moves or decays them.

    Args:
        model: The detector or classifier.
        optim_wrapper: Its optimizers.
        logger: Where to say what has no gradient.
        losses: What has the inputs of the last forward pass. Without it, a layer without a gradient counts as used.
        find_unused: Whether tensors may be without one; not with DistributedDataParallel's ``find_unused_parameters=False``.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbones = tuple(f'{name}.' for name, _ in pretrained_backbones(model))
    pending = {id(optimizer) for optimizer in optimizers(optim_wrapper)}

    def check(optimizer: Optimizer, *_: Any) -> None:
        if id(optimizer) not in pending:
            return
        pending.remove(id(optimizer))
        have = {names[id(p)]: p.grad is not None for group in optimizer.param_groups for p in group['params']
                if id(p) in names}
        thawed = [name for name, has in have.items() if has and name not in trained]
        if thawed:
            raise SetupError(f'{len(thawed)} frozen tensors have a gradient, and would train and decay: {some(thawed)}',
                             'Leave requires_grad of the backbone alone: no hook that unfreezes it')
        lacking = [name for name, has in have.items() if not has and name in trained]
        ours = [name for name in lacking if name.startswith(backbones)]
        _check_lacking(model, ours, losses)
        if ours and not find_unused:
            raise SetupError(
                f'{len(ours)} trained tensors are of parts of the backbone that the detector does not use: {some(ours)}',
                'Several processes need to know: set find_unused_parameters=True in the config, or leave these parts out '
                'with exclude=[...] in liera=dict(...)')
        if ours:
            logger.warning(f'LieRA  the detector does not use parts of the backbone: {len(ours)} trained tensors of it had '
                           f'no gradient in the first step, and stay as they are: {some(ours)}')
        if len(lacking) > len(ours):
            others = set(lacking) - set(ours)
            logger.warning(f'LieRA  {len(others)} trained tensors had no gradient in the first step: {some(others)}')
        if losses is not None and not pending:
            losses.forget()

    for optimizer in optimizers(optim_wrapper):
        optimizer.register_step_pre_hook(check)


def _check_lacking(model: nn.Module, lacking: Sequence[str], losses: Optional[LossWatch]) -> None:
    """Raise a SetupError if trained tensors without a gradient are those of a layer that is named, or that is in use."""
    if not lacking:
        return
    adapters = {f'{name}.adapter.{key}': name for name, layer in adapted_layers(model)
                for key, _ in layer.adapter.named_parameters()}
    layers = {adapters[name] for name in lacking if name in adapters}
    named = {f'{prefix}.{name}' for prefix, backbone in pretrained_backbones(model) if hasattr(backbone, 'liera')
             for name in named_layers(backbone)} & layers
    if named:
        raise SetupError(f'{len(named)} layers that targets name had no gradient in the first step: {some(named)}',
                         "Take them out of liera's targets: the detector does not use what they compute")
    used = layers if losses is None else losses.in_use(layers)
    ours = [name for name in lacking if adapters.get(name) in used]
    if ours:
        raise SetupError(
            f'{len(ours)} trained tensors of the backbone had no gradient in the first step: {some(ours)}',
            'The detector uses these layers, but computes with their frozen weight, or with a Δ that something detaches: '
            "leave them out with exclude=[...] in liera=dict(...), or mend what reads them")
