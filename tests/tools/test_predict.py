"""tools/predict.py: the detections of tools/test.py, from every kind of weights; pictures, results, what it refuses."""
import json
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from pycocotools import mask as rle
from pycocotools.coco import COCO

import liera_mm
from liera_mm.core.errors import SetupError
from liera_mm.engine.checkpoint import leave_out_base

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
LIERA = ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
CLASSES = tuple('0123456789')


@pytest.fixture(scope='module')
def tools():
    return {name: runpy.run_path(str(ROOT / f'tools/{name}.py'))['main'] for name in ('predict', 'test', 'merge')}


@pytest.fixture(scope='module')
def call(tools):
    """A function that calls a tool in this process, which is on the CPU."""

    def run(name, *args):
        with pytest.MonkeyPatch.context() as patch, DefaultScope.overwrite_default_scope('mmdet'):
            patch.setattr('mmengine.device.utils.DEVICE', 'cpu')
            patch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
            tools[name]()

    return run


@pytest.fixture(scope='module')
def files(tmp_path_factory, tiny_digits):
    """Config, checkpoint of a training, the whole detector without adapters, and two adapter files."""
    folder = tmp_path_factory.mktemp('detector')
    config = folder / 'config.py'
    config.write_text(f"_base_ = '{LIERA}'\nmodel = dict(test_cfg=dict(rcnn=dict(score_thr=0.01)))")
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    torch.save(dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict={
        name: tensor for name, tensor in model.state_dict().items() if '.adapter.' not in name}), folder / 'base.pth')
    for seed, name in enumerate(('cats', 'dogs')):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.requires_grad:
                    parameter.add_(.02 * torch.randn_like(parameter))
        liera_mm.save_adapter(model.backbone, folder / f'{name}.safetensors')
        content = dict(meta=dict(dataset_meta=dict(classes=CLASSES)), state_dict=model.state_dict())
        leave_out_base(model, content)
        torch.save(content, folder / f'{name}.pth')
    return folder


@pytest.fixture(scope='module')
def expected(call, files, tiny_digits):
    """What tools/test.py finds in the images to validate on, by adapter and image."""
    found = {}
    for name in ('cats', 'dogs'):
        out = files / f'{name}.pkl'
        call('test', files / 'config.py', files / f'{name}.pth', '--out', out, '--work-dir', files / 'test', '--cfg-options',
             f'data_root={tiny_digits}', 'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
             f'experiment_name=expected_{name}')
        found[name] = {Path(sample['img_path']).name: sample['pred_instances'] for sample in pickle.loads(out.read_bytes())}
    return found


def check(out, expected):
    """That the results of a folder are those, bit for bit, and load into pycocotools."""
    coco = COCO(str(out / 'images.json'))
    results = coco.loadRes(str(out / 'predictions.json'))
    assert [coco.cats[number]['name'] for number in sorted(coco.cats)] == list(CLASSES)
    assert {Path(image['file_name']).name for image in coco.imgs.values()} == set(expected)
    for image in coco.imgs.values():
        found, known = results.imgToAnns[image['id']], expected[Path(image['file_name']).name]
        assert len(found) == len(known['labels']) > 5
        assert [CLASSES.index(coco.cats[a['category_id']]['name']) for a in found] == known['labels'].tolist()
        assert [a['score'] for a in found] == known['scores'].tolist()
        boxes = known['bboxes'].tolist()
        assert [a['bbox'] for a in found] == [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]
        assert all((rle.decode(a['segmentation']) == rle.decode(mask)).all() for a, mask in zip(found, known['masks']))
        picture = mmcv.imread(out / 'vis' / Path(image['file_name']).name)
        assert picture.shape[:2] == (image['height'], image['width'])


def test_checkpoint_of_a_training(call, files, expected, tiny_digits, tmp_path, capsys):
    """Boxes are in the pictures where their scores are above the threshold."""
    score = float(np.median(next(iter(expected['cats'].values()))['scores']))
    for thr, out in ((score, tmp_path / 'some'), (1, tmp_path / 'none')):
        call('predict', files / 'config.py', files / 'cats.pth', tiny_digits / 'val2017', '--out', out, '--score-thr', thr)
        check(out, expected['cats'])
    drawn, plain = ({path.name: mmcv.imread(path) for path in (out / 'vis').iterdir()}
                    for out in (tmp_path / 'some', tmp_path / 'none'))
    name = next(iter(expected['cats']))
    assert np.abs(plain[name].astype(int) - mmcv.imread(tiny_digits / 'val2017' / name)).mean() < 6
    assert (np.abs(drawn[name].astype(int) - plain[name]) > 60).any()
    above = sum(int((known['scores'] > score).sum()) for known in expected['cats'].values())
    total = sum(len(known['scores']) for known in expected['cats'].values())
    assert (f'3 pictures in {tmp_path}/some/vis, with {above} detections above {score:g}; all {total} are in '
            f'{tmp_path}/some/predictions.json') in capsys.readouterr().out


def test_merged(call, files, expected, tiny_digits, tmp_path):
    """With the plain config, which has nothing of this package; weights are those, so are detections."""
    call('merge', files / 'config.py', files / 'cats.pth', tmp_path / 'merged.pth')
    call('predict', tmp_path / 'merged.py', tmp_path / 'merged.pth', tiny_digits / 'val2017', '--out', tmp_path)
    theirs = {name: known['scores'] for name, known in expected['cats'].items()}
    images = json.loads((tmp_path / 'images.json').read_text())['images']
    ours = {image['id']: Path(image['file_name']).name for image in images}
    for image_id, name in ours.items():
        found = [result['score'] for result in json.loads((tmp_path / 'predictions.json').read_text())
                 if result['image_id'] == image_id]
        torch.testing.assert_close(torch.tensor(found), theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('base', ['base', 'dogs'])
def test_an_adapter_on_the_detector(call, files, expected, tiny_digits, tmp_path, base):
    """Whether the detector's own checkpoint has another adapter or none."""
    call('predict', files / 'config.py', files / f'{base}.pth', tiny_digits / 'val2017', '--out', tmp_path, '--adapter',
         files / 'cats.safetensors')
    check(tmp_path, expected['cats'])


@pytest.mark.parametrize('wrapped', ['_orig_mod.backbone.', 'backbone._orig_mod.'])
def test_checkpoint_of_a_compiled_detector(call, files, expected, tiny_digits, tmp_path, wrapped):
    content = torch.load(files / 'cats.pth')
    content['state_dict'] = {
        name.replace('backbone.', wrapped) if 'backbone.' in name else wrapped.partition('backbone.')[0] + name: tensor
        for name, tensor in content['state_dict'].items()}
    torch.save(content, tmp_path / 'compiled.pth')
    call('predict', files / 'config.py', tmp_path / 'compiled.pth', tiny_digits / 'val2017', '--out', tmp_path)
    check(tmp_path, expected['cats'])


def test_several_adapters(call, files, expected, tiny_digits, tmp_path):
    call('predict', files / 'config.py', files / 'base.pth', tiny_digits / 'val2017/*.jpg', '--out', tmp_path, '--adapter',
         files / 'dogs.safetensors', '--adapter', f'ours={files}/cats.safetensors')
    check(tmp_path / 'dogs', expected['dogs'])
    check(tmp_path / 'ours', expected['cats'])


def test_images_of_several_folders(call, files, tiny_digits, tmp_path):
    """Two of one name keep apart; what is given twice is there once; other formats become JPEG files."""
    one, *_ = sorted((tiny_digits / 'val2017').iterdir())
    for folder in ('a', 'b/c'):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(one, tmp_path / folder / 'same.JPG')
    mmcv.imwrite(mmcv.imread(one), str(tmp_path / 'a/other.bmp'))
    (tmp_path / 'a/notes.txt').write_text('no image')
    call('predict', files / 'config.py', files / 'cats.pth', tmp_path / 'a', f'{tmp_path}/**/same.*',
         tmp_path / 'a/same.JPG', '--out', tmp_path / 'out')
    pictures = {str(path.relative_to(tmp_path / 'out/vis')) for path in (tmp_path / 'out/vis').rglob('*.*')}
    assert pictures == {'a/same.JPG', 'b/c/same.JPG', 'a/other.bmp.jpg'}
    names = [image['file_name'] for image in json.loads((tmp_path / 'out/images.json').read_text())['images']]
    assert names == [f'{tmp_path}/{name}' for name in ('a/other.bmp', 'a/same.JPG', 'b/c/same.JPG')]


# What it refuses

@pytest.fixture
def refused(call, files, tiny_digits, tmp_path):
    """A function that gives the two lines in which the tool ends."""

    def run(checkpoint='cats.pth', images=None, *args, config=None):
        with pytest.raises(SetupError) as error:
            call('predict', config or files / 'config.py', files / checkpoint, images or tiny_digits / 'val2017', '--out',
                 tmp_path / 'out', *args)
        problem, remedy = str(error.value).splitlines()
        return problem, remedy

    return run


@pytest.fixture
def one(tiny_digits):
    return min((tiny_digits / 'val2017').iterdir())


def test_no_such_image(refused, tiny_digits, one, tmp_path):
    missing = one.with_name('00000000001.jpg')
    problem, remedy = refused(images=missing)
    assert problem == f'No such image: {missing}' and remedy.startswith(f'The closest ones are {one}')
    assert refused(images=tiny_digits / 'val2017/*.png')[0] == f'No such image: {tiny_digits}/val2017/*.png'
    nowhere = tmp_path / 'nowhere/1.jpg'
    assert refused(images=nowhere) == (f'No such image: {nowhere}', f'{tmp_path} has no images')


def test_folders_without_images(refused, tiny_digits, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert refused(images=tmp_path / 'empty')[0] == f'There are no images in {tmp_path}/empty'
    assert refused(images=tiny_digits)[1] == f'There are in {tiny_digits}/train2017, {tiny_digits}/val2017'


def test_images_that_cannot_be_read(refused, one, tmp_path):
    """They lose nothing: the others are predicted."""
    (tmp_path / 'some').mkdir()
    shutil.copy(one, tmp_path / 'some/b.jpg')
    (tmp_path / 'some/a.jpg').write_bytes(one.read_bytes()[:500])
    (tmp_path / 'some/c.jpg').write_bytes(b'')
    mmcv.imwrite(np.zeros((3, 2000, 3), np.uint8), str(tmp_path / 'some/thin.png'))  # of height 0 once it is resized
    problem, remedy = refused('cats.pth', tmp_path / 'some')
    assert problem == f'3 of 4 images were left out: {tmp_path}/some/a.jpg cannot be read as an image: failed to load image'
    assert [path.name for path in (tmp_path / 'out/vis').iterdir()] == ['b.jpg']
    assert {result['image_id'] for result in json.loads((tmp_path / 'out/predictions.json').read_text())} == {2}


def test_pictures_never_replace_images(refused, one, tmp_path):
    image = tmp_path / 'out/vis/1.jpg'
    image.parent.mkdir(parents=True)
    shutil.copy(one, image)
    assert refused(images=image)[0] == f'{image} would be overwritten by its own picture'
    assert image.read_bytes() == one.read_bytes()


def test_out_that_is_a_file(refused, tmp_path):
    (tmp_path / 'out').write_text('mine')
    assert refused()[0] == f'{tmp_path}/out is not a folder'


def test_missing_files(refused, files):
    problem, remedy = refused('epoch_9.pth')
    assert problem == f'Checkpoint not found: {files}/epoch_9.pth' and str(files / 'cats.pth') in remedy
    problem, remedy = refused('base.pth', None, '--adapter', files / 'cat.safetensors')
    assert problem == f'Adapter not found: {files}/cat.safetensors' and str(files / 'cats.safetensors') in remedy


def test_adapter_without_adapted_backbone(refused, files):
    config = LIERA.with_name('mask-rcnn_convnextv2-mini_frozen_digits.py')
    problem, remedy = refused('base.pth', None, '--adapter', files / 'cats.safetensors', config=config)
    assert problem == f'{config} has no adapted backbone for {files}/cats.safetensors'


def test_adapter_of_another_base(refused, files, tmp_path):
    other = torch.load(files / 'base.pth')
    other['state_dict']['backbone.stages.1.0.depthwise_conv.weight'] *= 2
    torch.save(other, files / 'other.pth')
    problem, remedy = refused('other.pth', None, '--adapter', files / 'cats.safetensors')
    assert f'{files}/cats.safetensors was trained on other frozen weights: stages.1.0.depthwise_conv.weight' in problem


def test_adapter_of_other_settings(refused, files):
    problem, _ = refused('base.pth', None, '--adapter', files / 'cats.safetensors', '--cfg-options',
                         'model.backbone.liera.rank=2')
    assert 'trained with another configuration: rank 4, here 2' in problem


def test_checkpoint_in_the_place_of_an_adapter(refused, files):
    assert 'is no adapter file' in refused('base.pth', None, '--adapter', files / 'cats.pth')[0]


def test_weights_that_are_not_finite(call, refused, files, tmp_path):
    checkpoint = torch.load(files / 'cats.pth', weights_only=False)
    checkpoint['state_dict']['roi_head.bbox_head.fc_cls.bias'][0] = float('nan')
    torch.save(checkpoint, tmp_path / 'nan.pth')
    problem, _ = refused(tmp_path / 'nan.pth')
    assert 'fc_cls.bias' in problem and 'not finite' in problem
    with pytest.raises(SetupError, match='fc_cls.bias'):
        call('merge', files / 'config.py', tmp_path / 'nan.pth', tmp_path / 'merged.pth')
    assert not (tmp_path / 'merged.pth').exists()


@pytest.mark.parametrize('score', ['30', '-.1', 'nan'])
def test_scores_that_none_has(call, score, capsys):
    with pytest.raises(SystemExit):
        call('predict', 'config', 'checkpoint', 'image', f'--score-thr={score}')
    assert '--score-thr must be between 0 and 1' in capsys.readouterr().err


def test_two_adapters_of_one_name(refused, files):
    problem, remedy = refused('base.pth', None, '--adapter', files / 'cats.safetensors', '--adapter',
                              f'cats={files}/dogs.safetensors')
    assert problem.startswith('Two adapters are called cats') and remedy.endswith('--adapter NAME=FILE')


def test_detector_without_adapters_needs_an_adapter_file(refused, files):
    problem, _ = refused('base.pth')
    assert problem.startswith(f'{files}/base.pth was not trained with {files}/config.py')


def test_checkpoint_without_classes(call, refused, files, tiny_digits, tmp_path):
    """The config has those of the digits; MMDetection's default would be COCO's 80."""
    content = torch.load(files / 'cats.pth')
    torch.save(dict(state_dict=content['state_dict']), files / 'nameless.pth')
    call('predict', files / 'config.py', files / 'nameless.pth', tiny_digits / 'val2017', '--out', tmp_path / 'named')
    assert [entry['name'] for entry in json.loads((tmp_path / 'named/images.json').read_text())['categories']] == [*CLASSES]
    problem, remedy = refused('nameless.pth', None, '--cfg-options', 'test_dataloader.dataset.metainfo=None')
    assert problem == (f'{files}/nameless.pth names no classes, and {files}/config.py has 80, where '
                       'roi_head.bbox_head.num_classes is 10') and 'metainfo=dict(classes=' in remedy


def test_no_such_device(refused):
    for device in ('gpu', 'cuda:7'):
        assert refused('cats.pth', None, '--device', device)[0].startswith(f'There is no device {device!r}')


def test_no_detector(refused, files):
    assert 'has no test data set of a detector' in refused(config=ROOT / 'configs/vtab/convnextv2-b_liera_r2.py')[0]
