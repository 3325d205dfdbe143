"""Models of transformers and diffusers: the paper's trainable shares, and the page that shows how to train one."""
import importlib.util
import re
from pathlib import Path

import pytest
import torch

import liera_mm

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('paper_tables', ROOT / 'tools/analysis_tools/paper_tables.py')
paper_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(paper_tables)

# Adapted layers, parameters of the network itself
SIZES = {
    'DeBERTaV3-base': (12 * 6, 183_831_552),
    'DeBERTaV3-large': (24 * 6, 434_012_160),
    'LLaMA-7B': (32 * 5, 6_738_415_616),
    'LLaMA3-8B': (32 * 5, 8_030_261_248),
    'SDXL UNet': (794, 2_567_463_684),
}


def adapted(name, rank):
    """The network, its layers adapted; skips where its package is missing."""
    pytest.importorskip('diffusers' if name == 'SDXL UNet' else 'transformers')
    network = paper_tables.NETWORKS[name]
    return liera_mm.adapt(network.build(), rank=rank, targets=network.targets)


@pytest.mark.parametrize('name', SIZES)
def test_networks_are_the_published_ones(name):
    model = adapted(name, 4)
    counts = liera_mm.summary(model)
    assert (len(counts), counts.total - counts.trainable) == SIZES[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    kinds = {'linear', 'pointwise', 'conv'} if name == 'SDXL UNet' else {'linear'}
    assert {row.kind for row in counts} == kinds


@pytest.mark.parametrize('name, rank, trainable, of_all, of_frozen', [
    ('DeBERTaV3-base', 2, 331_776, .18, .18),
    ('DeBERTaV3-base', 8, 1_327_104, .72, .72),
    ('LLaMA-7B', 16, 28_049_408, .41, .42),
    ('LLaMA-7B', 32, 56_098_816, .83, .83),
    ('LLaMA3-8B', 16, 28_311_552, .35, .35),
    ('LLaMA3-8B', 32, 56_623_104, .70, .71),
])
def test_shares_of_the_paper(name, rank, trainable, of_all, of_frozen):
    """0.18 % and 0.72 %, 0.42 % and 0.83 %, 0.35 % and 0.70 %: no single denominator gives all six."""
    counts = liera_mm.summary(adapted(name, rank))
    assert counts.trainable == trainable
    assert round(100 * trainable / counts.total, 2) == of_all
    assert round(100 * trainable / (counts.total - trainable), 2) == of_frozen
    paper, = (figure for _, row, network, r, figure, _ in paper_tables.SHARES if (network, r) == (name, rank))
    assert paper in (of_all, of_frozen)


def test_classification_head_is_not_in_the_share_of_deberta():
    """A head of two classes, which trains, would make it 0.50 % at rank 2."""
    transformers = pytest.importorskip('transformers')
    encoder = adapted('DeBERTaV3-base', 2)
    with paper_tables.without_memory():
        model = transformers.DebertaV2ForSequenceClassification(encoder.config)
    model.deberta = encoder
    counts = liera_mm.summary(model)
    assert round(100 * counts.trainable / counts.total, 2) == .50


@pytest.mark.parametrize('update', ['additive', 'taylor', 'exp'])
@pytest.mark.parametrize('method', ['lora', 'dora', 'dense'])
def test_count_does_not_depend_on_the_update(method, update):
    pytest.importorskip('transformers')
    model = liera_mm.adapt(paper_tables.deberta_v3(128, 1), rank=2, method=method, update=update)
    weights = [(128, 128)] * 4 + [(512, 128), (128, 512)]
    factors = sum(2 * (rows + columns) for rows, columns in weights)
    magnitudes = sum(rows for rows, _ in weights)
    dense = sum(rows * columns for rows, columns in weights)
    expected = dict(lora=factors, dora=factors + magnitudes, dense=dense)[method]
    assert liera_mm.summary(model).trainable == expected


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The names that the code block of docs/transformers.md leaves behind."""
    pytest.importorskip('transformers')
    block, = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/transformers.md').read_text(encoding='utf-8'), re.DOTALL)
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('page'))
        exec(compile(block, 'docs/transformers.md', 'exec'), names)
    return names


def test_loss_of_the_page_falls(page):
    assert page['losses'][0] == pytest.approx(4.2, abs=.1)
    assert page['losses'][-1] < 2


def test_only_adapters_of_the_page_trained(page):
    start, end = page['adapted_model']().state_dict(), page['model'].state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    factors = {name for name in start if '.adapter.' in name and not name.endswith('.rms')}
    assert moved == factors != set()


@torch.no_grad()
def test_adapter_of_the_page_loads_into_a_fresh_model(page):
    model, fresh, batch = (page[name] for name in ('model', 'fresh_model', 'batch'))
    assert fresh is not model
    assert torch.equal(fresh(batch).logits, model(batch).logits)
    assert not torch.equal(page['adapted_model']()(batch).logits, model(batch).logits)
