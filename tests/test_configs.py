"""Every config builds, trains what its name says, and follows the schedule of the paper."""
import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import liera_mm
from liera_mm.core.adapt import ALPHA

# isort: split
from mmpretrain.models.backbones import ConvNeXt

CONFIGS = Path(__file__).parents[1] / 'configs'
COCO = sorted(path.stem for path in CONFIGS.glob('*.py'))
DIGITS = sorted(path.stem for path in (CONFIGS / 'digits').glob('*.py'))
BACKBONES = dict(b=87_694_592, l=196_422_528, h=657_477_568)
RANK_16, RANK_32 = 17_271_104, 34_542_208
OUTPUT_CHANNELS = 110_208  # of all its kernels: the magnitudes of DoRA

# What follows v2-b_ (v2- of others) in a name: trainable parameters of the backbone, update, method of depthwise kernels
COCO_CONFIGS = {
    'frozen': (0, None, None),
    'full': (BACKBONES['b'], None, None),
    'lora_r16': (RANK_16, 'additive', 'lora'),
    'lora_r32': (RANK_32, 'additive', 'lora'),
    'liera_r16': (RANK_16, 'taylor', 'lora'),
    'liera-plain_r16': (RANK_16, 'taylor', 'lora'),
    'liera_r32': (RANK_32, 'taylor', 'lora'),
    'liera-exp_r16': (RANK_16, 'exp', 'lora'),
    'liera-compact_r16': (3_977_600, 'taylor', 'dense'),
    'pissa_r16': (RANK_16, 'additive', 'pissa'),
    'pissa-liera_r16': (RANK_16, 'taylor', 'pissa'),
    'milora_r16': (RANK_16, 'additive', 'milora'),
    'milora-liera_r16': (RANK_16, 'taylor', 'milora'),
    'tucker_r16': (3_246_597, 'additive', 'tucker'),
    'tucker-liera_r16': (3_246_597, 'taylor', 'tucker'),
    'atom_r16': (28_528, 'additive', 'atom'),
    'atom-liera_r16': (28_528, 'taylor', 'atom'),
    'dora_r16': (RANK_16 + OUTPUT_CHANNELS, 'additive', 'dora'),
    'dora-liera_r16': (RANK_16 + OUTPUT_CHANNELS, 'taylor', 'dora'),
    'l_liera_r16': (25_892_160, 'taylor', 'lora'),
    'h_liera_r16': (47_444_800, 'taylor', 'lora'),
}

# What lies between v2-mini_ and _digits: the same
DIGITS_CONFIGS = {
    'frozen': (0, None, None),
    'full': (1_089_480, None, None),
    'lora': (226_984, 'additive', 'lora'),
    'liera': (226_984, 'taylor', 'lora'),
    'liera-exp': (226_984, 'exp', 'lora'),
    'liera-compact': (90_960, 'taylor', 'dense'),
    'pissa': (226_984, 'additive', 'pissa'),
    'pissa-liera': (226_984, 'taylor', 'pissa'),
    'dora': (226_984 + 5832, 'additive', 'dora'),
    'dora-liera': (226_984 + 5832, 'taylor', 'dora'),
}


def variant(name):
    pattern = r'mask-rcnn_convnextv2-(?:b_(.*)|([lh]_.*)|mini_(.*)_digits|mini_pretrain_glyphs)'
    return re.fullmatch(pattern, name).expand(r'\1\2\3')

TRANSFER = sorted(path.stem for path in (CONFIGS / 'transfer').glob('*.py'))
MOBILENET = 2_223_872


@functools.cache
def read_once(name):
    folder = 'digits' if name in DIGITS else 'transfer' if name in TRANSFER else ''
    return Config.fromfile(CONFIGS / folder / f'{name}.py')


def read(name):
    return copy.deepcopy(read_once(name))


@pytest.fixture
def build(monkeypatch):
    """A function that builds a detector of a config without memory for its weights."""
    # ConvNeXt reads values of this one while it is built
    monkeypatch.setattr(torch, 'linspace', functools.partial(torch.linspace, device='cpu'))

    def build(cfg):
        with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
            return MODELS.build(cfg.model)

    return build


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def parts(model):
    """Neck and heads of a detector."""
    return [child for name, child in model.named_children() if name not in ('backbone', 'data_preprocessor')]


def test_all_configs_are_known():
    assert {variant(name) for name in COCO} == set(COCO_CONFIGS)
    assert {variant(name) for name in DIGITS} == {*DIGITS_CONFIGS, ''}


@pytest.mark.parametrize('linear', [True, False])
@pytest.mark.parametrize('name', COCO)
def test_trainable_parameters_of_the_paper(build, name, linear):
    cfg = read(name)
    cfg.model.backbone.linear_pw_conv = linear
    backbone = build(cfg).backbone
    expected, update, method = COCO_CONFIGS[variant(name)]
    if method == 'tucker' and not linear:
        expected += 2 * 72  # two factors of 1 x 1 for every 1 x 1 kernel
    assert trainable(backbone) == expected
    rows = liera_mm.summary(backbone)
    adapters = sum(row.trainable for row in rows)
    assert adapters == (expected if update else 0)
    size = re.search('v2-([blh])_', name)[1]
    assert sum(p.numel() for p in backbone.parameters()) - adapters == BACKBONES[size]
    assert {row.update for row in rows} == {update} - {None}
    assert {row.method for row in rows if row.kind == 'depthwise'} == {method} - {None}
    assert len(rows) == (4 + (1 if method == 'atom' else 3) * 36 if update else 0)


@pytest.mark.parametrize('name', COCO + DIGITS)
def test_what_trains(build, name):
    cfg = read(name)
    model = build(cfg)
    for part in parts(model):
        assert trainable(part) == sum(p.numel() for p in part.parameters()) > 0
    trained = {key for key, p in model.backbone.named_parameters() if p.requires_grad}
    if 'full' in name or 'pretrain' in name:
        assert len(trained) == len(list(model.backbone.parameters()))
        assert type(model.backbone).__module__.startswith('mmpretrain.')
        assert cfg.custom_hooks == []
    else:
        assert isinstance(model.backbone, liera_mm.LieRAConvNeXt)
        assert cfg.custom_hooks[0] == dict(type='LieRAHook')
        assert cfg.custom_hooks[1:] == ([] if 'mini' in name else [dict(type='CUDAGraphHook')])
        assert bool(trained) != ('frozen' in name)
        assert all('.adapter.' in key for key in trained)


@pytest.mark.parametrize('name', DIGITS_CONFIGS)
def test_digits_compare_the_methods_of_coco(build, name):
    """Rank 4 in place of 16, and the same otherwise."""
    backbone = build(read(f'mask-rcnn_convnextv2-mini_{name}_digits')).backbone
    expected, update, method = DIGITS_CONFIGS[name]
    assert trainable(backbone) == expected
    rows = liera_mm.summary(backbone)
    assert len(rows) == (4 + 3 * 10 if update else 0)
    assert {row.update for row in rows} == {update} - {None}
    assert {row.method for row in rows if row.kind == 'depthwise'} == {method} - {None}
    assert {row.rank for row in rows} <= {4, None}
    if update:
        coco = read(f'mask-rcnn_convnextv2-b_{name}_r16').model.backbone.liera
        ours = backbone.liera
        assert ours['alpha'] == (ours['rank'] if 'alpha' in coco else ALPHA)  # which PiSSA's rank is
        assert (ours['method'], ours['update']) == (coco.get('method', 'lora'), coco.get('update', 'taylor'))
        assert ours['overrides'] == coco.get('overrides', [])


@pytest.mark.parametrize('name', COCO)
def test_coco_schedule(name):
    cfg = read(name)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, .05)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.auto_scale_lr.base_batch_size == 32
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('https://download.openmmlab.com/')
    assert cfg.custom_imports.imports == ['liera_mm']


@pytest.mark.parametrize('size', ['l', 'h'])
def test_larger_backbones_train_as_b(size):
    ours, reference = (read(f'mask-rcnn_convnextv2-{size}_liera_r16').to_dict() for size in (size, 'b'))
    arch = dict(l='large', h='huge')[size]
    assert ours['model']['backbone'].pop('arch') == arch
    assert reference['model']['backbone'].pop('arch') == 'base'
    assert f'convnext-v2-{arch}_3rdparty-fcmae_in1k' in ours['model']['backbone']['init_cfg']['checkpoint']
    for cfg in (ours, reference):
        assert cfg.pop('checkpoint') == cfg['model']['backbone']['init_cfg'].pop('checkpoint')
        assert cfg['model']['neck'].pop('in_channels') == ConvNeXt.arch_settings[
            arch if cfg is ours else 'base']['channels']
    assert ours.pop('runner_type') == 'FlexibleRunner' and ours.pop('strategy') == dict(type='FullyShardStrategy')
    assert ours == reference


def documented_traffic():
    rows = re.findall(r'^\| .*\(\.\./configs/(\S+)\.py\) \| ([\d,]+) \| ([\d,]+) \|$',
                      (CONFIGS.parent / 'docs/distributed.md').read_text(), re.MULTILINE)
    return [(name, *(int(number.replace(',', '')) for number in numbers)) for name, *numbers in rows]


def test_what_is_documented_about_traffic(build):
    """Gradients of all that trains, in single precision; engine/test_distributed.py shows that nothing else goes."""
    assert len(documented_traffic()) == 6
    for name, parameters, exchanged in documented_traffic():
        assert trainable(build(read(name))) == parameters == exchanged / 4


@pytest.mark.parametrize('name', COCO)
def test_coco_in_several_processes(name):
    wrapper = read(name).model_wrapper_cfg
    assert not wrapper.broadcast_buffers and not wrapper.get('find_unused_parameters', False)


@pytest.mark.parametrize('name', [name for name in DIGITS if name.endswith('digits')])
def test_digits_schedule(name):
    """All variants are compared on the same terms."""
    ours, reference = read(name).to_dict(), read('mask-rcnn_convnextv2-mini_frozen_digits').to_dict()
    for cfg in (ours, reference):
        for key in ('type', 'liera'):
            cfg['model']['backbone'].pop(key, None)
        cfg.pop('custom_hooks')
    assert ours == reference


@pytest.mark.parametrize('world', ['cells', 'trees'])
def test_transfer(build, world):
    """Full fine-tuning and LieRA differ in the backbone, whose pretrained layers are all in use, and in its rate alone."""
    full, liera = (read(f'faster-rcnn_mobilenetv2_{kind}_{world}') for kind in ('full', 'liera'))
    backbone = build(full).backbone
    assert trainable(backbone) == MOBILENET and type(backbone).__name__ == 'MobileNetV2'
    adapted = build(liera).backbone
    adapters = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert adapters and all('.adapter.' in key for key in adapters)
    assert sum(p.numel() for p in adapted.parameters()) - trainable(adapted) == MOBILENET
    assert {row.update for row in liera_mm.summary(adapted)} == {'taylor'} and len(liera_mm.summary(adapted)) == 52
    assert backbone.norm_eval and adapted.norm_eval and adapted.out_indices == backbone.out_indices == (1, 2, 4, 7)
    assert liera.custom_hooks == [dict(type='LieRAHook')] and full.custom_hooks == []
    ours, reference = liera.to_dict(), full.to_dict()
    assert reference['optim_wrapper']['paramwise_cfg'].pop('custom_keys') == {'backbone': {'lr_mult': .1}}
    for cfg in (ours, reference):
        cfg.pop('custom_hooks')
        cfg['model'].pop('backbone')
    assert ours == reference


def test_transfer_worlds_differ_in_data_and_classes_alone():
    cells, trees = (read(f'faster-rcnn_mobilenetv2_liera_{world}').to_dict() for world in ('cells', 'trees'))
    for cfg in (cells, trees):
        assert len(cfg.pop('classes')) == cfg['model']['roi_head']['bbox_head'].pop('num_classes')
        for key in ('data_root', 'train_pipeline', 'val_evaluator', 'test_evaluator', *(f'{split}_dataloader' for split in (
                'train', 'val', 'test'))):
            cfg.pop(key)
    assert cells == trees
    assert {name.rpartition('_')[2] for name in TRANSFER} == {'cells', 'trees'} and len(TRANSFER) == 4
