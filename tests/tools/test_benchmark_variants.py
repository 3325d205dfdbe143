"""The variants that tools/benchmark.py measures differ in what their names say, and train."""
import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

sys.path.append(str(Path(__file__).parents[2] / 'tools'))

import benchmark_variants as benchmark

# Trainable parameters of the backbone 'atto', with factors of rank 2
FACTORS, ALL = 226_392, 3_387_960
TRAINABLE = dict.fromkeys(benchmark.VARIANTS, FACTORS) | {
    'full': ALL, 'full fast': ALL, 'frozen': 0, 'frozen fast': 0, 'lora peft': 40_336}


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(BaseModel, 'cuda', lambda self: self)
    monkeypatch.setattr(benchmark, 'build_optim_wrapper', lambda model, cfg: cfg)
    return lambda name: benchmark.build(name, 'atto', 2, 128)


@pytest.mark.parametrize('name', benchmark.VARIANTS)
def test_variants_differ_in_what_their_names_say(build, name):
    if name == 'lora peft':
        pytest.importorskip('peft')
    _, model, optim_wrapper = build(name)
    setting = benchmark.VARIANTS[name]
    assert sum(p.numel() for p in model.backbone.parameters() if p.requires_grad) == TRAINABLE[name]
    assert model.backbone.fast == setting.get('fast', True)
    assert model.backbone.stages[0][0].with_cp == setting.get('with_cp', False)
    stock = 'options' in setting
    assert bool(optim_wrapper.optimizer.fused) != stock
    assert (type(model.data_preprocessor).__name__ == 'DetDataPreprocessor') == stock
    assert (type(model.rpn_head.sampler).__name__ == 'RandomSampler') == stock


@pytest.mark.parametrize('name', ['full', 'lora loralib', 'liera fast'])
def test_a_variant_has_a_loss(build, name):
    _, model, _ = build(name)
    with DefaultScope.overwrite_default_scope('mmdet'):
        loss, _ = model.parse_losses(model(**model.data_preprocessor(benchmark.batch(1, 128), training=True), mode='loss'))
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


CHANGED = {  # by a setting: one value of the config
    'pageable': (False, lambda cfg: cfg.train_dataloader.pin_memory or cfg.model.data_preprocessor.non_blocking),
    'DetDataPreprocessor': ('DetDataPreprocessor', lambda cfg: cfg.model.data_preprocessor.type),
    'RandomSampler': ('RandomSampler', lambda cfg: cfg.model.train_cfg.rcnn.sampler.type),
    'AdamW not fused': (None, lambda cfg: cfg.optim_wrapper.optimizer.fused),
    '2 workers': (2, lambda cfg: cfg.train_dataloader.num_workers),
    'PackDetInputs': ('PackDetInputs', lambda cfg: cfg.train_dataloader.dataset.pipeline[-1].type),
    'cudnn_benchmark': (True, lambda cfg: cfg.env_cfg.cudnn_benchmark),
    'prefetch_factor 4': (4, lambda cfg: cfg.train_dataloader.get('prefetch_factor')),
    'stock heads': ('StandardRoIHead', lambda cfg: cfg.model.roi_head.type),
    'no graphs': (['LieRAHook'], lambda cfg: [hook.type for hook in cfg.custom_hooks]),
    'workers end': (False, lambda cfg: cfg.train_dataloader.persistent_workers),
}


@pytest.mark.parametrize('name', benchmark.SETTINGS)
def test_settings_change_what_their_names_say(build, name):
    cfg = build(name)[0]
    assert {key for key, (value, of) in CHANGED.items() if of(cfg) == value} == {*name.split(', ')} & CHANGED.keys()


def test_batches_repeat_with_their_seed():
    images = [benchmark.batch(2, 64, seed)['inputs'] for seed in (0, 0, 1)]
    assert torch.equal(images[0][1], images[1][1]) and not torch.equal(images[0][1], images[2][1])
