"""What of the benchmark runs without a GPU: its variants, its data, its table and pictures."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from liera_mm.core.errors import SetupError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('benchmark', ROOT / 'tools/benchmark.py')
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

# Trainable parameters of the backbone 'atto', with factors of rank 2
FACTORS, ALL = 226_392, 3_387_960
TRAINABLE = dict.fromkeys(benchmark.VARIANTS, FACTORS) | {
    'full': ALL, 'full fast': ALL, 'frozen': 0, 'frozen fast': 0, 'lora peft': 40_336}
SIZES = dict(peak_gib=5., trainable_m=6., checkpoint_mib=7.)


@pytest.fixture
def build(monkeypatch):
    monkeypatch.setattr(BaseModel, 'cuda', lambda self: self)
    monkeypatch.setattr(benchmark, 'build_optim_wrapper', lambda model, cfg: cfg)
    return lambda name: benchmark.build(name, 'atto', 2)


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


@pytest.mark.parametrize('name', ['full', 'lora loralib', 'liera fast', 'device heads'])
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
    'pinned masks': ('PinnedMaskPreprocessor', lambda cfg: cfg.model.data_preprocessor.type),
    'cudnn_benchmark': (True, lambda cfg: cfg.env_cfg.cudnn_benchmark),
    'prefetch_factor 4': (4, lambda cfg: cfg.train_dataloader.get('prefetch_factor')),
    'device heads': ('DeviceRPNHead', lambda cfg: cfg.model.rpn_head.type),
    'workers end': (False, lambda cfg: cfg.train_dataloader.persistent_workers),
}


@pytest.mark.parametrize('name', benchmark.SETTINGS)
def test_settings_change_what_their_names_say(build, name):
    cfg = build(name)[0]
    assert {key for key, (value, of) in CHANGED.items() if of(cfg) == value} == {name} & CHANGED.keys()


def test_settings_are_measured_on_what_their_dataloaders_give(build, monkeypatch, run_tool, tmp_path):
    """Two epochs of two batches each, after one that does not count."""
    run_tool('dataset_converters/make_digits_coco.py', tmp_path, '--train', 4, '--val', 1, '--size', 64, '--workers', 1,
             '--coco-names')
    steps = []

    def step(variant, data):
        steps.append((variant.name, len(data['inputs'])))
        variant.times.append(dict.fromkeys(benchmark.PARTS, 2.))

    monkeypatch.setattr(benchmark.Variant, 'step', step)
    names = ['2 workers', 'workers end']
    rows = benchmark.measure_settings(names, str(tmp_path), 'atto', 2, images=2, rounds=2)
    assert [row['variant'] for row in rows] == names
    assert all(row['ms'] == 2 * len(benchmark.PARTS) and row['wait'] > 0 for row in rows)
    assert rows[1]['first'] > rows[0]['first'] > 0
    assert steps == [(name, 2) for _ in range(3) for name in names for _ in range(2)]


def test_settings_without_data(tmp_path):
    with pytest.raises(SetupError, match=rf'The train data set is missing: {tmp_path}/annotations/instances_train2017.json'):
        benchmark.measure_settings(['watched'], str(tmp_path), 'atto', 2, images=2, rounds=2)


def test_floors():
    """One block of width 2 on one token, in the only stage that has any: 2 bytes a number, 192 operations a product."""
    arch = dict(depths=[1, 0, 0, 0], channels=[2, 4, 8, 16])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark.LieRAConvNeXt.arch_settings, 'one', arch)
        floors = benchmark.floors('one', 1, 4, {'TB/s': 1e-12, 'TFLOP/s': 1e-12})
    assert floors == dict(benchmark.PASSES, **{'matrix products': 0}) | {
        **{name: 1000 * 2 * passes * 2 for name, passes in benchmark.PASSES.items()}, 'matrix products': 1000 * 6 * 2 * 16}


def test_batches_repeat_with_their_seed():
    images = [benchmark.batch(2, 64, seed)['inputs'] for seed in (0, 0, 1)]
    assert torch.equal(images[0][1], images[1][1]) and not torch.equal(images[0][1], images[2][1])


def test_table_and_pictures(tmp_path):
    parts = dict.fromkeys(benchmark.PARTS, .6)
    rows = [dict(variant=name, ms=3., quartiles=[2., 4.], **parts, **SIZES) for name in benchmark.VARIANTS]
    header, *lines = benchmark.table(rows).splitlines()
    assert header.split() == ['variant', 'ms', 'quartiles', *parts, *SIZES]
    assert [line[:26].strip() for line in lines] == list(benchmark.VARIANTS)
    assert lines[0].split()[1:] == ['3.00', '2.00-4.00', *['0.60'] * len(parts), '5.00', '6.00', '7.00']
    assert len({len(line) for line in (header, *lines)}) == 1
    benchmark.draw_steps(rows, tmp_path / 'steps.png')
    benchmark.draw_losses(dict(stock=[3., 2.], fast=[3., 2.1]), tmp_path / 'losses.png')
    assert all((tmp_path / name).stat().st_size > 5000 for name in ('steps.png', 'losses.png'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py'])
    with pytest.raises(SystemExit, match='needs a CUDA device'):
        benchmark.main()


@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'ms_deform_attn'])
def test_operators_are_compared_with_what_computes_the_same(name):
    inputs, ours, native = benchmark.operator_calls(1, 64, torch.float64, 'cpu')[name]
    for a, b in zip(*([call(*inputs), *torch.autograd.grad(call(*inputs).sum(), inputs)] for call in (ours, native))):
        torch.testing.assert_close(a, b)
