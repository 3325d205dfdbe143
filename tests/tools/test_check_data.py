"""tools/check_data.py: counts, oddities one by one, and the sheets."""
import json
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import DefaultScope

from liera_mm.core.errors import SetupError

ROOT = Path(__file__).parents[2]
CLASSES = ['cat', 'dog']
CONFIG = """
default_scope = 'mmdet'
model = dict(type='FasterRCNN')
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
    type='CocoDataset', data_root={root!r}, ann_file='train.json', data_prefix=dict(img='train/'),
    metainfo=dict(classes=('cat', 'dog')), pipeline=pipeline)))
val_dataloader = dict(dataset=dict(
    type='CocoDataset', data_root={root!r}, ann_file='val.json', data_prefix=dict(img='val/'),
    metainfo=dict(classes=('cat', 'dog')), pipeline=pipeline))
test_dataloader = val_dataloader
"""


def annotation(number, image, category, bbox, **more):
    return dict(id=number, image_id=image, category_id=category, bbox=bbox, area=bbox[2] * bbox[3], iscrowd=0, **more)


@pytest.fixture
def data(tmp_path):
    """Images to train and to validate on, 24 each, cats and dogs by turns; nothing is odd."""
    rng = np.random.default_rng(0)
    contents = {}
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        images = [dict(id=10 + index, file_name=f'{split}{index}.png', width=200, height=150) for index in range(24)]
        for image in images:
            cv2.imwrite(str(tmp_path / split / image['file_name']), rng.integers(0, 255, (150, 200, 3), np.uint8))
        annotations = [annotation(image['id'], image['id'], 7 + index % 2, [10, 20, 20, 30], segmentation=[
            [10, 20, 30, 20, 20, 50]]) for index, image in enumerate(images)]
        contents[split] = dict(images=images, annotations=annotations, categories=[
            dict(id=7, name='cat'), dict(id=8, name='dog')])
    (tmp_path / 'config.py').write_text(CONFIG.format(root=str(tmp_path)))
    return tmp_path, contents


@pytest.fixture(scope='module')
def tool():
    return runpy.run_path(str(ROOT / 'tools/check_data.py'))['main']


@pytest.fixture
def check(tool, data, monkeypatch, capsys):
    """A function that writes the annotations, runs the tool, and gives its lines."""
    folder, contents = data

    def run(*args):
        for split, content in contents.items():
            (folder / f'{split}.json').write_text(json.dumps(content))
        monkeypatch.setattr(sys, 'argv', ['check_data.py', str(folder / 'config.py'), '--out', str(folder / 'out'), *args])
        capsys.readouterr()
        with DefaultScope.overwrite_default_scope('mmdet'):
            tool()
        return capsys.readouterr().out.splitlines()

    return run


def odd(lines):
    """The oddities by split; those of two splits under None."""
    found, split = {}, None
    for line in lines:
        heading = re.match(r'(\w+): .*\.json$', line)
        split = heading[1] if heading else split
        if 'odd: ' in line:
            found.setdefault(split if line.startswith('  ') else None, []).append(line.partition('odd: ')[2])
    return found


def test_counts_and_sheets(check, data):
    folder, contents = data
    sizes = dict(zip(range(4), ([10, 10, 31, 33], [10, 10, 32, 32], [10, 10, 95, 97], [10, 10, 96, 96])))
    for index, bbox in sizes.items():  # areas 1023, 1024, 9215, 9216 of cats and dogs by turns
        contents['train']['annotations'][index].update(bbox=bbox, area=bbox[2] * bbox[3])
    contents['train']['annotations'].append(annotation(99, 10, 8, [50, 50, 40, 40]) | dict(iscrowd=1))
    lines = check()
    assert [line.split() for line in lines if line.startswith(('class', 'cat', 'dog', 'all'))][:4] == [
        ['class', 'images', 'boxes', 'small', 'medium', 'large', 'crowds'],
        ['cat', '12', '12', '11', '1', '0', '0'], ['dog', '12', '12', '10', '1', '1', '1'],
        ['all', '24', '24', '21', '2', '1', '1']]
    assert not odd(lines) and lines.count('  nothing odd') == 2  # test is val
    sheets = {path.name: cv2.imread(str(path)) for path in (folder / 'out').iterdir()}
    assert sheets.keys() == {'train.jpg', 'val.jpg'}
    height, width, _ = sheets['val.jpg'].shape
    assert width == 3 * 648 and height == 3 * (480 + 36)
    check('--images', '2')
    assert cv2.imread(str(folder / 'out/val.jpg')).shape[1] == 2 * 648


def test_sheet_has_boxes_masks_and_crowds(check, data):
    folder, contents = data
    for content in contents.values():
        for image in content['images']:
            cv2.imwrite(str(folder / image['file_name'][:-5].rstrip('0123456789') / image['file_name']),
                        np.full((150, 200, 3), 255, np.uint8))
    contents['val']['annotations'].append(annotation(99, 10, 8, [100, 50, 40, 40]) | dict(iscrowd=1))
    check('--images', '1')
    sheet = cv2.imread(str(folder / 'out/val.jpg')).astype(int)
    assert sheet.shape == (480 + 36, 648, 3)

    def coloured(x, y):  # a pixel of the image in the sheet
        pixel = sheet[round(30 + 3.2 * y), round(3.2 * x)]
        return np.ptp(pixel) > 30

    assert coloured(20, 30) and not coloured(29, 48)  # in the triangle of the mask; beside it, in the box
    assert not coloured(60, 60)
    assert abs(sheet[round(30 + 3.2 * 70), 320 - 1:320 + 2].mean(0).max() - 128) < 60  # left side of the crowd


def test_fewer_images_than_the_sheet_has_room_for(check, data, recwarn):
    """Each is there once; boxes that reach beyond them are drawn up to their borders."""
    folder, contents = data
    contents['val']['annotations'] = [annotation(index, 10 + index, 7, [150, 100, 60, 60]) for index in range(2)]
    check()
    sheet = cv2.imread(str(folder / 'out/val.jpg'))
    first, second = sheet[30:510, :640], sheet[30:510, 648:1288]
    assert sheet.shape[1] == 2 * 648 and (first != second).mean() > .5
    assert not [warning for warning in recwarn if 'out of bounds' in str(warning.message)]


ODD = {
    'images without boxes': (lambda train: train['annotations'].pop(), '1 of 24 images have no box, such as train23.png'),
    'no image': (lambda train: train['annotations'].append(annotation(99, 99, 8, [30, 6, 20, 20])),
                 '1 of 25 annotations are of images that are not listed, and not used, such as that with id 99'),
    'to ignore': (lambda train: train['annotations'].append(annotation(99, 12, 8, [30, 6, 20, 20], ignore=1)),
                  '1 of 25 annotations are marked to ignore, and not used, such as that with id 99'),
    'tiny': (lambda train: train['annotations'][3].update(bbox=[5, 6, 7, 20], area=140),
             '1 of 24 boxes are narrower or lower than 8 pixels, such as [5, 6, 7, 20] in train3.png'),
    'of area 0': (lambda train: train['annotations'][3].update(area=0),
                  '1 of 24 boxes are smaller than a pixel or of area 0, and not used'),
    'outside': (lambda train: train['annotations'].append(annotation(99, 12, 8, [300, 6, 20, 20])),
                '1 of 25 boxes are outside their image, and not used, such as [300, 6, 20, 20] in train2.png'),
    'of no class': (lambda train: (train['categories'].append(dict(id=9, name='cow')),
                                   train['annotations'].append(annotation(99, 12, 9, [30, 6, 20, 20]))),
                    '1 of 25 boxes are of other classes, and not used'),
    'beyond': (lambda train: train['annotations'][3].update(bbox=[190, 6, 20, 20]),
               '1 of 24 boxes reach beyond their image'),
    'whole image': (lambda train: train['annotations'][3].update(bbox=[0, 0, 200, 150], area=30000),
                    '1 of 24 boxes fill their image'),
    'twice': (lambda train: train['annotations'].append(dict(train['annotations'][3], id=99)),
              '1 of 25 boxes are where another box of their class is, such as [10, 20, 20, 30] in train3.png'),
    'two classes': (lambda train: train['annotations'].append(dict(train['annotations'][3], id=99, category_id=7)),
                    '1 of 25 boxes are where a box of another class is'),
    'few': (lambda train: [entry.update(category_id=7) for entry in train['annotations'][:16]],
            '1 of 2 classes have fewer than 10 boxes: dog'),
    'none': (lambda train: [entry.update(category_id=7) for entry in train['annotations']],
             '1 of 2 classes have no box: dog'),
    'one class': (lambda train: [entry.update(category_id=7) for entry in train['annotations'][:22]],
                  'cat has 96% of all boxes'),
    'everywhere': (lambda train: train['annotations'].extend(
        annotation(100 + index, 10 + index, 7, [60, 60, 30, 30]) for index in range(24)),
        'cat is in every image that has a box'),
}


@pytest.mark.parametrize('name', ODD)
def test_what_is_odd(check, data, name):
    change, sentence = ODD[name]
    change(data[1]['train'])
    found = odd(check('--images', '1'))
    assert found.keys() == {'train'} and any(line.startswith(sentence) for line in found['train']), found


def test_boxes_whose_masks_cannot_be_drawn(check, data):
    for entry, segmentation in zip(data[1]['train']['annotations'], [
            [[1, 2, 3, 4]], [1, 2, 30, 2, 30, 40], '1 2 30 2 30 40', [['1', '2', '30', '2', '30', '40']],
            [[1, 2, float('nan'), 2, 30, 40]], dict(size=[60, 80], counts='df4X'), dict(counts=[3])]):
        entry.update(segmentation=segmentation)
    assert not odd(check('--images', '24')) and (data[0] / 'out/train.jpg').exists()


def test_images_that_are_there_twice(check, data):
    """In a split, and in two; whatever their names and formats, which differ in bytes."""
    folder, contents = data
    picture = cv2.imread(str(folder / 'train/train3.png'))
    contents['train']['images'][5]['file_name'] = 'copy.bmp'
    cv2.imwrite(str(folder / 'train/copy.bmp'), picture)
    cv2.imwrite(str(folder / 'val/val7.png'), picture, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    assert odd(check())[None] == [
        'train: 1 of 24 images are copies of others, such as copy.bmp of train3.png',
        '1 of 24 images of val are in train too, such as val7.png, train3.png there: metrics will flatter the detector']


def test_without_data_to_test_on(check, data):
    folder, _ = data
    with open(folder / 'config.py', 'a') as file:
        file.write("test_dataloader['dataset']['ann_file'] = 'nowhere.json'\n")
        file.write("val_dataloader = dict(val_dataloader, dataset=dict(val_dataloader['dataset'], ann_file='val.json'))\n")
    assert check()[0].startswith('test is left out: The test data set is missing: ')


@pytest.mark.parametrize(('change', 'problem'), [
    (lambda folder, contents: contents['train']['annotations'].clear(), 'train.json has no annotation to use'),
    (lambda folder, contents: (folder / 'val/val7.png').write_bytes(b'no image'), 'val7.png cannot be read as an image'),
    (lambda folder, contents: (folder / 'val/val7.png').unlink(), '1 of 24 images'),
    (lambda folder, contents: (folder / 'config.py').write_text((folder / 'config.py').read_text().replace(
        "'CocoDataset'", "'WIDERFaceDataset'")), 'The train data set is a WIDERFaceDataset, not a CocoDataset'),
], ids=['no boxes', 'damaged image', 'missing image', 'other annotations'])
def test_what_it_refuses(check, data, change, problem):
    change(data[0], data[1])
    with pytest.raises(SetupError) as error:
        check()
    assert problem in str(error.value).splitlines()[0]
