"""Names in a config that nothing reads: what is misspelt or of another class is refused, and nothing else is."""
import functools
from pathlib import Path

import pytest
from mmengine.config import Config

from liera_mm.core.errors import SetupError
from liera_mm.engine import cli
from liera_mm.engine.names import check_names
from liera_mm.engine.options import merge_options

DIGITS = str(Path(__file__).parents[2] / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py')
PARAMWISE = 'optim_wrapper.paramwise_cfg'


@functools.cache
def read():
    return cli.load_config(DIGITS).to_dict()


def check(options):
    cfg = Config(read())
    merge_options(cfg, options)
    check_names(cfg)


@pytest.mark.parametrize('key, meant', [
    ('model.test_cfg.rcnn.score_th', 'rcnn.score_thr'), ('model.test_cfg.rcnn.score_trh', 'rcnn.score_thr'),
    ('model.train_cfg.rpn.alowed_border', 'rpn.allowed_border'), ('model.train_cfg.rpnn', 'rpn'),
    ('model.backbone.arch.depth', 'arch.depths'), ('train_dataloader.dataset.metainfo.clases', 'metainfo.classes'),
    ('train_dataloader.dataset.data_prefix.imgs', 'img'), ('train_dataloader.dataset.filter_cfg.min_sizes', 'min_size'),
    ('val_dataloader.dataset.filter_cfg.filter_empty', 'filter_empty_gt'),
    ('auto_scale_lr.enabled', 'enable'), ('env_cfg.cudnn_benchmrk', 'cudnn_benchmark'),
    ('env_cfg.mp_cfg.opencv_threads', 'opencv_num_threads'),
    (f'{PARAMWISE}.norm_decay_mul', 'norm_decay_mult'), (f'{PARAMWISE}.norm_lr_mult', 'norm_decay_mult'),
    (f'{PARAMWISE}.custom_key', 'custom_keys'), (f'{PARAMWISE}.layer_decay_rate', 'it reads bias_lr_mult'),
    (f'{PARAMWISE}.custom_keys.backbone.lr_mul', 'lr_mult'), (f'{PARAMWISE}.custom_keys.backbone.decay_mul', 'decay_mult'),
    ('default_hooks.checkpoint.intervall', 'interval'), ('default_hooks.checkpoint.save_bets', 'save_best'),
])
def test_misspelt(key, meant):
    with pytest.raises(SetupError, match=key.rpartition('.')[2]) as error:
        check({key: 1})
    assert meant in str(error.value)


def test_of_another_constructor():
    """MMDetection's reads three settings, and those alone; mmpretrain's no rates of keys."""
    layers = {'optim_wrapper.constructor': 'LearningRateDecayOptimizerConstructor',
              PARAMWISE: dict(_delete_=True, num_layers=4, decay_rate=.9, decay_type='stage_wise')}
    check({**layers, f'{PARAMWISE}.bypass_duplicate': True, f'{PARAMWISE}.bias_decay_mult': 0.})
    with pytest.raises(SetupError, match='custom_keys, which LearningRateDecayOptimizerConstructor does not read'):
        check({**layers, f'{PARAMWISE}.custom_keys': dict(norm=dict(decay_mult=0.))})

    layers = {'optim_wrapper.constructor': 'LearningRateDecayOptimWrapperConstructor', f'{PARAMWISE}.layer_decay_rate': .9}
    check({**layers, f'{PARAMWISE}.custom_keys.norm.decay_mult': 0.})
    with pytest.raises(SetupError, match='custom_keys.norm.lr_mult, which LearningRateDecayOptimWrapperConstructor does'):
        check({**layers, f'{PARAMWISE}.custom_keys.norm.lr_mult': .1})


@pytest.mark.parametrize('options', [
    {f'{PARAMWISE}.custom_keys': {'adapter': dict(lr_mult=.5, betas=(.9, .99)), 'adapters': dict(lr=1e-3)}},
    {f'{PARAMWISE}.custom_keys.adapter.A.lr_mult': .5},
    {f'{PARAMWISE}.custom_keys.backbone': dict(lr=.1, weight_decay=0., wd_mult=.9)},
    {'optim_wrapper.constructor': 'MyConstructor', f'{PARAMWISE}.norm_lr_mult': .5},
    {'default_hooks.checkpoint': dict(save_best='auto', rule='greater', published_keys=['meta'], priority='LOW')},
    {'default_hooks.checkpoint': None}, {'env_cfg.resource_limit': 8192, 'env_cfg.dist_cfg.timeout': 60},
    {'train_dataloader.dataset.filter_cfg': dict(min_size=8, bbox_min_size=3)},
    {'train_dataloader.dataset.data_prefix.img2': 'other/'}, {'model.test_cfg.rcnn.nms.split_thr': 1000},
    {'model.train_cfg.rcnn.sampler2': dict(type='RandomSampler')},
], ids=str)
def test_what_is_read_or_may_be(options):
    check(options)
