"""What the tools check before they start: every problem ends in two lines, what is wrong and what to do."""
import argparse
import errno
import functools
import http.server
import os
import re
import shutil
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch.nn import Linear

from liera_mm.core.checkpoint import write_atomically
from liera_mm.core.errors import SetupError
from liera_mm.engine import cli

ROOT = Path(__file__).parents[2]
COCO = 'configs/mask-rcnn_convnextv2-b_liera_r16.py'
DIGITS = 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
LATIN, CYRILLIC = 'aeiopcxy', '\u0430\u0435\u0456\u043e\u0440\u0441\u0445\u0443'


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def problem_of(function, *args):
    """The two lines of the SetupError that a call raises."""
    with pytest.raises(SetupError) as error:
        function(*args)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and all(lines)
    return lines


# Configs

@pytest.mark.parametrize('letters', ['a', LATIN])
@pytest.mark.parametrize('config', [COCO, DIGITS, str(ROOT / COCO)], ids=['coco', 'digits', 'absolute'])
def test_lookalike_letters(capsys, config, letters):
    folder, name = os.path.split(config)
    path = os.path.join(folder, name.translate(str.maketrans(LATIN, CYRILLIC)) if letters == LATIN else
                        name.replace('liera', 'lier\u0430'))
    assert cli.find_config(path) == config
    assert capsys.readouterr().out == f'{path} has letters that only look like Latin ones; reading {config}\n'
    assert cli.load_config(path).model.backbone.liera['update'] == 'taylor'


def test_folders_with_other_letters(tmp_path, capsys):
    """A folder that really has the letters must not be looked for under another name."""
    (tmp_path / '\u043e\u043f\u044b\u0442\u044b').mkdir()
    config = tmp_path / '\u043e\u043f\u044b\u0442\u044b' / 'liera.py'
    config.write_text('')
    assert cli.find_config(str(config)) == str(config)
    assert capsys.readouterr().out == ''
    assert cli.find_config(str(config.with_name('lier\u0430.py'))) == str(config)


@pytest.mark.parametrize('path, closest', [
    ('configs/mask-rcnn_convnextv2-b_liera_r61.py', COCO),
    ('configs/mask-rcnn_convnextv2-b_lier\u0430_r61.py', COCO),
    ('config/mask-rcnn_convnextv2-b_liera_r16.py', COCO),
    ('mask-rcnn_convnextv2-b_liera_r16.py', COCO),
    ('configs/digits/mask-rcnn_convnextv2-mini_liera.py', DIGITS),
    (str(ROOT / 'configs/mask-rcnn_convnextv2-b_liera_r15.py'), str(ROOT / COCO)),
])
def test_closest_configs(path, closest):
    problem, remedy = problem_of(cli.find_config, path)
    assert problem == f'Config not found: {path}'
    assert closest in remedy.removeprefix('The closest ones are ').split(', ')


@pytest.mark.parametrize('path', ['', '.', 'configs'])
def test_no_file_at_all(path):
    assert problem_of(cli.find_config, path)[0] == f'Config not found: {path}'


@pytest.mark.parametrize('config', [COCO, DIGITS])
@pytest.mark.parametrize('root', ['/somewhere/else', '/somewhere/else/'])
def test_data_root_moves_every_path(config, root):
    before, cfg = cli.load_config(config), cli.load_config(config, {'data_root': root, 'train_cfg.max_epochs': 1})
    old = before.data_root
    assert old in before.pretty_text and old not in cfg.pretty_text
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == cfg.data_root == '/somewhere/else/'
        assert dataset.ann_file == before[f'{split}_dataloader'].dataset.ann_file
    for split in ('val', 'test'):
        assert cfg[f'{split}_evaluator'].ann_file == '/somewhere/else/annotations/instances_val2017.json'
    assert cfg.train_cfg.max_epochs == 1
    assert cfg.filename == before.filename


def test_config_without_data_root(tmp_path):
    (tmp_path / 'config.py').write_text('model = dict()')
    assert 'has no data_root' in problem_of(cli.load_config, str(tmp_path / 'config.py'), {'data_root': 'x'})[0]


EDIT = re.search("```python\n(_base_ = 'mmdet::.*?)```", (ROOT / 'README.md').read_text(), re.S)[1]


@pytest.mark.parametrize('base, hooks', [
    ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco', []),
    ('rtmdet/rtmdet_tiny_8xb32-300e_coco', ['EMAHook', 'PipelineSwitchHook']),
    ('yolox/yolox_s_8xb8-300e_coco', ['YOLOXModeSwitchHook', 'SyncNormHook', 'EMAHook'])])
def test_the_edit_keeps_the_hooks_of_its_base(tmp_path, base, hooks):
    path = tmp_path / 'config.py'
    path.write_text(EDIT.replace('faster_rcnn/faster-rcnn_r50_fpn_1x_coco', base))
    cfg = cli.load_config(str(path))
    cli.check_hook(cfg)
    assert [hook.type for hook in cfg.get('custom_hooks', [])] == hooks
    assert {'checkpoint', 'logger'} < cfg.default_hooks.keys()


def test_the_edit_keeps_the_imports_of_its_base(tmp_path, monkeypatch):
    """MMEngine imports the last list alone; what MMEngine reads in the work dir has all of them."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('own_neck', 'own_head'):
        (tmp_path / f'{name}.py').write_text('from mmdet.models import FPN\nfrom mmdet.registry import MODELS\n'
                                             f"MODELS.register_module('{name}', module=type('{name}', (FPN, ), {{}}))")
    (tmp_path / 'first.py').write_text("custom_imports = dict(imports=['own_neck', 'not_there'])\nmodel = dict(backbone={})")
    (tmp_path / 'second.py').write_text("_base_ = 'first.py'\ncustom_imports = dict(imports='own_head')")
    path = tmp_path / 'config.py'
    path.write_text(re.sub("'mmdet::.*'", "'second.py'", EDIT))
    assert cli.load_config(str(path)).custom_imports.imports == ['liera_mm', 'own_neck', 'own_head']
    assert {'own_neck', 'own_head'} <= MODELS.children['mmdet'].module_dict.keys()


@pytest.mark.parametrize('right, wrong, problem, remedy', [
    ('rank=8)))', 'rank=8))', 'line .*, cannot be read: SyntaxError: ', 'Correct it'),
    ('r50_fpn_1x', 'r50_fpn_1', 'cannot be read: FileNotFoundError: .*faster-rcnn_r50_fpn_1_coco.py',
     'The closest ones are .*/faster-rcnn_r50_fpn_1x_coco.py'),
    ('mmdet::', 'mmdett::', 'cannot be read: .*mmdett', 'Correct it'),
    ("'mmdet::", "'nowhere/", 'cannot be read: FileNotFoundError: .*nowhere', 'Correct it'),
    ("'liera_mm'", "'liera_mn'", "cannot be read: ImportError: .*'liera_mn'.* No module named 'liera_mn'$",
     'Correct it, or install it.* PYTHONPATH'),
    ("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'",
     "_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'mmdet::_base_/datasets/coco_detection.py']",
     'cannot be read: KeyError: .*Duplicate key', 'Take one of the bases for the base of another'),
    ('rank=8', 'rank=r', "line 3, cannot be read: NameError: name 'r' is not defined", 'Correct it'),
    ('_base_.model.backbone', '_base_.model.backbon', "cannot be read: KeyError: 'backbon'", 'The base has no such part'),
    ('_base_ =', 'base =', "cannot be read: KeyError: 'model'", 'The base has no such part'),
])
def test_slips_in_the_edit(tmp_path, right, wrong, problem, remedy):
    assert right in EDIT
    path = tmp_path / 'config.py'
    path.write_text(EDIT)
    assert cli.load_config(str(path)).model.backbone.backbone.type == 'ResNet'
    path.write_text(EDIT.replace(right, wrong))
    lines = problem_of(cli.load_config, str(path))
    assert lines[0].startswith(str(path))
    assert re.search(problem, lines[0]) and re.match(remedy, lines[1]), lines


@pytest.mark.parametrize('given, in_config, expected', [
    ('a', 'b', 'a'), (None, 'b', 'b'), (None, None, 'work_dirs/config')])
def test_work_dir(tmp_path, given, in_config, expected):
    (tmp_path / 'config.py').write_text(f'work_dir = {in_config!r}' if in_config else '')
    args = argparse.Namespace(
        config=str(tmp_path / 'config.py'), cfg_options=None, work_dir=given, launcher='none', local_rank=0)
    assert cli.config_of(args).work_dir == expected


# Data

PURE = """
from mmengine.config import read_base
with read_base():
    from .base import *
from liera_mm import LieRABackbone, LieRAHook
""" + re.search('```python\n(model.backbone = .*?)```', (ROOT / 'README.md').read_text(), re.S)[1]


@pytest.fixture
def pure(tmp_path):
    """A function that reads a pure Python-style config with the edit."""
    (tmp_path / 'base.py').write_text('from mmdet.models import FasterRCNN, ResNet\ndefault_hooks = dict()\n'
                                      'model = dict(type=FasterRCNN, backbone=dict(type=ResNet, depth=18))')

    def load(text):
        (tmp_path / 'config.py').write_text(text)
        return cli.load_config(str(tmp_path / 'config.py'))

    return load


def test_the_edit_in_pure_python(pure):
    cfg = pure(PURE)
    cli.check_hook(cfg)
    backbone = cfg.model.backbone
    assert backbone.type is MODELS.get('LieRABackbone') and backbone.backbone.type is MODELS.get('mmdet.ResNet')
    assert backbone.backbone.depth == 18 and backbone.liera == dict(rank=8)


@pytest.mark.parametrize('right, wrong, problem, remedy', [
    ('LieRABackbone', 'LieraBackbone', 'Failed to import LieraBackbone from liera_mm', 'The closest ones are LieRABackbone'),
    ('import LieRABackbone', 'import Nothing, LieRABackbone', '', ''),  # which is not used
    ('from liera_mm', 'from liera_nn', "'liera_nn'", 'Correct it, or install it'),
    ('model.backbone = dict(type=LieRABackbone, backbone=model.backbone, liera=dict(rank=8))',
     'model.update(dict(backbone=dict(_delete_=True, type=LieRABackbone, backbone=model.backbone)))', 'RecursionError',
     'A part of it holds itself: .* write model.backbone = ')])
def test_slips_in_pure_python(pure, right, wrong, problem, remedy):
    assert right in PURE
    if not problem:
        pure(PURE.replace(right, wrong))
        return
    lines = problem_of(pure, PURE.replace(right, wrong))
    assert re.search(f'cannot be read: .*{problem}', lines[0]) and re.match(remedy, lines[1]), lines


@pytest.fixture
def data(tmp_path, digits):
    return shutil.copytree(digits, tmp_path / 'data')


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('path', ['annotations/instances_{}2017.json', '{}2017'])
def test_missing_data(data, split, path):
    cfg = cli.load_config(DIGITS, dict(data_root=str(data)))
    cli.check_data(cfg, ['train', 'val', 'test'])
    path = data / path.format('train' if split == 'train' else 'val')
    path.rename(data / 'elsewhere')
    problem, remedy = problem_of(cli.check_data, cfg, [split])
    assert problem.startswith(f'The {split} data set is missing: ')
    assert Path(problem.partition(': ')[2]) == path
    assert f'--cfg-options data_root=FOLDER (now {data}/)' in remedy
    cli.check_data(cfg, ['val' if split == 'train' else 'train'])


@pytest.mark.parametrize('wrap', [
    lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
    lambda dataset: dict(type='ConcatDataset', datasets=[dataset]),
    lambda dataset: dict(type='ClassBalancedDataset', dataset=dict(type='ConcatDataset', datasets=[dataset, dataset])),
], ids=['repeat', 'concat', 'nested'])
def test_missing_data_below_wrappers(tmp_path, digits, wrap):
    for root, complete in ((digits, True), (tmp_path, False)):
        cfg = cli.load_config(DIGITS, dict(data_root=str(root)))
        cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
        if complete:
            cli.check_data(cfg, ['train'])
        else:
            assert 'train data set is missing' in problem_of(cli.check_data, cfg, ['train'])[0]


# Weights

def with_weights(source):
    return Config(dict(model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=str(source))))))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """URL of a server of an empty folder; torch's downloads are elsewhere."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    (tmp_path / 'served').mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=tmp_path / 'served')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_missing_weights_of_a_class(tmp_path):
    """As pure Python-style configs have it, with types of their own."""
    cfg = with_weights(tmp_path / 'base.pth')
    cfg.model.backbone.init_cfg.type = PretrainedInit
    assert problem_of(cli.check_weights, cfg)[0] == f'Weights not found: {tmp_path}/base.pth'


def test_missing_weights(tmp_path):
    problem, remedy = problem_of(cli.check_weights, with_weights(tmp_path / 'base.pth'))
    assert problem == f'Weights not found: {tmp_path}/base.pth'
    assert '--cfg-options model.backbone.init_cfg.checkpoint=FILE' in remedy
    (tmp_path / 'base.pth').touch()
    cli.check_weights(with_weights(tmp_path / 'base.pth'))


def test_missing_weights_of_a_backbone_that_takes_them_without_a_type(tmp_path):
    """As PVT and Swin do."""
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py'")
    cfg = cli.load_config(str(config), {'model.backbone.init_cfg.checkpoint': 'nowhere.pth'})
    assert problem_of(cli.check_weights, cfg)[0] == 'Weights not found: nowhere.pth'


def test_missing_load_from(tmp_path):
    cfg = Config(dict(model=dict(), load_from=str(tmp_path / 'all.pth')))
    assert '--cfg-options load_from=FILE' in problem_of(cli.check_weights, cfg)[1]


def test_missing_checkpoint_to_resume_from(tmp_path):
    """Those beside it are named."""
    (tmp_path / 'epoch_1.pth').touch()
    cfg = Config(dict(model=dict(), load_from=str(tmp_path / 'epoch_2.pth'), resume=True))
    problem, remedy = problem_of(cli.check_weights, cfg)
    assert problem == f'Checkpoint not found: {tmp_path}/epoch_2.pth' and f'{tmp_path}/epoch_1.pth' in remedy


def test_weights_deep_in_the_model(tmp_path):
    init_cfg = [dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint='nowhere.pth')]
    cfg = Config(dict(model=dict(roi_head=dict(bbox_head=[dict(init_cfg=init_cfg)]))))
    remedy = problem_of(cli.check_weights, cfg)[1]
    key = re.search('--cfg-options (.*)=FILE', remedy)[1]
    cfg.merge_from_dict({key: str(tmp_path)})  # the remedy must be one
    assert cfg.model.roi_head.bbox_head[0].init_cfg[1].checkpoint == str(tmp_path)


def test_weights_that_others_resolve():
    for source in ('liera://mask-rcnn_convnextv2-mini_glyphs', 'torchvision://resnet50', 'open-mmlab://resnet50'):
        cli.check_weights(with_weights(source))


def test_weights_behind_a_url(server, tmp_path):
    problem, remedy = problem_of(cli.check_weights, with_weights(f'{server}/base.pth'))
    assert problem == f'Pretrained weights cannot be downloaded (HTTP 404): {server}/base.pth'
    assert '--cfg-options model.backbone.init_cfg.checkpoint=FILE' in remedy
    (tmp_path / 'served/base.pth').touch()
    cli.check_weights(with_weights(f'{server}/base.pth'))


def test_unreachable_weights(server, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as closed:
        url = f'http://127.0.0.1:{closed.getsockname()[1]}/base.pth'
    assert re.fullmatch(rf'Pretrained weights cannot be downloaded \(.*refused.*\): {url}',
                        problem_of(cli.check_weights, with_weights(url))[0])
    cached = tmp_path / 'torch/hub/checkpoints/base.pth'
    cached.parent.mkdir(parents=True)
    cached.touch()
    cli.check_weights(with_weights(url))


# Checkpoints

def test_missing_checkpoint(tmp_path):
    problem, remedy = problem_of(cli.check_checkpoint, str(tmp_path / 'epoch_13.pth'))
    assert problem == f'Checkpoint not found: {tmp_path}/epoch_13.pth'
    assert remedy == 'Give a checkpoint that tools/train.py wrote'
    (tmp_path / 'epoch_12.pth').touch()
    assert str(tmp_path / 'epoch_12.pth') in problem_of(cli.check_checkpoint, str(tmp_path / 'epoch_13.pth'))[1]
    cli.check_checkpoint(str(tmp_path / 'epoch_12.pth'))


class Refuses:
    """A class of the user, who wants to see where it fails."""

    def __init__(self):
        raise ValueError('not like this')


@pytest.mark.parametrize('fails', [
    lambda: MODELS.build(dict(type=Refuses)),
    lambda: MODELS.build(dict(type='mmdet.SingleStageDetector', backbone=dict(type=Refuses))),
    lambda: 1 / 0,
], ids=['built', 'within what is built', 'not built'])
def test_tracebacks_of_other_code_are_seen(fails):
    with pytest.raises((ValueError, ZeroDivisionError)):
        cli.exit_clearly(fails)


@pytest.mark.parametrize('option, epoch, fails, ends', [
    ('model.neck', 0, lambda: Linear(2, 2)(torch.ones(3)), SystemExit),
    ('model.neck', 1, lambda: Linear(2, 2)(torch.ones(3)), RuntimeError),
    ('model.neck', 0, lambda: Refuses(), ValueError),
    ('model.init_cfg', 0, lambda: Linear(2, 2)(torch.ones(3)), RuntimeError),
    ('param_scheduler', 0, lambda: Linear(2, 2)(torch.ones(3)), RuntimeError),
], ids=['first epoch', 'second epoch', 'in code of the user', 'no part of the config', 'a part that the Runner built'])
def test_options_that_explain_an_error(option, epoch, fails, ends):

    def main():
        args = argparse.Namespace(config=DIGITS, cfg_options={option: None})
        runner = SimpleNamespace(message_hub=MessageHub('test'))
        runner.message_hub.update_info('epoch', epoch)
        assert args and runner
        fails()

    with pytest.raises(ends) as end:
        cli.exit_clearly(main)
    if ends is SystemExit:
        problem, remedy = end.value.code.splitlines()
        assert problem.startswith('RuntimeError in torch.nn.modules.linear: ') and 'mat1 and mat2' in problem
        assert 'model.neck=None where the config has a dict' in remedy


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(('fails', 'problem'), [
    (lambda folder: (folder / 'file/x.json').write_text(''), '{}/file/x.json: Not a directory'),
    (lambda folder: (folder / 'none/x.json').write_text(''), '{}/none/x.json: No such file or directory'),
    (lambda folder: (folder / 'file').mkdir(), '{}/file: File exists'),
    (lambda folder: write_atomically(folder, b''), '{}: Is a directory'),
    (lambda folder: disk_is_full(), 'No space left on device'),
    (lambda folder: CheckpointLoader.load_checkpoint(f'{folder}/none.pth'), '{}/none.pth can not be found.'),
], ids=range(6))
def test_files_that_the_system_refuses(tmp_path, fails, problem):
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as end:
        cli.exit_clearly(lambda: fails(tmp_path))
    first, second = end.value.code.splitlines()
    assert first == problem.format(tmp_path) and second


def test_what_openmmlab_refuses_to_build():
    with pytest.raises(SystemExit) as end:
        cli.exit_clearly(lambda: MODELS.build(dict(type='mmdet.ResNet', depth=7)))
    assert end.value.code.splitlines()[0] == 'The mmdet.ResNet of the config cannot be built: invalid depth 7 for resnet'


@pytest.mark.parametrize('value', [None, 'AnchorGenerator', dict(scales=[8])], ids=str)
def test_what_is_no_part_of_a_model_is_named(value):
    """Also in a config, where no option set it."""
    head = dict(type='mmdet.RPNHead', num_classes=1, in_channels=4, anchor_generator=value)
    with pytest.raises(SystemExit) as end:
        cli.exit_clearly(lambda: MODELS.build(head))
    problem, remedy = end.value.code.splitlines()
    assert problem == f'The RPNHead of the config has anchor_generator={value!r}, where a dict with a type belongs'
    assert remedy == 'Write anchor_generator=dict(type=...)'


@pytest.mark.parametrize('init_cfg', [None, [dict(type='Normal', layer='Conv2d')]])
def test_a_type_that_other_code_lacks_is_not_that_of_an_init_cfg(init_cfg):

    class Part(BaseModule):

        def init_weights(self):
            raise KeyError('type')

    model = BaseModule(init_cfg=init_cfg)
    model.part = Part()
    with pytest.raises(KeyError):
        cli.exit_clearly(model.init_weights)
