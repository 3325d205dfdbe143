"""The life cycle of an adapted model under MMEngine's Runner."""
import json
import re
from typing import Any, Dict, Iterator, Optional, Sequence

from mmengine.fileio import load
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch import nn

from ..adapt import intended_parameters, merge, range_report, summary, unmerge
from ..errors import SetupError
from ..models import PretrainedBackbone


@HOOKS.register_module()
class LieRAHook(Hook):
    """Checks an adapted model before it trains, watches its perturbations, and merges it for evaluation.

    - Before training: exactly the intended tensors train and are in the optimizer, no frozen weight is random, and the
      annotations have the categories of the config. The summary table is logged once.
    - After each training epoch: the largest |Δ|, the share of Δ <= -1 under ``taylor``, zero weights that cannot move.
    - During validation and testing the perturbations are merged into the weights; after it the weights are restored.
    - A checkpoint to test or resume from must hold the whole model, and have been trained with the same settings.
    """
    # Evaluation starts after, and ends before, the swap of weights by EMAHook and the checkpoint of CheckpointHook.
    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        model = _unwrap(runner.model)
        backbones = list(_backbones(model))
        if not backbones:
            raise SetupError(
                'LieRAHook found no adapted backbone in the model.',
                'Set its type to LieRAConvNeXt or LieRABackbone with liera=dict(...), or take the hook out of custom_hooks')
        model.train()  # as the loop will: here a backbone's own frozen_stages freezes what is in them, adapters too
        for name, backbone in backbones:
            backbone.check_base(f'{name} has frozen weights that were never loaded')
            if hasattr(backbone, 'liera'):
                _check_trainable(name, backbone)
        _check_optimizer(model, runner.optim_wrapper)
        _check_categories(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            _check_categories(runner.val_dataloader.dataset)
        runner.logger.info(f'LieRA\n{summary(model)}')

    def before_val(self, runner: Runner) -> None:
        _check_categories(runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        _check_categories(runner.test_dataloader.dataset)

    def after_train_epoch(self, runner: Runner) -> None:
        model = _unwrap(runner.model)
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

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta']['liera'] = _settings(_unwrap(runner.model))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_settings(_unwrap(runner.model), checkpoint)
        starts_training = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        if starts_training:
            return  # load_from may give a part of the model; before_train checks what must be there
        model = _unwrap(runner.model)
        theirs = {re.sub('^module\\.', '', key) for key in checkpoint.get('state_dict', checkpoint)}
        missing = sorted(model.state_dict().keys() - theirs)
        if missing:
            adapters = sum('.adapter.' in name for name in missing)
            raise SetupError(
                f'the checkpoint lacks {len(missing)} tensors of this model ({adapters} of adapters), among them '
                f'{", ".join(missing[:3])}.', 'Give a checkpoint that was trained with this config, or the config that '
                'this checkpoint was trained with; both are in its work_dir.')

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Optional[Sequence] = None) -> None:
        if batch_idx == 0:
            merge(_unwrap(runner.model))

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict] = None) -> None:
        unmerge(_unwrap(runner.model))

    before_test_iter = before_val_iter
    after_test_epoch = after_val_epoch


def check_settings(model: nn.Module, checkpoint: dict) -> None:
    """Check that a checkpoint's factors mean what they would mean in this model.

    Raises:
        SetupError: If the checkpoint was trained with another update, rank, alpha or target; names the difference.
    """
    theirs, ours = checkpoint.get('meta', {}).get('liera', {}), _settings(model)
    different = [
        f'{key} {theirs[name].get(key)!r} there, {ours[name].get(key)!r} here'
        for name in theirs.keys() & ours.keys() for key in sorted(theirs[name].keys() | ours[name].keys())
        if theirs[name].get(key) != ours[name].get(key)
    ]
    if different:
        raise SetupError(f'the checkpoint was trained with other liera settings: {"; ".join(different)}',
                         'Use the config in the work dir of that checkpoint')


def _settings(model: nn.Module) -> Dict[str, Dict[str, Any]]:
    """The arguments of adapt(), by name of the adapted module, in plain types as a file gives them back."""
    return json.loads(json.dumps({name: module.liera for name, module in model.named_modules() if hasattr(module, 'liera')}))


def _unwrap(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _backbones(model: nn.Module) -> Iterator:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PretrainedBackbone))


def _check_trainable(name: str, backbone: nn.Module) -> None:
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    intended = intended_parameters(backbone)
    if trained != intended:
        raise SetupError(
            f'{name} would not train what its liera config says. Trains, but should be frozen: '
            f'{sorted(trained - intended) or "nothing"}. Should train, but is frozen: '
            f'{sorted(intended - trained) or "nothing"}',
            'Leave requires_grad of the backbone alone: no frozen_stages, no hook that freezes or unfreezes it')


def _check_optimizer(model: nn.Module, optim_wrapper) -> None:
    wrappers = [optim_wrapper] if isinstance(optim_wrapper, OptimWrapper) else optim_wrapper.values()
    optimized = {id(p) for wrapper in wrappers for group in wrapper.param_groups for p in group['params']}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    if missing:
        raise SetupError(f'the optimizer lacks {len(missing)} trainable tensors: {", ".join(missing[:3])}.',
                         'It must be built after the model is adapted: adapt through the config, not from a hook')


def _check_categories(dataset) -> None:
    """MMDetection drops annotations of other names in silence, and fails on missing ones only when it evaluates."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    classes = dataset.metainfo.get('classes', ())
    if len(getattr(dataset, 'cat_ids', classes)) == len(classes):
        return
    theirs = [category['name'] for category in load(dataset.ann_file)['categories']]
    missing = [name for name in classes if name not in theirs]
    raise SetupError(
        f'{dataset.ann_file} lacks {len(missing)} classes of the config, such as {", ".join(missing[:5])}; it has '
        f'{", ".join(theirs[:5])}.', 'Set metainfo=dict(classes=...) of the data set to its own names, and num_classes of '
        'the heads to their number')
