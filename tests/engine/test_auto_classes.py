"""auto_classes: the classes of data sets and heads are the categories of the annotations, wherever a config is loaded."""
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

from liera_mm.core.errors import SetupError
from liera_mm.engine.auto_classes import fill_classes
from liera_mm.engine.cli import load_config
from liera_mm.engine.data import check_trained_classes

DIGITS_CONFIG = Path(__file__).parents[2] / 'configs/digits/mask-rcnn_convnextv2-mini_liera_digits.py'
pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

CONFIG = """
default_scope = 'mmdet'
auto_classes = True
data_root = {root!r}
part = dict(type='CocoDataset', data_root=data_root, ann_file='train.json')
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
    type='ConcatDataset', datasets=[part, dict(part, ann_file='more.json', metainfo=dict(palette=[(1, 2, 3)]))])))
val_dataloader = dict(dataset=dict(part, ann_file='val.json', metainfo=dict(classes=('elk', ), palette='random')))
test_dataloader = dict(dataset=dict(part, ann_file='test.json'))
model = dict(
    type='HybridTaskCascade', backbone=dict(type='ResNet', num_classes=1000), rpn_head=dict(num_classes=1),
    roi_head=dict(
        bbox_head=[dict(num_classes=80, loss_cls=dict(type='SeesawLoss', num_classes=1203)), dict(num_classes=None)],
        mask_head=dict(num_classes=80), semantic_head=dict(num_classes=183)),
    panoptic_head=dict(num_things_classes=80))
"""
CLASSES = ('pine', 'fir: "old"', 'лес')


def write(path, names):
    path.write_text(json.dumps(dict(images=[], annotations=[], categories=[
        dict(id=7 * index, name=name) for index, name in enumerate(names, 1)])))


@pytest.fixture
def folder(tmp_path):
    """A config and the annotation files of its train, val and test data sets, which are nothing but categories."""
    for name in ('train', 'more', 'val'):
        write(tmp_path / f'{name}.json', CLASSES)
    write(tmp_path / 'test.json', ['elk', *CLASSES])
    (tmp_path / 'config.py').write_text(CONFIG.format(root=f'{tmp_path}/'))
    return tmp_path


def load(folder, **options):
    return load_config(str(folder / 'config.py'), options)


def problem_of(folder, **options):
    with pytest.raises(SetupError) as error:
        load(folder, **options)
    problem, remedy = str(error.value).splitlines()
    return problem.replace(f'{folder}/', ''), remedy


def assert_filled(cfg, classes=CLASSES):
    parts = cfg.train_dataloader.dataset.dataset.datasets
    assert {tuple(part.metainfo.classes) for part in [
        *parts, cfg.val_dataloader.dataset, cfg.test_dataloader.dataset]} == {classes}
    head, other = cfg.model.roi_head.bbox_head
    assert {head.num_classes, head.loss_cls.num_classes, other.num_classes, cfg.model.roi_head.mask_head.num_classes,
            cfg.model.panoptic_head.num_things_classes} == {len(classes)}
    assert 'auto_classes' not in cfg


def test_every_data_set_and_head(folder):
    cfg = load(folder)
    assert_filled(cfg)
    assert cfg.model.backbone.num_classes == 1000 and cfg.model.rpn_head.num_classes == 1
    assert cfg.model.roi_head.semantic_head.num_classes == 183
    assert 'num_things_classes' not in cfg.model.roi_head.mask_head
    palettes = [part.metainfo.get('palette') for part in cfg.train_dataloader.dataset.dataset.datasets]
    assert palettes == [None, None] and cfg.val_dataloader.dataset.metainfo.palette == 'random'


def test_a_saved_config_needs_no_data(folder):
    load(folder).dump(folder / 'saved.py')
    shutil.copy(folder / 'saved.py', folder / 'config.py')
    write(folder / 'train.json', ['elk'])
    assert_filled(load(folder))
    for path in folder.glob('*.json'):
        path.unlink()
    assert_filled(load(folder))


def test_order_of_the_file(folder):
    """That of Objects365 numbers categories by their ids, not in the order of the file."""
    for name in ('train', 'more', 'val'):
        content = json.loads((folder / f'{name}.json').read_text())
        content['categories'].reverse()
        (folder / f'{name}.json').write_text(json.dumps(content))
    assert_filled(load(folder), CLASSES[::-1])
    text = (folder / 'config.py').read_text()
    (folder / 'config.py').write_text(text.replace('CocoDataset', 'Objects365V1Dataset'))
    assert_filled(load(folder))


def test_only_some_of_the_files(folder):
    """To test or predict, the data to train on need not be there."""
    for name in ('train', 'more'):
        (folder / f'{name}.json').unlink()
    assert_filled(load(folder))
    (folder / 'val.json').unlink()
    assert_filled(load(folder), ('elk', *CLASSES))
    (folder / 'test.json').unlink()
    problem, remedy = problem_of(folder)
    assert problem == 'auto_classes reads the classes from the annotations, and there is no train.json'
    assert 'data_root=FOLDER' in remedy and 'work dir' in remedy


def test_options(folder, tmp_path_factory):
    """data_root moves the annotations first; what options say of classes counts, and auto_classes is itself one."""
    moved = tmp_path_factory.mktemp('moved')
    for name in ('train', 'more', 'val'):
        write(moved / f'{name}.json', ['elk'])
    assert_filled(load(folder, data_root=str(moved)), ('elk', ))
    cfg = load(folder, **{'model.roi_head.mask_head.num_classes': 5, 'auto_classes': True})
    assert cfg.model.roi_head.mask_head.num_classes == 5 and cfg.model.roi_head.bbox_head[0].num_classes == 3
    assert 'auto_classes' not in cfg
    off = load(folder, auto_classes=False)
    assert off.val_dataloader.dataset.metainfo.classes == ('elk', ) and 'auto_classes' not in off
    (folder / 'config.py').write_text((folder / 'config.py').read_text().replace('auto_classes = True', ''))
    assert load(folder).model.roi_head.mask_head.num_classes == 80
    assert_filled(load(folder, auto_classes=True))


@pytest.mark.parametrize('name', ['more', 'val'])
@pytest.mark.parametrize(('classes', 'said'), [
    (CLASSES[:2], 'only train.json has лес'),
    ((*CLASSES, 'elk'), 'only {}.json has elk'),
    ((*CLASSES[:2], 'elk'), 'only train.json has лес, only {}.json has elk'),
    ((CLASSES[0], *CLASSES[:0:-1]), 'where the first has fir: "old", the other has лес')])
def test_data_sets_of_different_classes(folder, name, classes, said):
    write(folder / f'{name}.json', classes)
    problem, remedy = problem_of(folder)
    assert problem == (f'train.json and {name}.json have different categories, and auto_classes needs one list: '
                       + said.format(name)) and 'metainfo=dict(classes=...)' in remedy


@pytest.mark.parametrize(('content', 'said'), [
    ('{}', 'has no list of categories'),
    ('{"categories": ', 'is no JSON file'),
    ('{"categories": []}', 'has no categories'),
    ('{"categories": [{"id": 1}]}', 'have no name'),
    ('{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', 'names of categories that several share'),
])
def test_annotations_without_classes(folder, content, said):
    (folder / 'train.json').write_text(content)
    assert said in problem_of(folder)[0]


@pytest.mark.parametrize('kind', ['VOCDataset', 'CocoPanopticDataset', 'NoSuchDataset'])
def test_other_data_sets(folder, kind):
    (folder / 'config.py').write_text((folder / 'config.py').read_text().replace('CocoDataset', kind))
    problem, remedy = problem_of(folder)
    assert f"the train data set is a {kind} with ann_file='train.json'" in problem and 'to_coco.py' in remedy


def test_no_data_sets():
    with pytest.raises(SetupError, match='has no data set'):
        fill_classes(Config(dict()))


# Trainings and tests that go on with other annotations

@pytest.fixture(scope='module')
def configs(digits, tmp_path_factory):
    """Two of the digits, one with their categories in another order."""
    folder = tmp_path_factory.mktemp('configs')
    ours = f'_base_ = {str(DIGITS_CONFIG)!r}\nauto_classes = True\n'
    (folder / 'ours.py').write_text(ours)
    files = {}
    for split in ('train', 'val'):
        content = json.loads((digits / f'annotations/instances_{split}2017.json').read_text())
        content['categories'].reverse()
        files[split] = str(folder / f'{split}.json')
        Path(files[split]).write_text(json.dumps(content))
    files['test'] = files['val']
    (folder / 'reordered.py').write_text(ours + ''.join(
        f'{split}_dataloader = dict(dataset=dict(ann_file={path!r}))\n{split}_evaluator = dict(ann_file={path!r})\n'
        for split, path in files.items()).replace('train_evaluator', 'other'))
    return folder


def test_resume_and_test_with_other_annotations(make_runner, configs):
    """Heads have the right number of classes, which are in another order than they were trained in."""
    trained = make_runner(configs / 'ours.py')
    trained.train()
    saved = Config.fromfile(next(Path(trained.work_dir).glob('*.py')))
    assert list(saved.train_dataloader.dataset.metainfo.classes) == [*'0123456789'] and 'auto_classes' not in saved
    checkpoint = f'{trained.work_dir}/epoch_1.pth'
    for run, resume in (('train', True), ('test', False)):
        other = make_runner(configs / 'reordered.py', load_from=checkpoint, resume=resume)
        with pytest.raises(SetupError, match='trained with the classes 0, 1, 2, 3, 4 and 5 more; the data set has 9, 8'):
            getattr(other, run)()
    make_runner(configs / 'reordered.py', load_from=checkpoint).train()  # which may go on to other classes


@pytest.mark.parametrize(('classes', 'resumes', 'tests'), [
    (('a', 'b'), True, True), (('b', 'a'), False, False), (('a', 'c'), False, True), (None, True, True)])
def test_classes_of_a_checkpoint(classes, resumes, tests):
    """To test, classes may have other names, for the detector is the same."""
    dataset = SimpleNamespace(metainfo=dict(classes=['a', 'b']))
    for meta in (dict(dataset_meta=dict(classes=classes)), *([{}, None] if classes is None else [])):
        for strictly, fits in ((True, resumes), (False, tests)):
            if fits:
                check_trained_classes(dict(meta=meta), dataset, strictly)
            else:
                with pytest.raises(SetupError, match='trained with the classes'):
                    check_trained_classes(dict(meta=meta), dataset, strictly)
