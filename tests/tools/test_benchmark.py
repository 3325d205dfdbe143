"""What of tools/benchmark.py runs without a GPU: its dataloaders, its table and pictures."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel

from liera_mm.core.errors import SetupError

sys.path.append(str(Path(__file__).parents[2] / 'tools'))

import benchmark

SIZES = dict(peak_gib=5., trainable_m=6., checkpoint_mib=7.)


def test_settings_are_measured_on_what_their_dataloaders_give(monkeypatch, tiny_coco):
    """Two epochs of two batches each, after one that does not count."""
    steps = []

    def step(variant, data):
        steps.append((variant.name, len(data['inputs'])))
        variant.times.append(dict.fromkeys(benchmark.PARTS, 2.))

    monkeypatch.setattr(BaseModel, 'cuda', lambda self: self)
    monkeypatch.setattr('benchmark_variants.build_optim_wrapper', lambda model, cfg: SimpleNamespace(optimizer=None))
    monkeypatch.setattr(benchmark.Variant, 'step', step)
    monkeypatch.setitem(benchmark.SETTINGS['workers end']['options'], 'train_dataloader.num_workers', 2)
    names = ['2 workers', 'workers end']
    rows = benchmark.measure_settings(names, str(tiny_coco), 'atto', 2, images=2, rounds=2)
    assert [row['variant'] for row in rows] == names
    assert all(row['ms'] == 2 * len(benchmark.PARTS) and row['wait'] > 0 for row in rows)
    assert rows[1]['first'] > rows[0]['first'] > 0
    assert steps == [(name, 2) for _ in range(3) for name in names for _ in range(2)]


def test_rows_of_the_variants(monkeypatch):
    """Turns of three steps, after three that do not count."""
    steps = []

    def step(variant, data):
        steps.append(variant.name)
        variant.times.append(dict.fromkeys(benchmark.PARTS, 2.))

    monkeypatch.setattr(BaseModel, 'cuda', lambda self: self)
    monkeypatch.setattr('torch.cuda.reset_peak_memory_stats', lambda: None)
    monkeypatch.setattr('benchmark_variants.build_optim_wrapper', lambda model, cfg: SimpleNamespace(optimizer=None))
    monkeypatch.setattr(benchmark.Variant, 'step', step)
    monkeypatch.setattr(benchmark, 'on_card', lambda variant, data: dict(a=[1.5, 2.], b=[.5, 9.]))
    names = ['frozen fast', 'liera fast']
    rows = benchmark.measure(names, 'atto', 2, images=1, size=64, rounds=2)
    assert steps == 3 * [name for name in names for _ in range(3)]
    assert [row['variant'] for row in rows] == names
    assert all(row['ms'] == 2 * len(benchmark.PARTS) and row['card'] == 2 for row in rows)
    assert rows[0]['trainable_m'] < rows[1]['trainable_m']


def test_settings_without_data(tmp_path):
    with pytest.raises(SetupError, match=rf'The train data set is missing: {tmp_path}/annotations/instances_train2017.json'):
        benchmark.measure_settings(['watched'], str(tmp_path), 'atto', 2, images=2, rounds=2)


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
