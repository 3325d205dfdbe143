"""The configs of VTAB-1k: every task with every variant."""
import functools
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import load_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs/vtab'
BACKBONE = 87_692_800
PER_RANK = 898_964  # of stem, downsampling and depthwise kernels

# What follows v2-b_ in the name of a config: trainable parameters of the backbone, update
VARIANTS = {
    'frozen': (0, None),
    'full': (BACKBONE, None),
    **{f'lora_r{rank}': (rank * PER_RANK, 'additive') for rank in (2, 4, 8, 16)},
    **{f'liera_r{rank}': (rank * PER_RANK, 'taylor') for rank in (2, 4, 8, 16)},
}
TASKS = {task: (group, int(classes)) for task, group, classes in re.findall(
    r'^\| (\w+) \| (\w+) \| (\d+) \|$', (ROOT / 'docs/vtab.md').read_text(), re.MULTILINE)}


def read(variant, **options):
    return load_config(str(CONFIGS / f'convnextv2-b_{variant}.py'), options)


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.fixture
def build(monkeypatch):
    """A function that builds a part of a model without memory for its weights."""
    # ConvNeXt reads values of this one while it is built
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))

    def build(cfg):
        with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device('meta'):
            return MODELS.build(cfg)

    return build


def test_the_table():
    documented = {group: {task: classes for task, (g, classes) in TASKS.items() if g == group}
                  for group in ('natural', 'specialized', 'structured')}
    assert read('frozen').tasks == documented
    assert [len(tasks) for tasks in documented.values()] == [7, 4, 8]


def test_all_variants_are_known():
    assert {path.stem for path in CONFIGS.glob('*.py')} == {f'convnextv2-b_{variant}' for variant in VARIANTS}
    assert VARIANTS['liera_r16'][0] == 14_383_424


@pytest.mark.parametrize('variant', VARIANTS)
def test_what_trains(build, variant):
    cfg = read(variant)
    backbone = build(cfg.model).backbone
    expected, update = VARIANTS[variant]
    assert trainable(backbone) == expected
    rows = liera_mm.summary(backbone)
    assert {row.update for row in rows} == {update} - {None}
    assert Counter(row.kind for row in rows) == (dict(conv=4, depthwise=36) if update else {})
    assert (cfg.custom_hooks == []) == (variant == 'full')
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('https://download.openmmlab.com/')


@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_are_compared_on_the_same_terms(variant):
    """Tasks and protocols among them."""
    ours, reference = read(variant).to_dict(), read('liera_r16').to_dict()
    for cfg in (ours, reference):
        for key in ('type', 'liera', 'drop_path_rate'):
            cfg['model']['backbone'].pop(key, None)
        cfg.pop('custom_hooks')
        if variant == 'full':
            assert cfg['optim_wrapper']['optimizer'].pop('lr') == (1e-4 if cfg is ours else 1e-3)
    assert ours == reference


@pytest.mark.parametrize('task', TASKS)
def test_tasks(build, task):
    """Which task it is makes a difference to the classifier and the data, and to nothing else."""
    cfg, reference = read('liera_r16', task=task), read('liera_r16')
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == f'data/vtab/{task}'
        reference[f'{split}_dataloader'].dataset.data_root = f'data/vtab/{task}'
    reference.model.head.num_classes = TASKS[task][1]
    reference.task = task
    assert cfg.to_dict() == reference.to_dict()
    assert trainable(build(cfg.model.head)) == 1025 * TASKS[task][1]


@pytest.mark.parametrize('protocol, trains_on, evaluates_on', [
    ({}, 'train800val200.txt', 'test.txt'),
    ({'protocol': 'final'}, 'train800val200.txt', 'test.txt'),
    ({'protocol': 'search'}, 'train800.txt', 'val200.txt'),
])
@pytest.mark.parametrize('root', ['data/vtab', '/elsewhere'])
def test_protocols(protocol, trains_on, evaluates_on, root):
    cfg = read('liera_r16', task='dtd', data_root=root, **protocol)
    for split, file in dict(train=trains_on, val=evaluates_on, test=evaluates_on).items():
        dataset = cfg[f'{split}_dataloader'].dataset
        assert (dataset.data_root, dataset.ann_file) == (f'{root}/dtd', file)
    assert (cfg.task, cfg.protocol) == ('dtd', protocol.get('protocol', 'final'))


def test_the_default_is_a_choice():
    assert read('liera_r16').to_dict() == read('liera_r16', task='cifar', protocol='final').to_dict()


def test_choices_of_a_config_that_was_written(tmp_path):
    """It chooses what it was written with, and can be asked for another; then its work dir is not meant."""
    cfg = read('liera_r16', task='dtd', data_root='/elsewhere')
    cfg.work_dir = 'work_dirs/dtd'
    file = tmp_path / 'config.py'
    cfg.dump(file)
    assert load_config(str(file)).to_dict() == cfg.to_dict()
    again = load_config(str(file), dict(task='svhn')).to_dict()
    assert again == read('liera_r16', task='svhn', data_root='/elsewhere').to_dict()


@pytest.mark.parametrize('options, problem, remedy', [
    ({'task': 'cifar100'}, "There is no task 'cifar100'", 'The closest ones are cifar'),
    ({'task': 'flowers'}, "There is no task 'flowers'", 'The closest ones are oxford_flowers102'),
    ({'task': 7}, "There is no task '7'", f'Choose of {", ".join(TASKS)}'),
    ({'protocol': 'test'}, "There is no protocol 'test'", 'Choose of final, search'),
])
def test_unknown_choice(options, problem, remedy):
    with pytest.raises(SetupError) as error:
        read('liera_r16', **options)
    lines = str(error.value).splitlines()
    assert lines[0] == problem and lines[1].startswith(remedy) and len(lines) == 2
