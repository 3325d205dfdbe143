"""make_trees_coco.py, make_cells_coco.py and make_mobilenetv2_weights.py, on stand-ins for what they download."""
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from mmengine.registry import MODELS, DefaultScope
from pycocotools.coco import COCO

from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data, load_config

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / 'tools/dataset_converters'), str(ROOT / 'tools/model_converters')]

import make_cells_coco as cells  # noqa: E402
import make_mobilenetv2_weights as weights  # noqa: E402
import make_trees_coco as trees  # noqa: E402
import voc  # noqa: E402

from liera_mm.engine import wheels  # noqa: E402


def voc_xml(width, height, objects):
    """One of VOC's files; objects are a name and corners, and True at the end if difficult."""
    items = ''.join(
        f'<object><name>{name}</name><difficult>{int(bool(difficult))}</difficult><bndbox>'
        f'<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>'
        for name, left, top, right, bottom, *difficult in objects)
    return f'<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>'.encode()


def noise(width, height, seed=0):
    """A smooth image, which JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image, kind):
    return cv2.imencode(kind, image)[1].tobytes()


@pytest.fixture
def call(monkeypatch, capsys):
    """A function that calls one of the tools, and gives what it printed."""

    def run(tool, *args):
        monkeypatch.setattr(sys, 'argv', [tool.__name__, *map(str, args)])
        capsys.readouterr()
        tool.main()
        return capsys.readouterr().out

    return run


def read(out, split):
    return json.loads((out / f'annotations/instances_{split}2017.json').read_text())


def digest(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# Tree crowns

TRAIN_BOXES = [('Tree', 10, 20, 50, 70),  # inside
               ('Tree', 400, 100, 420, 140),  # halved by the cut at 410: an object of both tiles
               ('Tree', 395, 200, 425, 210), ('Tree', 390, 300, 419, 310),  # the like; more in the left one
               ('Tree', 810, 10, 830, 30),  # reaches out of the photograph
               ('Tree', 5, 5, 5, 9), ('Tree', 700, 9, 690, 12), ('Tree', 900, 9, 910, 12)]  # without an area in it


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with photographs of 820x400, 300x900 and 400x400."""
    content = {
        trees.PHOTOS['train'][0]: (noise(820, 400), TRAIN_BOXES),
        trees.PHOTOS['val'][0]: (noise(300, 900, 1), [('Tree', 100, 440, 120, 458)]),
        trees.PHOTOS['test'][0]: (noise(400, 400, 2), [('Tree', 1, 1, 400, 400)]),
        trees.PHOTOS['test'][1]: (noise(400, 400, 3), [('Alive', 1, 1, 9, 9), ('Dead', 11, 1, 19, 9, True)])}
    path = tmp_path / 'some.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        for name, (image, boxes) in content.items():
            archive.writestr(f'deepforest/data/{name}.png', encoded(image, '.png'))
            archive.writestr(f'deepforest/data/{name}.xml', voc_xml(*image.shape[1::-1], boxes))
    monkeypatch.setattr(trees, 'SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_trees(call, tmp_path, wheel):
    out = tmp_path / 'trees'
    printed = call(trees, out, '--wheel', wheel)
    assert 'train: 2 images, 7 instances' in printed and '1 crowds' in printed
    coco = read(out, 'train')
    assert [(image['width'], image['height']) for image in coco['images']] == [(410, 400)] * 2
    assert coco['categories'] == [dict(id=1, name='Tree', supercategory='none')]
    found = [(a['image_id'], a['bbox'], a['iscrowd']) for a in coco['annotations']]
    assert found == [
        (1, [10, 20, 40, 50], 0), (1, [400, 100, 10, 40], 0), (1, [395, 200, 15, 10], 0), (1, [390, 300, 20, 10], 0),
        (2, [0, 100, 10, 40], 0), (2, [0, 200, 15, 10], 0), (2, [0, 300, 9, 10], 1), (2, [400, 10, 10, 20], 0)]
    assert all(a['area'] == a['bbox'][2] * a['bbox'][3] and a['category_id'] == 1 for a in coco['annotations'])
    assert [a['id'] for a in coco['annotations']] == list(range(1, 9))
    # 440 to 458 lies across the cut at 450 of 900 px; the other tile of val has a crowd, and none has nothing
    assert [(a['image_id'], a['bbox'], a['iscrowd']) for a in read(out, 'val')['annotations']] == [
        (1, [100, 440, 20, 10], 0), (2, [100, 0, 20, 8], 1)]
    test = read(out, 'test')
    assert [a['iscrowd'] for a in test['annotations']] == [0, 0, 1]  # difficult
    assert {a['category_id'] for a in test['annotations']} == {1}
    assert 'MIT License' in (out / 'README.md').read_text()


def test_tiles_show_the_photograph(call, tmp_path, wheel):
    call(trees, tmp_path / 'trees', '--wheel', wheel)
    names = [image['file_name'] for image in read(tmp_path / 'trees', 'train')['images']]
    tiles = [cv2.imread(str(tmp_path / 'trees/train2017' / name)) for name in names]
    assert np.abs(np.concatenate(tiles, 1).astype(int) - noise(820, 400)).mean() < 2


@pytest.mark.parametrize(('width', 'height'), [(1, 1), (399, 401), (599, 601), (1000, 200), (2299, 2472), (1249, 1035)])
def test_windows_cover_a_photograph_once(width, height):
    covered = np.zeros((height, width), int)
    windows = trees.windows(width, height)
    for left, top, right, bottom in windows:
        covered[top:bottom, left:right] += 1
        assert right - left <= 600 and bottom - top <= 600
        assert min(right - left, width) >= min(266, width) and min(bottom - top, height) >= min(266, height)
    assert (covered == 1).all()


def test_every_part_of_a_box_is_in_a_tile():
    rng = np.random.default_rng(0)
    for left, top, width, height in rng.integers(0, 1000, (200, 4)):
        box = voc.Box('Tree', left, top, min(left + width, 1249), min(top + height, 1035))
        parts = [part for window in trees.windows(1249, 1035) for part in trees.boxes_in(window, [box])]
        assert sum(part.area for part in parts) == box.area
        assert sum(not part.iscrowd for part in parts if part.area * 2 != box.area) <= 1


def test_trees_again(call, tmp_path, wheel):
    out = tmp_path / 'trees'
    call(trees, out, '--wheel', wheel)
    before = digest(out)
    assert 'up to date' in call(trees, out)  # and nothing is downloaded
    next(out.glob('val2017/*')).unlink()
    with pytest.raises(SetupError, match='not empty.*\n.*--force'):
        call(trees, out)
    call(trees, out, '--wheel', wheel, '--force')
    assert digest(out) == before


def test_an_interrupted_run_leaves_nothing_that_looks_whole(call, tmp_path, wheel, monkeypatch):
    out = tmp_path / 'trees'
    with monkeypatch.context() as patch:
        patch.setattr(voc, 'summary', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(trees, out, '--wheel', wheel)
    assert not out.exists()
    call(trees, out, '--wheel', wheel)
    assert {path.name for path in tmp_path.iterdir()} == {'trees', 'some.whl'}


@pytest.mark.parametrize('what', ['folder', 'file'])
def test_what_is_there_is_not_overwritten(call, tmp_path, wheel, what):
    out = tmp_path / 'mine'
    if what == 'folder':
        out.mkdir()
    (out / 'notes' if what == 'folder' else out).write_text('mine')
    with pytest.raises(SetupError, match='something else|not a folder'):
        call(trees, out, '--wheel', wheel)
    assert (out / 'notes' if what == 'folder' else out).read_text() == 'mine'


def test_a_replaced_wheel_is_refused(call, tmp_path, wheel):
    with zipfile.ZipFile(wheel, 'a') as archive:
        archive.writestr('more', 'than there was')
    with pytest.raises(SetupError, match='some.whl is not the file it should be: its sha256 is .*\n.*not be trusted'):
        call(trees, tmp_path / 'trees', '--wheel', wheel)
    assert not (tmp_path / 'trees').exists()


def test_what_is_no_wheel(tmp_path):
    path = tmp_path / 'wheel'
    with pytest.raises(SetupError, match='cannot be used as the wheel of some==1.*No such file'):
        wheels.read_wheel('some==1', ['file'], path)
    path.write_text('no zip')
    with pytest.raises(SetupError, match='not a zip'):
        wheels.read_wheel('some==1', ['file'], path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('file', bytes(range(256)) * 99)
    content = bytearray(path.read_bytes())
    content[34:64] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(SetupError, match='cannot be used as the wheel of some==1'):
        wheels.read_wheel('some==1', ['file'], path)
    with zipfile.ZipFile(path, 'w'):
        pass
    with pytest.raises(SetupError, match="no item named 'file'.*\n.*pip download --no-deps some==1"):
        wheels.read_wheel('some==1', ['file'], path)


def test_download(monkeypatch):
    """By pip, and nothing that it depends on."""

    def pip(command, **_):
        assert command[1:4] == ['-m', 'pip', 'download'] and '--no-deps' in command and command[-1] == 'some==1'
        with zipfile.ZipFile(Path(command[command.index('--dest') + 1], 'some-1-py3-none-any.whl'), 'w') as archive:
            archive.writestr('file', 'content')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, 'run', pip)
    assert wheels.read_wheel('some==1', ['file']) == dict(file=b'content')
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: subprocess.CompletedProcess(
        command, 1, '', 'WARNING: hm\nERROR: No matching distribution found for some==1\n'))
    with pytest.raises(SetupError, match='cannot be downloaded: ERROR: No matching distribution.*\n.*--wheel FILE'):
        wheels.read_wheel('some==1', ['file'])


# Blood cells

CELLS = dict(train=['b', 'a'], val=['c'])
BOXES = dict(b=[('RBC', 1, 2, 31, 42), ('WBC', 5, 5, 5, 20), ('Platelets', 60, 40, 64, 48)],
             a=[('WBC', 10, 10, 64, 48), ('RBC', 9, 30, 9, 30)], c=[])


@pytest.fixture
def checkout(tmp_path):
    """A checkout with three photographs of 64x48."""
    root = tmp_path / 'checkout/BCCD'
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    (root / 'ImageSets/Main/trainval.txt').write_bytes(b'b\r\na\r\n')
    (root / 'ImageSets/Main/test.txt').write_text('c\n')
    for name, boxes in BOXES.items():
        (root / f'JPEGImages/{name}.jpg').write_bytes(encoded(noise(64, 48), '.jpg'))
        (root / f'Annotations/{name}.xml').write_bytes(voc_xml(64, 48, boxes))
    return root.parent


@pytest.mark.parametrize('src', ['.', 'BCCD'])
def test_cells(call, tmp_path, checkout, src):
    out = tmp_path / 'cells'
    assert '2 without an area left out' in call(cells, checkout / src, out)
    coco = read(out, 'train')
    assert coco['categories'] == [
        dict(id=i, name=name, supercategory='none') for i, name in enumerate(('RBC', 'WBC', 'Platelets'), 1)]
    assert coco['images'] == [dict(id=i, file_name=f'{name}.jpg', width=64, height=48) for i, name in ((1, 'b'), (2, 'a'))]
    assert coco['annotations'] == [
        dict(id=1, image_id=1, category_id=1, bbox=[1, 2, 30, 40], area=1200, iscrowd=0),
        dict(id=2, image_id=1, category_id=3, bbox=[60, 40, 4, 8], area=32, iscrowd=0),
        dict(id=3, image_id=2, category_id=2, bbox=[10, 10, 54, 38], area=2052, iscrowd=0)]
    assert read(out, 'val')['annotations'] == [] and len(read(out, 'val')['images']) == 1
    for split, names in CELLS.items():
        for name in names:
            assert (out / f'{split}2017/{name}.jpg').read_bytes() == (
                checkout / f'BCCD/JPEGImages/{name}.jpg').read_bytes()
    assert 'up to date' in call(cells, checkout / src, out)


@pytest.mark.parametrize(('file', 'content', 'match'), [
    ('Annotations/a.xml', b'<annotation>', 'a.xml is no annotation file of Pascal VOC'),
    ('Annotations/a.xml', b'<annotation></annotation>', 'a.xml is no annotation file'),
    ('Annotations/a.xml', voc_xml(64, 48, [('RBC', 1, 2, 'three', 4)]), "a.xml is no .*'three'"),
    ('Annotations/a.xml', voc_xml(64, 48, [('car', 1, 2, 3, 4)]), 'a.xml has objects of the unknown category car; known: R'),
    ('Annotations/a.xml', None, 'a.xml cannot be read: No such file'),
    ('JPEGImages/c.jpg', None, 'c.jpg cannot be read: No such file'),
    ('JPEGImages/c.jpg', b'no image', 'c.jpg cannot be read as an image'),
    ('ImageSets/Main/test.txt', None, 'test.txt cannot be read'),
], ids=str)
def test_damaged_checkouts(call, tmp_path, checkout, file, content, match):
    path = checkout / 'BCCD' / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SetupError, match=match):
        call(cells, checkout, tmp_path / 'cells')
    assert not (tmp_path / 'cells').exists()


def test_no_checkout(call, tmp_path):
    with pytest.raises(SetupError, match='is no checkout of BCCD_Dataset.*\ngit clone'):
        call(cells, tmp_path, tmp_path / 'cells')


@pytest.mark.parametrize('world', ['trees', 'cells'])
@pytest.mark.parametrize('kind', ['liera', 'full'])
def test_the_configs_read_them(call, tmp_path, wheel, checkout, world, kind):
    (checkout / 'BCCD/Annotations/c.xml').write_bytes(voc_xml(64, 48, [('RBC', 1, 2, 31, 42)]))
    call(trees, tmp_path / 'trees', '--wheel', wheel) if world == 'trees' else call(cells, checkout, tmp_path / 'cells')
    cfg = load_config(str(ROOT / f'configs/transfer/faster-rcnn_mobilenetv2_{kind}_{world}.py'),
                      dict(data_root=str(tmp_path / world)))
    check_data(cfg, ['train', 'val', 'test'])
    for split in ('train', 'val'):
        coco = COCO(str(tmp_path / f'{world}/annotations/instances_{split}2017.json'))
        assert [category['name'] for category in coco.dataset['categories']] == list(cfg.classes)
    assert len(cfg.classes) == cfg.model.roi_head.bbox_head.num_classes


# Weights


@pytest.fixture(scope='module')
def original():
    """torchvision's network with weights and statistics that are not neutral."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if 'running_var' in name or '.1.weight' in name:
                tensor.uniform_(.5, 1.5)
            elif tensor.dim() == 1 and tensor.is_floating_point():
                tensor.normal_(0, .1)
    return model


def test_renamed_weights_give_the_same_features(original):
    with DefaultScope.overwrite_default_scope('mmdet'):
        ours = MODELS.build(dict(type='MobileNetV2', out_indices=(1, 2, 4, 7)))
    ours.eval()  # returns None
    ours.load_state_dict(weights.rename(original.state_dict()), strict=True)
    x, features = torch.randn(2, 3, 64, 96), []
    with torch.no_grad():
        found, y = ours(x), x
        for index, layer in enumerate(original.features):
            y = layer(y)
            if index in (3, 6, 13, 18):  # the last of stages 2, 3 and 5, and the last of all
                features.append(y)
    assert len(found) == len(features)
    for a, b in zip(found, features):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_weights(call, tmp_path, original, monkeypatch):
    """The tool takes the file out of a wheel and checks it; the configs of both worlds start from what it writes."""
    buffer = io.BytesIO()
    torch.save(original.state_dict(), buffer)
    with zipfile.ZipFile(tmp_path / 'some.whl', 'w') as archive:
        archive.writestr(weights.FILE, buffer.getvalue())
    out = tmp_path / 'new/weights.pth'
    with pytest.raises(SetupError, match='is not the file it should be'):
        call(weights, out, '--wheel', tmp_path / 'some.whl')
    assert not out.exists()
    with pytest.raises(SetupError, match='is a folder\nName a file'):
        call(weights, tmp_path)
    monkeypatch.setattr(weights, 'SHA256', hashlib.sha256(buffer.getvalue()).hexdigest())
    assert '312 tensors' in call(weights, out, '--wheel', tmp_path / 'some.whl')
    expected = weights.rename(original.state_dict())
    for kind in ('liera', 'full'):
        cfg = load_config(str(ROOT / f'configs/transfer/faster-rcnn_mobilenetv2_{kind}_cells.py'))
        backbone = cfg.model.backbone
        backbone.get('backbone', backbone).init_cfg.checkpoint = str(out)
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(backbone)
            model.init_weights()
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        model.train()
        assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
