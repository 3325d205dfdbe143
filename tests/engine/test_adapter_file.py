"""The adapter file of a training: the weights that were validated, and a card of what only the training knows."""
import json
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.model import BaseModule
from safetensors import safe_open

from liera_mm import adapter_state_dict, load_adapter
from liera_mm.core.checkpoint import adapter_card
from liera_mm.core.errors import SetupError
from liera_mm.engine.adapter_file import training_card
from liera_mm.engine.hook import LieRAHook
from liera_mm.engine.safe_loading import read_checkpoint
from liera_mm.models.pretrained import PretrainedBackbone

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')


@pytest.fixture(scope='module', params=[False, True], ids=['as trained', 'averaged'])
def trained(make_runner, request):
    """A training whose evaluator also gives what is no number."""
    averages = [dict(type='EMAHook', momentum=.5)] if request.param else []
    runner = make_runner(custom_hooks=[dict(type='LieRAHook', card=dict(license='cc0-1.0')), *averages])
    runner.train()
    return runner


def test_it_is_the_adapter_of_the_checkpoint(trained):
    path = Path(trained.work_dir, 'adapter.safetensors')
    backbone = trained.model.backbone
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(backbone).items()}
    load_adapter(backbone, path)
    state = read_checkpoint(f'{trained.work_dir}/epoch_1.pth', 'cpu')['state_dict']
    ours = adapter_state_dict(backbone)
    assert all(torch.equal(tensor, state[f'backbone.{name}']) for name, tensor in ours.items())
    averaged = any(type(hook).__name__ == 'EMAHook' for hook in trained.hooks)
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.items()) != averaged


def test_card(trained):
    path = Path(trained.work_dir, 'adapter.safetensors')
    with safe_open(path, 'pt') as file:
        card = json.loads(file.metadata()['card'])
    log = next(Path(trained.work_dir).glob('*/vis_data/scalars.json')).read_text().splitlines()
    metrics = next(json.loads(line) for line in log if 'coco/bbox_mAP' in line)
    expected = {name: value for name, value in metrics.items() if name.startswith('coco/') and value != -1}
    assert card['metrics'] == expected and len(expected) > 5
    assert card['classes'] == [*'0123456789'] and card['data'] == '4 images of CocoDataset'
    assert card['base_source'] == 'liera://mask-rcnn_convnextv2-mini_glyphs, below backbone.'
    assert card['versions'].keys() == {'liera_mm', 'torch', 'mmengine', 'mmcv', 'mmdet'}
    text = adapter_card(path)
    assert text == path.with_suffix('.md').read_text()
    front = yaml.safe_load(text.split('---')[1])
    assert front['license'] == 'cc0-1.0' and front['base_model'] == 'ConvNeXt' and 'object-detection' in front['tags']
    assert front['metrics'] == [*expected] and 'It is of backbone.' in text


def test_folders_of_the_machine_are_no_part_of_the_card():
    class Backbone(PretrainedBackbone, BaseModule):
        pass

    backbone = Backbone()
    assert backbone.base_card() == dict(base_model='Backbone', base_source='')
    backbone.set_base(dict(checkpoint='/home/me/weights.pth', prefix=None), set())
    assert backbone.base_card()['base_source'] == 'weights.pth'


def test_data_without_classes():
    card = training_card('backbone', torch.utils.data.TensorDataset(torch.zeros(3)), dict(a=-1, b=.5), 'mine')
    assert card['metrics'] == dict(b=.5) and card['classes'] == []
    assert card['data'] == '3 images of TensorDataset' and card['tags'] == ['liera', 'parameter-efficient-fine-tuning']


def test_what_no_card_has():
    with pytest.raises(SetupError, match='has no licence\nIt has base_model, .*license'):
        LieRAHook(card=dict(licence='mit'))
