"""Checkpoints of torch are pickles: what is in them does not run, unless the one who made them is trusted."""
import builtins
import io
import os
import pickle
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from liera_mm.core.errors import SetupError
from liera_mm.engine.safe_loading import TRUST, read_checkpoint

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

ROOT = Path(__file__).parents[2]


def refused(run, message):
    with pytest.raises(SetupError, match=message) as error:
        run()
    assert len(str(error.value).splitlines()) == 2
    return str(error.value)


class Runs:
    """Leaves a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file), )


def reaches_eval(file):
    """A pickle that gets at eval() through getattr, which MMEngine counts among the safe functions.

    It replaces len() by eval(): whoever asks for the length of a text that came with it runs the text.
    """
    code = b'\x80\x02cbuiltins\ngetattr\n'
    history = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'

    def attribute(of, name):
        return code[2:] + of + b'X' + len(name).to_bytes(4, 'little') + name + b'\x86R'

    builtins = attribute(attribute(history, b'update'), b'__builtins__')
    evaluate = attribute(attribute(b'cbuiltins\ngetattr\n', b'__self__'), b'eval')
    return b'\x80\x02' + builtins + b'X\x03\x00\x00\x00len' + evaluate + b's.'


def save_malicious(path, kind, file):
    buffer = io.BytesIO()
    torch.save(dict(state_dict=Runs(file), meta=dict(epoch=1, iter=2)), buffer,
               _use_new_zipfile_serialization=kind != 'legacy', pickle_protocol=4 if kind == 'protocol 4' else 2)
    data = buffer.getvalue()
    if kind == 'plain pickle':
        data = pickle.dumps(Runs(file))
    elif kind == 'getattr':
        source, out = io.BytesIO(), io.BytesIO()
        torch.save(0, source)
        with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, 'w') as copy:
            for entry in archive.infolist():
                copy.writestr(entry, reaches_eval(file) if entry.filename.endswith('data.pkl') else archive.read(entry))
        data = out.getvalue()
    Path(path).write_bytes(data)
    return str(path)


KINDS = ['zip', 'legacy', 'protocol 4', 'plain pickle', 'getattr']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', ['read_checkpoint', 'CheckpointLoader', 'buffer'])
def test_no_code_runs(tmp_path, kind, how):
    path, length = save_malicious(tmp_path / 'bad.pth', kind, tmp_path / 'ran'), len
    load = {
        'read_checkpoint': lambda: read_checkpoint(path),
        'CheckpointLoader': lambda: CheckpointLoader.load_checkpoint(path),
        'buffer': lambda: read_checkpoint(io.BytesIO(Path(path).read_bytes()))
    }
    refused(load[how], 'was refused: loading it could run code|no checkpoint, or a damaged one')
    assert not (tmp_path / 'ran').exists() and len is length


@pytest.mark.skipif(not hasattr(mmengine_checkpoint, 'get_torch_safe_globals'), reason='this MMEngine has no such list')
def test_why_the_list_of_mmengine_is_not_used(tmp_path):
    path = save_malicious(tmp_path / 'bad.pth', 'getattr', None)
    length = builtins.len
    try:
        with torch.serialization.safe_globals(mmengine_checkpoint.get_torch_safe_globals()):
            torch.load(path, weights_only=True)
        replaced = builtins.len
    finally:
        builtins.len = length
    assert replaced is eval


@pytest.mark.parametrize('scheme', ['http://host/', 'https://host/', 'torchvision://', 'openmmlab://', 'open-mmlab://',
                                    'mmcls://', 's3://', 'petrel://', 'pavi://', 'modelzoo://', ''])
def test_all_of_mmengines_schemes_are_ours(scheme):
    loader = CheckpointLoader._get_checkpoint_loader(f'{scheme}file.pth')
    assert loader.__module__ == 'liera_mm.engine.safe_loading'


def test_no_other_scheme_is_left():
    modules = {loader.__module__ for loader in CheckpointLoader._schemes.values()}
    assert modules == {'liera_mm.engine.safe_loading', 'liera_mm.models.weight_files'}


@pytest.mark.parametrize('given_as', ['load_from', 'resume', 'init_cfg', 'test'])
def test_no_code_runs_in_a_runner(make_runner, tmp_path, given_as):
    path = save_malicious(tmp_path / 'bad.pth', 'zip', tmp_path / 'ran')
    options = {'model.backbone.init_cfg.checkpoint': path} if given_as == 'init_cfg' else {'load_from': path}
    runner = make_runner(**options, resume=given_as == 'resume')
    message = refused(runner.test if given_as == 'test' else runner.train,
                      'bad.pth was refused: loading it could run code .*posix.mkdir')
    assert f'set the environment variable {TRUST}=1' in message
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('command', [
    ['test.py', '{config}', '{bad}', '--work-dir', '{out}'],
    ['merge.py', '{config}', '{bad}', '{out}/plain.pth'],
    ['extract.py', '{config}', '{bad}', '{out}/adapter.pth'],
    ['train.py', '{config}', '--resume', '{bad}', '--work-dir', '{out}'],
    ['train.py', '{config}', '--work-dir', '{out}', '--cfg-options', 'load_from={bad}'],
    ['train.py', '{config}', '--work-dir', '{out}', '--cfg-options', 'model.backbone.init_cfg.checkpoint={bad}'],
], ids=lambda command: ' '.join(command)[:60])
def test_no_code_runs_in_a_tool(digits, tmp_path, monkeypatch, command):
    bad = save_malicious(tmp_path / 'bad.pth', 'zip', tmp_path / 'ran')
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = '{ROOT}/configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'\n"
                      f"experiment_name = '{tmp_path.name}'")
    words = [word.format(config=config, bad=bad, out=tmp_path / 'out') for word in command]
    if command[0] in ('test.py', 'train.py'):
        words += [*([] if '--cfg-options' in words else ['--cfg-options']), f'data_root={digits}']
    monkeypatch.setattr(sys, 'argv', words)
    main = runpy.run_path(str(ROOT / 'tools' / command[0]))['main']
    refused(main, 'bad.pth was refused: loading it could run code .*posix.mkdir')
    assert not (tmp_path / 'ran').exists()


def test_a_file_that_is_trusted(tmp_path, monkeypatch):
    path = save_malicious(tmp_path / 'good.pth', 'zip', tmp_path / 'ran')
    monkeypatch.setenv(TRUST, 'yes')
    refused(lambda: read_checkpoint(path), 'was refused')
    monkeypatch.setenv(TRUST, '1')
    read_checkpoint(path)
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16', 'int64', 'uint8', 'bool', 'complex64', 'S3', 'U3',
                                   'M8[s]'])
def test_what_mmengine_writes_needs_no_trust(tmp_path, dtype):
    history, array = HistoryBuffer(), np.arange(3).astype(dtype)
    history.update(1.5)
    content = dict(array=array, number=array[1], nothing=array[:0], log=history, names=('a', 'b'), part=slice(0, 1),
                   values=[{1, 2}, frozenset('a'), 1j, range(3), b'ab', b''],
                   dataset_meta=ConfigDict(classes=('a', ), parts=dict(a=1)))  # a metainfo of a config
    torch.save(content, tmp_path / 'checkpoint.pth')
    ours = read_checkpoint(tmp_path / 'checkpoint.pth')
    assert np.array_equal(ours['array'], array) and ours['number'] == array[1] and ours['nothing'].shape == (0, )
    assert ours['array'].dtype == ours['nothing'].dtype == array.dtype
    assert ours['log'].current() == 1.5 and ours['log'].statistics('mean') == 1.5
    for name in ('names', 'part', 'values', 'dataset_meta'):
        assert ours[name] == content[name]


class Mine:
    """An object of a user."""


@pytest.mark.parametrize('content, name', [
    (Mine(), 'Mine'), (Mine, 'Mine'), (refused, 'refused'), (torch.nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'),
    (Path('file'), 'Path'), (np.random.default_rng(0), 'generator_ctor'),
    (np.array([1, None]), 'ObjectDType')])  # whose state can point anywhere in memory
@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_another_object_is_named(tmp_path, content, name, kind):
    torch.save(dict(state_dict={}, mine=content), tmp_path / 'file.pth', _use_new_zipfile_serialization=kind == 'zip')
    refused(lambda: read_checkpoint(tmp_path / 'file.pth'), rf'file.pth was refused: .*\([\w.]*{name}\)\.')


def test_another_archive_is_no_checkpoint(tmp_path):
    np.savez(tmp_path / 'file.npz', np.ones(3))
    refused(lambda: read_checkpoint(tmp_path / 'file.npz'), 'file.npz is no checkpoint, or a damaged one')


@pytest.mark.parametrize('text', [b'<!DOCTYPE html><html>', b'version https://git-lfs', b'{}', b'\x89PNG\r\n'])
def test_what_is_no_file_of_torch_is_said_to_begin_otherwise(tmp_path, text):
    (tmp_path / 'weights.pth').write_bytes(text)
    for file in (tmp_path / 'weights.pth', io.BytesIO(text)):
        message = refused(lambda file=file: read_checkpoint(file), 'is no checkpoint, or a damaged one: it begins with b')
        assert repr(text[:20]) in message


def test_an_empty_file_is_no_checkpoint(tmp_path):
    (tmp_path / 'weights.pth').touch()
    refused(lambda: read_checkpoint(tmp_path / 'weights.pth'), 'weights.pth is no checkpoint, or a damaged one: it is empty')
