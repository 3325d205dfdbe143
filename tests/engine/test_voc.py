"""Data sets in Pascal VOC's layout that MMDetection would fail on, or learn nothing from."""
import cv2
import numpy as np
import pytest
from mmdet.datasets import VOCDataset
from mmengine.config import Config

from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import check_data

OBJECT = ('<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax>'
          '<ymax>30</ymax></bndbox></object>')
CAT, DOG = OBJECT.format(name='cat'), OBJECT.format(name='dog')
XML = '<annotation><size><width>40</width><height>32</height></size>{}</annotation>'


@pytest.fixture
def voc(tmp_path):
    """Folder of two images, with a cat and a dog in each."""
    for folder in ('ImageSets/Main', 'JPEGImages', 'Annotations'):
        (tmp_path / 'VOC' / folder).mkdir(parents=True)
    for name in ('a1', 'a2'):
        cv2.imwrite(str(tmp_path / f'VOC/JPEGImages/{name}.jpg'), np.zeros((32, 40, 3), np.uint8))
        (tmp_path / f'VOC/Annotations/{name}.xml').write_text(XML.format(CAT + DOG))
    (tmp_path / 'VOC/ImageSets/Main/train.txt').write_text('a1\na2\n')
    return tmp_path


def config(root, classes=('cat', 'dog'), wrap=lambda dataset: dataset):
    dataset = dict(
        type='VOCDataset', data_root=f'{root}/', ann_file='VOC/ImageSets/Main/train.txt', metainfo=dict(classes=classes),
        data_prefix=dict(sub_data_root='VOC/'), pipeline=[dict(type='LoadImageFromFile')])
    return Config({f'{split}_dataloader': dict(dataset=wrap(dataset)) for split in ('train', 'val', 'test')})


def edit(path, change):
    return lambda root: (root / 'VOC' / path).write_text(change((root / 'VOC' / path).read_text()))


def remove(path):
    return lambda root: (root / 'VOC' / path).unlink()


def in_both(old, new):
    return lambda root: [edit(f'Annotations/{name}.xml', lambda text: text.replace(old, new))(root) for name in ('a1', 'a2')]


XML_1 = 'Annotations/a1.xml'
WRONG = {
    'no image set': (remove('ImageSets/Main/train.txt'), r'data set is missing: .*VOC/ImageSets/Main/train.txt'),
    'an empty image set': (edit('ImageSets/Main/train.txt', lambda text: ''), 'train.txt is empty'),
    'labels in the image set': (
        edit('ImageSets/Main/train.txt', lambda text: 'a1  1\na2 -1\n'), '2 of 2 annotations of .*a1  1.xml'),
    'JSON for an image set': (
        edit('ImageSets/Main/train.txt', lambda text: '{"images": []}'), 'JSON file, and the VOCDataset of the train data'),
    'no XML file': (remove(XML_1), '1 of 2 annotations of .* are missing, the first is .*a1.xml'),
    'no image': (remove('JPEGImages/a2.jpg'), '1 of 2 images of .* are missing, the first is .*a2.jpg'),
    'a torn XML file': (edit(XML_1, lambda text: text[:-20]), 'a1.xml is no XML file'),
    'no name': (edit(XML_1, lambda text: text.replace('<name>cat</name>', '')), 'a1.xml, object 1 has no name'),
    'no bndbox': (edit(XML_1, lambda text: text.replace('bndbox', 'box')), "a1.xml, object 1, 'cat', has no bndbox"),
    'no xmax': (edit(XML_1, lambda text: text.replace('xmax', 'x2')), "a1.xml, object 1, 'cat', has no xmax"),
    'a side that is no number': (edit(XML_1, lambda text: text.replace('>20<', '>twenty<')), "has 'twenty' for xmax"),
    'a side that is not finite': (edit(XML_1, lambda text: text.replace('>20<', '>nan<')), "has 'nan' for xmax"),
    'corners in the wrong order': (edit(XML_1, lambda text: text.replace('>20<', '>2<')), 'the wrong order: 3, 4, 2, 30'),
    'a size of zero': (edit(XML_1, lambda text: text.replace('>40<', '>0<')), 'a1.xml says that its image is 0x32'),
    'a size that is not that of the image': (
        edit(XML_1, lambda text: text.replace('>40<', '>41<')), 'a1.jpg is 40x32 pixels large, but annotated as 41x32'),
    'a size without a width': (edit(XML_1, lambda text: text.replace('width', 'w')), 'a1.xml, its size, has no width'),
    'difficult that is no number': (edit(XML_1, lambda text: text.replace('>0<', '>no<')), "has 'no' for difficult"),
    'a class in capitals': (in_both('cat', 'Cat'), "no object of the class 'cat' of the config, but 2 of 'Cat'"),
    'a class with spaces in one file': (
        edit(XML_1, lambda text: text.replace('cat', 'cat ')), "1 objects of 'cat ', which is the class 'cat' but for its"),
    'other classes': (
        lambda root: [in_both('cat', 'cow')(root), in_both('dog', 'hen')(root)], 'no object to use: .*it has cow, hen'),
    'nothing but difficult objects': (in_both('<difficult>0', '<difficult>1'), 'no object to use: none of its 4 in 2 im'),
    'boxes of area 0': (in_both('>20<', '>3<'), 'no object to use'),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_files(voc, name):
    break_it, problem = WRONG[name]
    check_data(config(voc), ['train', 'val', 'test'])
    break_it(voc)
    with pytest.raises(SetupError, match=problem) as error:
        check_data(config(voc), ['train', 'val'])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize('wrap', [
    lambda dataset: dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dataset, dataset])),
    lambda dataset: dict(type='ClassBalancedDataset', oversample_thr=.1, dataset=dataset),
    lambda dataset: dict(type='MultiImageMixDataset', pipeline=[], dataset=dataset),
], ids=['repeated', 'balanced', 'mixed'])
def test_below_wrappers(voc, wrap):
    remove(XML_1)(voc)
    with pytest.raises(SetupError, match='a1.xml'):
        check_data(config(voc, wrap=wrap), ['train'])


@pytest.mark.parametrize('change', [
    edit(XML_1, lambda text: text.replace(CAT, '')),
    edit(XML_1, lambda text: text.replace('<difficult>0</difficult>', '')),
    edit(XML_1, lambda text: text.replace('<size><width>40</width><height>32</height></size>', '')),
    edit(XML_1, lambda text: text.replace('>20<', '>20.7<')),
    edit(XML_1, lambda text: text.replace(DOG, '<object><name>hen</name></object>')),
    lambda root: edit(XML_1, lambda text: XML.format(''))(root),
], ids=['a class missing', 'no difficult', 'no size', 'fractions', 'another class without a box', 'nothing in an image'])
def test_what_mmdetection_takes(voc, change):
    change(voc)
    cfg = config(voc)
    check_data(cfg, ['train', 'val', 'test'])
    arguments = {key: value for key, value in cfg.train_dataloader.dataset.items() if key not in ('type', 'pipeline')}
    assert len(VOCDataset(**arguments)) == 2


def test_some_of_the_classes(voc):
    check_data(config(voc, classes=('dog', )), ['train'])
