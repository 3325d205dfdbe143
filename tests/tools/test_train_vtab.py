"""Classification on a small data set in the layout of VTAB-1k: what is checked before a run, and the run."""
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image

import liera_mm  # noqa: F401
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data, load_config

CONFIG = 'configs/vtab/convnextv2-b_liera_r2.py'
COLOURS = [(150, 0, 0), (0, 150, 0), (0, 0, 150), (150, 150, 0)]  # of the four classes that kitti has


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folder with the task kitti: 16 images to train on, 8 to validate on, 12 to test on of which 3 have a wrong label."""
    root, random = tmp_path_factory.mktemp('vtab'), np.random.default_rng(0)
    (root / 'kitti/images').mkdir(parents=True)

    def make(split, count, wrong=0):
        lines = []
        for i in range(count):
            label = i % 4
            pixels = random.integers(0, 80, (10, 12, 3)) + COLOURS[label]
            Image.fromarray(pixels.astype(np.uint8)).save(root / f'kitti/images/{split}_{i}.png')
            lines.append(f'images/{split}_{i}.png {(label + (i < wrong)) % 4}\n')
        return ''.join(lines)

    train, val, test = make('train', 16), make('val', 8), make('test', 12, wrong=3)
    for name, lines in dict(train800=train, val200=val, train800val200=train + val, test=test).items():
        (root / f'kitti/{name}.txt').write_text(lines)
    return root


# What is checked before a run

def problem_of(data, splits=('train', 'val', 'test'), **options):
    """The two lines of the SetupError that check_data raises."""
    with pytest.raises(SetupError) as error:
        check_data(load_config(CONFIG, dict(data_root=str(data), task='kitti', **options)), splits)
    problem, remedy = str(error.value).splitlines()
    return problem, remedy


@pytest.mark.parametrize('protocol', ['final', 'search'])
def test_complete_data(data, protocol):
    check_data(load_config(CONFIG, dict(data_root=str(data), task='kitti', protocol=protocol)), ['train', 'val', 'test'])


@pytest.mark.parametrize('protocol, split, file', [
    ('final', 'train', 'train800val200'), ('final', 'val', 'test'), ('final', 'test', 'test'),
    ('search', 'train', 'train800'), ('search', 'val', 'val200'), ('search', 'test', 'val200'),
])
def test_missing_split_file(data, tmp_path, protocol, split, file):
    copy = shutil.copytree(data, tmp_path / 'vtab')
    (copy / f'kitti/{file}.txt').unlink()
    problem, remedy = problem_of(copy, [split], protocol=protocol)
    assert problem == f'The {split} data set is missing: {copy}/kitti/{file}.txt'
    assert f'--cfg-options data_root=FOLDER (now {copy}/)' in remedy


def test_missing_task(data):
    problem, _ = problem_of(data / 'elsewhere')
    assert problem == f'The train data set is missing: {data}/elsewhere/kitti/train800val200.txt'


@pytest.mark.parametrize('line', ['images/test_3.png 4', 'images/test_3.png -1', 'images/test_3.png x', 'test_3.png', ''])
def test_wrong_line(data, tmp_path, line):
    copy = shutil.copytree(data, tmp_path / 'vtab')
    file = copy / 'kitti/test.txt'
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([*lines[:3], line, *lines[4:], '']))
    problem, _ = problem_of(copy)
    assert problem == f'{file}, line 4: {line!r} is not an image and a label from 0 to 3'


def test_image_that_is_listed_but_not_there(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / 'vtab')
    (copy / 'kitti/images/val_7.png').unlink()
    problem, _ = problem_of(copy)
    assert problem == f'{copy}/kitti/train800val200.txt, line 24: there is no image {copy}/kitti/images/val_7.png'


def test_empty_split_file(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / 'vtab')
    (copy / 'kitti/test.txt').write_text('')
    assert problem_of(copy)[0] == f'{copy}/kitti/test.txt is empty'


# The run

@pytest.fixture(scope='module')
def trained(data, run_tool, tmp_path_factory):
    """A training of three epochs on images of 32 x 32."""
    folder = tmp_path_factory.mktemp('trained')
    backbone = MODELS.build(dict(type='mmpretrain.ConvNeXt', arch='atto', layer_scale_init_value=0., use_grn=True))
    torch.save({f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}, folder / 'base.pth')
    work_dir = folder / 'work_dir'
    printed = run_tool(
        'train.py', CONFIG, '--work-dir', work_dir, '--cfg-options', 'task=kitti', f'data_root={data}', 'randomness.seed=0',
        'train_cfg.max_epochs=3', 'param_scheduler=None', 'optim_wrapper.optimizer.lr=1e-2',
        'default_hooks.checkpoint.max_keep_ckpts=2', 'train_dataloader.batch_size=8',
        'model.backbone.arch=atto', 'model.head.in_channels=320',
        f'model.backbone.init_cfg.checkpoint={folder / "base.pth"}',
        *(f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
          for option in ('num_workers=0', 'persistent_workers=False', 'dataset.pipeline.1.scale=(32,32)')))
    return SimpleNamespace(work_dir=work_dir, config=work_dir / 'convnextv2-b_liera_r2.py', printed=printed,
                           checkpoint=work_dir / 'epoch_3.pth')


def accuracies(printed):
    return [float(value) for value in re.findall(r'accuracy/top1: (\S+)', printed)]


def test_training_learns(trained):
    assert '16 adapted layers with' in trained.printed
    accuracy, = accuracies(trained.printed)
    assert 50 < accuracy <= 75  # where all is learnt, the three wrong labels remain


def test_fresh_process_with_the_written_config_gives_the_accuracy_of_training(trained, run_tool, tmp_path):
    printed = run_tool('test.py', trained.config, trained.checkpoint, '--work-dir', tmp_path, '--show-dir', 'shown',
                       '--out', tmp_path / 'out.pkl')
    assert accuracies(printed) == accuracies(trained.printed)
    assert len([*(tmp_path / 'shown').iterdir()]) == 12
    assert (tmp_path / 'out.pkl').is_file()


def test_resuming_with_the_written_config(trained, run_tool):
    printed = run_tool('train.py', trained.config, '--resume', '--cfg-options', 'train_cfg.max_epochs=4')
    assert 'Epoch(train) [4]' in printed and 'Epoch(train) [3]' not in printed
    assert len(accuracies(printed)) == 1
    assert (trained.work_dir / 'epoch_4.pth').is_file()


def test_checkpoint_of_another_task_is_refused(trained, tmp_path):
    """MMEngine would leave out what does not fit, and test a random classifier."""
    cfg = load_config(str(trained.config), {'model.head.num_classes': 47, 'load_from': str(trained.checkpoint)})
    cfg.work_dir = str(tmp_path)
    with pytest.raises(SetupError, match=r'head.fc.weight is \(4, 320\) in the checkpoint, \(47, 320\) in this model'):
        Runner.from_cfg(cfg).test()
