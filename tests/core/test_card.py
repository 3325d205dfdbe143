"""Cards of adapters: in the header and beside the file, whatever characters are in them, and never in the way."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from liera_mm import __version__, adapt, adapter_state_dict, load_adapter, save_adapter
from liera_mm.core.card import Card, markdown
from liera_mm.core.checkpoint import adapter_card, seal

pytestmark = pytest.mark.usefixtures('one_thread')

AWKWARD = ['pine', 'fir: "old"', "'quoted'", 'a|b', '`code`', '```\n# no heading', '---', '- item', '#1', '{}', 'yes', '1e3',
           '', ' ', 'лес', '\U0001f332', 'tab\t', 'line\u2028end', 'next\x85line', '\x7f', '\ufeff', '\x00', '\ud800',
           '<script>', '\\', '%', '@', '&a', '*a', '!tag', 'a: b', 'null']
CARD = dict(base_model='some/resnet: "50"', base_source='https://example.org/a.pth', data='3 images', classes=AWKWARD,
            metrics={'coco/bbox_mAP': .25, 'a: b': 3, 'tiny': 1e-7}, tags=['tag: 1', 'лес'], license='cc-by-4.0',
            versions=dict(mmdet='3.3'), notes=['The *heads* are elsewhere.\n# no heading'])


@pytest.fixture
def model(net, perturb):
    return perturb(adapt(net, rank=2, overrides=[dict(targets=['depthwise'], method='dense')]))


@pytest.fixture
def path(model, tmp_path):
    save_adapter(model, tmp_path / 'task.safetensors', card=CARD)
    return tmp_path / 'task.safetensors'


def parts(text):
    """What a strict parser of YAML reads in front, the sections by heading, and the blocks of code."""
    _, front, body = re.split('^---$', text, maxsplit=2, flags=re.M)
    headings = re.split('^(#+ .*)$', re.sub('^```.*?^```$', '', body, flags=re.M | re.S), flags=re.M)
    return yaml.safe_load(front), dict(zip(headings[1::2], headings[2::2])), dict(
        re.findall('^```(\\w+)\n(.*?)\n```$', body, flags=re.M | re.S))


def test_page(path, model):
    text = path.with_suffix('.md').read_bytes().decode()
    front, sections, blocks = parts(text)
    assert front == dict(library_name='liera_mm', base_model=CARD['base_model'], license='cc-by-4.0', tags=CARD['tags'],
                         metrics=['coco/bbox_mAP', 'a: b', 'tiny'])
    assert list(front) == ['library_name', 'base_model', 'license', 'tags', 'metrics']
    assert list(sections) == ['# task.safetensors', '## Results', f'## Classes ({len(AWKWARD)})', '## Use', '## Versions']
    assert json.loads(blocks['json']) == AWKWARD == yaml.safe_load(blocks['json'])
    assert '- `coco/bbox_mAP`: 0.25\n- `a: b`: 3\n- `tiny`: 1e-07' in text
    about = sections['# task.safetensors']
    assert '- Base: `some/resnet: "50"`\n- Weights of the base: `https://example.org/a.pth`\n- Trained on: `3' in about
    assert 'The \\*heads\\* are elsewhere. \\# no heading' in about
    numbers = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    assert f'- Parameters: `{numbers}`\n' in about
    assert f'- liera\\_mm: `{__version__}`\n- torch: `{torch.__version__}`\n- mmdet: `3.3`' in sections['## Versions']


def test_the_use_that_it_says(path, model, net, tmp_path, monkeypatch):
    """The code of the page gives the adapter."""
    expected = model.state_dict()
    fresh = type(net)().eval()
    fresh.load_state_dict({name: tensor for name, tensor in expected.items() if '.adapter.' not in name})
    monkeypatch.chdir(tmp_path)
    exec(parts(path.with_suffix('.md').read_text())[2]['python'], dict(model=fresh))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.state_dict().items())


def test_header(path):
    with safe_open(path, 'pt') as file:
        stored = json.loads(file.metadata()['card'])
    assert {name: stored[name] for name in CARD if name != 'versions'} == {
        name: value for name, value in CARD.items() if name != 'versions'}
    assert adapter_card(path) == path.with_suffix('.md').read_bytes().decode()
    path.with_suffix('.md').unlink()
    assert parts(adapter_card(path))[0]['license'] == 'cc-by-4.0'


def test_every_single_character():
    """YAML and JSON read back what Markdown quotes, of any text."""
    characters = [chr(number) for number in [*range(0x300), *range(0x2000, 0x2070), *range(0xd7f0, 0xe010), *range(
        0xfdd0, 0x10010), 0x1f332, 0x10ffff]]
    text = markdown(Card(base_model=''.join(characters), classes=characters, tags=characters), 'a.safetensors', {}, 0)
    front, _, blocks = parts(text.encode().decode())
    assert front['tags'] == characters and front['base_model'] == ''.join(characters)
    assert json.loads(blocks['json']) == characters
    assert len(text.splitlines()) == len(text.split('\n')) - 1


def test_without_a_card(model, tmp_path):
    """There is one all the same, of what the file itself says."""
    save_adapter(model, tmp_path / 'adapter')
    front, sections, _ = parts((tmp_path / 'adapter.md').read_text())
    assert front['license'] == 'unknown' and 'base_model' not in front and 'metrics' not in front
    assert list(sections) == ['# adapter', '## Use', '## Versions']


def test_names_with_a_point(model, tmp_path):
    for name in ('lr0.1', 'lr0.2', 'task.safetensors'):
        save_adapter(model, tmp_path / name)
    assert {page.name for page in tmp_path.glob('*.md')} == {'lr0.1.md', 'lr0.2.md', 'task.md'}
    assert '# lr0.1\n' in (tmp_path / 'lr0.1.md').read_text()


def test_files_without_a_card_load(path, model):
    with safe_open(path, 'pt') as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ('card', 'checksum')}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    path.write_bytes(seal(tensors, metadata))
    load_adapter(model, path)
    assert parts(adapter_card(path))[0] == dict(library_name='liera_mm', license='unknown',
                                                tags=['liera', 'parameter-efficient-fine-tuning'])
    old = Path(__file__).parents[1] / 'data/adapter_format_1.safetensors'
    assert adapter_card(old).startswith('---\nlibrary_name: liera_mm\n')


@pytest.mark.parametrize('number', [.5, np.float32(.5), np.float64(.5), torch.tensor(.5)], ids=repr)
def test_metrics_are_numbers_of_any_library(model, path, number):
    save_adapter(model, path, card=dict(metrics=dict(mAP=number)))
    assert '`mAP`: 0.5' in adapter_card(path)


@pytest.mark.parametrize('card', ['', '[]', '{"other": 1}', '{"metrics": {"mAP": "good"}}'])
def test_a_card_that_cannot_be_read(path, model, card):
    """It is no reason not to load the adapter."""
    with safe_open(path, 'pt') as file:
        metadata = dict(file.metadata(), card=card)
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del metadata['checksum']
    path.write_bytes(seal(tensors, metadata))
    load_adapter(model, path)
    with pytest.raises(ValueError, match='task.safetensors .* card'):
        adapter_card(path)


@pytest.mark.parametrize(('card', 'error'), [
    (dict(metrics=dict(mAP=float('nan'))), ValueError), (dict(metrics=dict(mAP=float('inf'))), ValueError),
    (dict(metrics=dict(mAP='good')), ValueError), (dict(metrics=dict(mAP=None)), ValueError),
    (dict(licence='mit'), TypeError)], ids=str)
def test_what_is_refused(model, tmp_path, card, error):
    with pytest.raises(error):
        save_adapter(model, tmp_path / 'adapter', card=card)
    assert not [*tmp_path.iterdir()]


def test_a_page_of_somebody_else_stays(model, path):
    """One of our own is replaced."""
    page = path.with_suffix('.md')
    save_adapter(model, path)
    assert 'license: "unknown"' in page.read_text()
    page.write_text('# My notes')
    save_adapter(model, path, card=CARD)
    assert page.read_text() == '# My notes' and 'cc-by-4.0' in adapter_card(path)


def test_the_page_appears_when_it_is_complete(model, tmp_path, monkeypatch):
    """After the file that it is of, and if it cannot be written, the file is there."""
    page, seen = tmp_path / 'adapter.md', []
    monkeypatch.setattr(os, 'fsync', lambda file: seen.append((page.exists(), os.fstat(file).st_size)))
    save_adapter(model, tmp_path / 'adapter')
    assert seen == [(False, (tmp_path / 'adapter').stat().st_size), (False, page.stat().st_size)]
    monkeypatch.setattr(os, 'replace', lambda source, to, replace=os.replace: 1 / 0 if str(to) == str(page)
                        else replace(source, to))
    before = page.read_bytes()
    with pytest.raises(ZeroDivisionError):
        save_adapter(model, tmp_path / 'adapter', card=CARD)
    assert page.read_bytes() == before and 'cc-by-4.0' in adapter_card(tmp_path / 'adapter')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['adapter', 'adapter.md']
