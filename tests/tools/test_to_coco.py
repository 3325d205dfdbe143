"""tools/dataset_converters/to_coco.py: VOC, YOLO and COCO give the same annotations; splits; what it refuses."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('globox')

from liera_mm.core.errors import SetupError

sys.path.append(str(Path(__file__).parents[2] / 'tools/dataset_converters'))

import to_coco

CLASSES = ['dog', 'cat']  # not by the alphabet
BOXES = {'a': [('cat', 10, 20, 40, 60), ('dog', 0, 0, 80, 60)], 'b/c': [('dog', 3, 4, 13, 24)], 'b/d': []}
SIZES = {'a': (80, 60), 'b/c': (40, 30), 'b/d': (64, 48)}


@pytest.fixture
def folder(tmp_path):
    """Images in a folder and in one below it; the last has no object."""
    for name, suffix in zip(BOXES, ('.jpg', '.PNG', '.webp')):
        path = tmp_path / f'photos/{name}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', SIZES[name]).save(path)
    (tmp_path / 'photos/notes.md').write_text('no image')
    (tmp_path / 'photos/._a.jpg').write_text('what some systems keep of an image')
    return tmp_path


def write_voc(folder):
    for name, boxes in BOXES.items():
        path = folder / f'labels/{name}.xml'
        path.parent.mkdir(parents=True, exist_ok=True)
        objects = ''.join(
            f'<object><name>{label}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>'
            '</bndbox></object>' for label, x1, y1, x2, y2 in boxes)
        path.write_text('<annotation><filename>elsewhere.jpg</filename><size><width>1</width><height>1</height></size>'
                        f'{objects}</annotation>')


def write_yolo(folder, polygons=False, names='classes.txt'):
    for name, boxes in BOXES.items():
        path, lines = folder / f'labels/{name}.txt', []
        path.parent.mkdir(parents=True, exist_ok=True)
        for label, *corners in boxes:
            x1, y1, x2, y2 = np.array(corners) / np.tile(SIZES[name], 2)
            shape = (x1, y1, x2, y1, x2, y2) if polygons else ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
            lines.append(' '.join([str(CLASSES.index(label)), *map(repr, map(float, shape))]))
        path.write_text('\n'.join(lines) + '\n\n')
    text = {'classes.txt': '\n'.join(CLASSES), 'data.yaml': f'nc: 2\nnames: {CLASSES}',
            'dataset.yaml': 'names: {1: cat, 0: dog}'}
    (folder / ('labels' if names == 'classes.txt' else '') / names).write_text(text[names])


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """A function that runs the tool, and gives what it wrote and printed."""

    def run(*args, annotations='labels', out='out.json', images='photos'):
        monkeypatch.setattr(sys, 'argv', ['to_coco.py', str(folder / images), str(folder / annotations), str(folder / out),
                                          *map(str, args)])
        to_coco.main()
        return json.loads((folder / out).read_text()) if out.endswith('.json') else None, capsys.readouterr().out

    return run


def objects(content):
    """Of annotations in COCO's format: by name of the image, name of the class and corners of each box."""
    names = {category['id']: category['name'] for category in content['categories']}
    found = {image['file_name']: [] for image in content['images']}
    files = {image['id']: image['file_name'] for image in content['images']}
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        assert annotation['area'] == pytest.approx(w * h) and annotation['iscrowd'] == 0
        found[files[annotation['image_id']]].append((names[annotation['category_id']], *np.round([x, y, x + w, y + h], 6)))
    return found


EXPECTED = dict(zip(('a.jpg', 'b/c.PNG', 'b/d.webp'), BOXES.values()))


def test_voc(run, folder):
    """The names of the files count, not those in them, nor the sizes."""
    write_voc(folder)
    content, printed = run()
    assert objects(content) == EXPECTED and printed.endswith('out.json: 3 images, 3 objects, of cat, dog\n')
    assert [(image['width'], image['height']) for image in content['images']] == [*SIZES.values()]
    assert [annotation['id'] for annotation in content['annotations']] == [1, 2, 3]  # 0 is none, to COCO's evaluation
    (folder / 'names.txt').write_text('dog\n\nfox\ncat\n')
    again, _ = run('--force', '--classes', folder / 'names.txt')
    assert [category['name'] for category in again['categories']] == ['dog', 'fox', 'cat'] and objects(again) == EXPECTED


@pytest.mark.parametrize('names', ['classes.txt', 'data.yaml', 'dataset.yaml'])
@pytest.mark.parametrize('polygons', [False, True])
def test_yolo(run, folder, names, polygons):
    write_yolo(folder, polygons, names)
    content, _ = run()
    assert objects(content) == EXPECTED
    assert [category['name'] for category in content['categories']] == CLASSES


@pytest.mark.parametrize(('name', 'text'), [
    ('labels/classes.txt', '\ufeffdog\r\ncat'), ('labels/a.txt', '\ufeff0 .5 .5 1 1'),
    ('data.yaml', '\ufeffnames: [dog, cat]'), ('data.yaml', "names: {'1': cat, '0': dog}"),
    ('data.yaml', f'names: {({str(i): f"c{i:02}" for i in range(11)})}')], ids=range(5))
def test_files_as_other_programs_write_them(run, folder, name, text):
    """With a mark of their encoding in front, and numbers that are texts, of which '10' comes before '2'."""
    write_yolo(folder, names='data.yaml' if name == 'data.yaml' else 'classes.txt')
    (folder / name).write_text(text)
    content, _ = run()
    names = [category['name'] for category in content['categories']]
    assert names == ([f'c{i:02}' for i in range(11)] if len(names) > 2 else CLASSES)
    assert objects(content)['b/c.PNG'] == [(names[0], *EXPECTED['b/c.PNG'][0][1:])]


def test_names_of_voc_are_stripped(run, folder):
    write_voc(folder)
    replace('labels/a.xml', 'dog', '\n  dog ')(folder)
    assert objects(run()[0]) == EXPECTED


def test_difficult_objects_of_voc(run, folder):
    """Are crowds, which are neither learnt nor to be found."""
    write_voc(folder)
    replace('labels/a.xml', '<name>cat</name>', '<name>cat</name><difficult> 1 </difficult>')(folder)
    replace('labels/b/c.xml', '<name>dog</name>', '<name>dog</name><difficult>0</difficult>')(folder)
    assert [entry['iscrowd'] for entry in run()[0]['annotations']] == [1, 0, 0]


@pytest.mark.parametrize('change', [
    lambda text: f'<?xml version="1.0" encoding="ISO-8859-1"?><!-- B\xe4r -->{text}'.encode('latin-1'),
    lambda text: f'<?xml version="1.0" encoding="UTF-16"?>{text}'.encode('utf-16'),
    lambda text: text.replace('\n', '\r\n').encode('utf-8-sig'),
    lambda text: re.sub('<size>.*</size>|<filename>.*</filename>', '', text).encode()], ids=range(4))
def test_files_of_voc_as_other_programs_write_them(run, folder, change):
    """In the encoding that they name, or without what need not be there."""
    write_voc(folder)
    path = folder / 'labels/a.xml'
    path.write_bytes(change(path.read_text()))
    assert objects(run()[0]) == EXPECTED


@pytest.mark.parametrize('write', [write_voc, write_yolo])
def test_suffixes_in_capitals(run, folder, write):
    write(folder)
    for path in [*folder.glob('labels/**/[abcd].*')]:
        path.rename(path.with_suffix(path.suffix.upper()))
    assert objects(run()[0]) == EXPECTED


def test_sizes_that_voc_says(run, folder):
    """An image that was annotated as it is stored has its boxes there; one of another size is not what was annotated."""
    write_voc(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (80, 60)).save(folder / 'photos/a.jpg', exif=exif)
    says = '<width>{}</width><height>{}</height>'.format
    replace('labels/a.xml', says(1, 1), says(80, 60))(folder)
    content = run()[0]
    assert (content['images'][0]['width'], content['images'][0]['height']) == (80, 60)
    replace('labels/a.xml', says(80, 60), says(160, 120))(folder)
    with pytest.raises(SetupError, match='a.xml .* it is of an image of 160x120 pixels, and a.jpg has 60x80\n'):
        run('--force')


def test_detections_of_yolo(run, folder):
    """Whose confidence is no part of an annotation."""
    write_yolo(folder)
    path = folder / 'labels/b/c.txt'
    path.write_text(path.read_text().strip() + ' 0.75\n')
    content, _ = run()
    assert objects(content) == EXPECTED and not any('score' in annotation for annotation in content['annotations'])


def test_annotations_beside_the_images(run, folder):
    write_yolo(folder)
    for path in [*(folder / 'labels').rglob('*.txt')]:
        path.rename(folder / 'photos' / path.relative_to(folder / 'labels'))
    assert objects(run(annotations='photos')[0]) == EXPECTED


def test_turned_images(run, folder):
    """YOLO's shares are of the image as it is shown, and so it is read to train."""
    write_yolo(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 80)).save(folder / 'photos/a.jpg', exif=exif)
    content, _ = run()
    assert (content['images'][0]['width'], content['images'][0]['height']) == (80, 60) and objects(content) == EXPECTED


def test_what_has_no_counterpart(run, folder):
    write_voc(folder)
    (folder / 'labels/a.xml').rename(folder / 'labels/z.xml')
    content, printed = run()
    assert objects(content) == dict(EXPECTED, **{'a.jpg': []})
    assert f'1 of 3 annotation files belong to no image, such as {folder}/labels/z.xml\n' in printed
    assert '1 of 3 images have no annotation file, and are taken to have no object, such as ' in printed


@pytest.fixture
def ten(tmp_path):
    """Ten images with an object and its mask each, in COCO's format."""
    (tmp_path / 'photos').mkdir(exist_ok=True)
    images = [dict(id=f'i{number}', file_name=f'{number}.jpg', width=8, height=8) for number in range(10)]
    for image in images:
        Image.new('RGB', (8, 8)).save(tmp_path / 'photos' / image['file_name'])
    annotations = [dict(id=number, image_id=f'i{number}', category_id=3, bbox=[0, 0, 4, 4], area=8, iscrowd=0,
                        segmentation=[[0, 0, 4, 0, 4, 4]]) for number in range(10)]
    content = dict(info=dict(year=2026), images=images, annotations=annotations, categories=[dict(id=3, name='cat')])
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    return content


@pytest.mark.parametrize(('share', 'count'), [(.2, 2), (.31, 3), (.01, 1), (.99, 9)])
def test_split(run, folder, ten, share, count):
    """Every image is in one of two files with its annotations, of which nothing is lost; the same seed draws the same."""
    run('--val', share, annotations='coco.json', out='out')
    parts = [json.loads((folder / f'out/{name}.json').read_text()) for name in ('train', 'val')]
    assert [len(part['images']) for part in parts] == [10 - count, count]
    for key in ('images', 'annotations'):
        both = parts[0][key] + parts[1][key]
        assert sorted(both, key=lambda entry: entry['id']) == ten[key]
    for part in parts:
        assert [annotation['image_id'] for annotation in part['annotations']] == [image['id'] for image in part['images']]
        assert part['categories'] == ten['categories'] and part['info'] == ten['info']
    run('--val', share, annotations='coco.json', out='again')
    assert (folder / 'again/val.json').read_bytes() == (folder / 'out/val.json').read_bytes()
    run('--val', share, '--seed', 1, annotations='coco.json', out='other')
    assert (folder / 'other/val.json').read_bytes() != (folder / 'out/val.json').read_bytes()


def test_what_is_there_is_kept(run, folder, ten):
    (folder / 'out').mkdir()
    (folder / 'out/val.json').write_text('mine')
    with pytest.raises(SetupError, match='val.json is there already\n.*--force'):
        run(annotations='coco.json', out='out')
    assert (folder / 'out/val.json').read_text() == 'mine' and not (folder / 'out/train.json').exists()
    run('--force', annotations='coco.json', out='out')
    assert json.loads((folder / 'out/val.json').read_text())


def remove(name):
    return lambda folder: (folder / name).unlink()


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def replace(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


@pytest.mark.parametrize(('kind', 'change', 'args', 'problem'), [
    (write_voc, put('labels/a.xml', '<annotation>'), {}, 'a.xml cannot be read as annotations of Pascal VOC: no element'),
    (write_voc, put('labels/a.xml', '<annotation></annotation>'), {}, 'a.xml cannot be read as annotations of Pascal VOC'),
    (write_voc, put('photos/a.jpg', 'no image'), {}, 'a.jpg cannot be read as an image'),
    (write_voc, put('photos/a.png', ''), {}, 'photos/a.jpg and .*photos/a.png would have the same annotations'),
    (write_voc, put('names.txt', 'cat'), dict(classes='names.txt'), 'has objects of dog, which --classes does not name'),
    (write_voc, put('names.txt', '\n'), dict(classes='names.txt'), 'names.txt has no names of classes'),
    (write_voc, lambda folder: None, dict(classes='nowhere.txt'), 'There is no .*nowhere.txt'),
    (write_voc, lambda folder: None, dict(images='nowhere'), 'There is no .*nowhere'),
    (write_voc, lambda folder: None, dict(images='labels'), 'There are no images in .*labels'),
    (write_voc, lambda folder: None, dict(images='photos/b', annotations='photos'), 'photos has no .xml or .txt file'),
    (write_voc, lambda folder: None, dict(images='photos/b'),
     'None of the 3 annotation files in .*labels has the name of an image in .*photos/b, such as a'),
    (write_yolo, remove('labels/classes.txt'), {}, 'YOLO numbers its classes, and there is no classes.txt or data.yaml'),
    (write_yolo, put('labels/classes.txt', 'dog'), {}, 'a.txt has an object of class 1, and the classes have 1 names: dog'),
    (write_voc, replace('labels/b/c.xml', 'dog', ' '), {}, 'c.xml .*: an object has no name'),
    (write_yolo, put('labels/classes.txt', 'dog\ncat\ndog'), {}, 'classes.txt has 1 names of classes that several share'),
    (write_yolo, put('c.yaml', 'names: {1: dog, 2: cat}'), dict(classes='c.yaml'), 'c.yaml numbers its classes 1, 2'),
    (write_yolo, put('c.yaml', 'names: {a: dog}'), dict(classes='c.yaml'), 'c.yaml numbers its classes a'),
    (write_yolo, put('c.yaml', '[dog, cat]'), dict(classes='c.yaml'), 'c.yaml has no names of classes'),
    (write_yolo, put('c.yaml', 'names: 2'), dict(classes='c.yaml'), 'c.yaml has no names of classes'),
    (write_yolo, put('c.yaml', 'names: [dog'), dict(classes='c.yaml'), 'c.yaml cannot be read'),
    (write_yolo, lambda folder: (folder / 'labels/classes.txt').write_bytes('dog'.encode('utf-16')), {},
     'classes.txt cannot be read'),
    (write_yolo, lambda folder: None, dict(classes='photos'), 'photos cannot be read'),
    (write_yolo, lambda folder: (folder / 'labels/b/d.txt').unlink() or (folder / 'labels/b/d.txt').mkdir(), {},
     'd.txt cannot be read as annotations'),
    (write_yolo, put('labels/a.txt', 'cat .5 .5 .5 .5'), {}, 'a.txt has an object of class cat'),
    (write_yolo, put('labels/a.txt', '0 .5 .5 .5'), {}, 'a.txt cannot be read as annotations of YOLO: Syntax error'),
    (write_yolo, put('labels/a.txt', '0 .5 .5 .5 half'), {}, 'a.txt cannot be read as annotations of YOLO'),
    (write_yolo, put('labels/a.txt', '0 .5 .5 -.5 .5'), {}, 'a.txt cannot be read as annotations of YOLO'),
], ids=lambda value: value if isinstance(value, str) else None)
def test_what_it_refuses(run, folder, kind, change, args, problem):
    kind(folder)
    change(folder)
    classes = ('--classes', folder / args.pop('classes')) if 'classes' in args else ()
    with pytest.raises(SetupError, match=problem) as error:
        run(*classes, **args)
    assert len(str(error.value).splitlines()) == 2 and not (folder / 'out.json').exists()


@pytest.mark.parametrize(('change', 'problem'), [
    (lambda content: content['images'].__delitem__(slice(1, None)), 'There is 1 image'),
    (lambda content: content.pop('categories'), 'has no list of categories'),
    (lambda content: content['categories'][0].pop('name'), '1 of 1 categories .* have no name'),
    (lambda content: content['annotations'][0].pop('image_id'), '1 of 10 annotations .* have no image_id'),
    (lambda content: [image.update(id=int(image['id'][1:])) or entry.update(image_id=str(image['id']))
                      for image, entry in zip(content['images'], content['annotations'])], 'would be lost: .* text'),
    (lambda content: content['images'][0].update(file_name='photos/0.jpg'), '1 of 10 images .* the first is photos/0.jpg')])
def test_what_it_refuses_of_coco(run, folder, ten, change, problem):
    change(ten)
    (folder / 'coco.json').write_text(json.dumps(ten))
    with pytest.raises(SetupError, match=problem):
        run(annotations='coco.json', out='out')
