"""tools/inspect_adapter.py: its table and picture of a checkpoint and of an adapter file, and what it refuses."""
import importlib.util
import re
import sys
from pathlib import Path

import mmcv
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import liera_mm
from liera_mm.core.algebra import METHODS
from liera_mm.core.errors import SetupError
from liera_mm.core.group import UPDATES

pytestmark = pytest.mark.usefixtures('one_thread')

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_{}_digits.py')

spec = importlib.util.spec_from_file_location('inspect_tool', ROOT / 'tools/inspect_adapter.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def inspect(monkeypatch, capsys):
    """A function that runs the tool and gives the cells of its table by layer, and the lines below."""

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['inspect_adapter.py', *map(str, args)])
        tool.main()
        printed = capsys.readouterr().out
        card = args[0].with_suffix('.md').read_text() if args[0].suffix == '.safetensors' else ''
        assert card in printed and ('library_name' in printed) == bool(card)
        header, *lines = re.search(r'^layer .*', printed, re.DOTALL | re.MULTILINE)[0].splitlines()
        end = lines.index('')
        names = re.split(r'\s{2,}', header)
        rows = [dict(zip(names, re.split(r'\s{2,}', line))) for line in lines[:end]]
        return {row['layer']: row for row in rows}, lines[end + 1:]

    return run


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory):
    """For LieRA and LoRA a folder with config, checkpoint and adapter of a detector whose perturbations have moved."""
    folders = {}
    for name in ('liera', 'lora'):
        folder = folders[name] = tmp_path_factory.mktemp(name)
        (folder / 'detector.py').write_text(f"_base_ = '{DIGITS.format(name)}'\n")
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = MODELS.build(Config.fromfile(folder / 'detector.py').model)
        model.init_weights()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.requires_grad:
                    parameter.add_(.1 * torch.randn_like(parameter))
        torch.save(dict(state_dict=model.state_dict()), folder / 'epoch_1.pth')
        liera_mm.save_adapter(model.backbone, folder / 'adapter.safetensors')
    return folders


def check_picture(path):
    """It has columns in every part and is no smaller than a page."""
    picture = mmcv.imread(path)
    assert picture.shape[0] > 600 and picture.shape[1] > 1500
    assert all(part.std() > 5 for part in (picture[:200], picture[-200:], picture[:, :800], picture[:, -800:]))


def test_checkpoint_with_its_config_beside_it(inspect, work_dirs):
    table, below = inspect(work_dirs['liera'] / 'epoch_1.pth')
    assert len(table) == 34
    row = table['stages.3.1.pointwise_conv1']
    assert [row[name] for name in ('method', 'update', 'n x m', 'rank', 'rank of Δ <=', 'parameters', 'weights')] == [
        'lora', 'taylor', '768 x 192', '192', '4', '3,840', '147,456']
    assert row['Taylor error'] != '-' and row['of ‖Δ‖'].endswith('%') and row['Δ <= -1'].endswith('%')
    assert below[0] == 'Rank of the change: min(n, m) in 34 of 34 layers, above the rank that Δ can have in 23'
    assert below[1] == 'Parameters outnumber the weights in 11 layers (conv, depthwise): 182,440 for 45,840'
    assert re.fullmatch(r'Sign changes \(Δ <= -1\): [\d,]+ of 1,073,424 weights', below[2])
    assert row['change of W'].endswith('%')
    assert re.fullmatch(r"Change of W, ‖W' - W‖ / ‖W‖, in the median layer: conv .*%, depthwise .*%, linear .*%", below[3])
    check_picture(work_dirs['liera'] / 'epoch_1.png')


def test_adapter_file(inspect, work_dirs, tmp_path):
    """LoRA's change has the rank of its factors; the adapter file says the same as the checkpoint."""
    adapter, picture = work_dirs['lora'] / 'adapter.safetensors', tmp_path / 'new/drawn.png'
    table, below = inspect(adapter, DIGITS.format('lora'), '--out', picture)
    assert {row['update'] for row in table.values()} == {'additive'}
    assert all(row['rank'] == row['rank of Δ <='] for row in table.values())
    assert table['stages.3.1.pointwise_conv1']['rank'] == '4' and table['downsample_layers.3.1']['rank'] == '8'
    assert below[0] == 'Rank of the change: min(n, m) in 11 of 34 layers, above the rank that Δ can have in 0'
    check_picture(picture)
    assert inspect(work_dirs['lora'] / 'epoch_1.pth')[0] == table


def test_layers_are_in_the_order_of_an_image(inspect, work_dirs):
    table, _ = inspect(work_dirs['liera'] / 'epoch_1.pth')
    parts = dict.fromkeys('.'.join(name.split('.')[:2]) for name in table)
    assert list(parts) == [f'{part}.{i}' for i in range(4) for part in ('downsample_layers', 'stages')]


@pytest.mark.parametrize('trained', [False, True], ids=['start', 'trained'])
@pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])
def test_every_method_and_update(net, perturb, tmp_path, method, update, trained):
    liera_mm.adapt(net, rank=2, method=method, update=update)
    reports = liera_mm.layer_reports(perturb(net) if trained else net)
    lines = tool.table(reports).splitlines()
    assert len(lines) > 2 + len(reports) and 'nan' not in '\n'.join(lines)
    if method == 'dense':  # a picture takes a while
        tool.draw(reports, 'title', tmp_path / 'drawn.png')
        panels = dict(additive=4, exp=5, taylor=6)[update]
        assert mmcv.imread(tmp_path / 'drawn.png').shape[0] == pytest.approx(130 * (.8 + 1.9 * panels), abs=1)


def test_mixed_updates(net, perturb, tmp_path):
    updates = [dict(targets=['depthwise'], update='additive'), dict(targets=['pointwise'], update='exp')]
    reports = liera_mm.layer_reports(perturb(liera_mm.adapt(net, rank=2, overrides=updates)))
    tool.draw(reports, 'title', tmp_path / 'drawn.png')
    changes = sum(row.sign_change_share is not None for row in reports)
    assert 0 < changes < sum(row.taylor_error is not None for row in reports) < len(reports)
    assert re.search(r'Sign changes .* of 116 weights', tool.table(reports))


def test_values_that_are_not_finite(net, perturb, tmp_path):
    perturb(liera_mm.adapt(net, rank=2))
    with torch.no_grad():
        net.head.adapter.A[0, 0] = float('nan')
    reports = liera_mm.layer_reports(net)
    assert re.search(r'^head .* -  ', tool.table(reports), re.MULTILINE)
    tool.draw(reports, 'title', tmp_path / 'drawn.png')


# What it refuses

def refused(inspect, problem, *args):
    with pytest.raises(SetupError) as error:
        inspect(*args)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and re.search(problem, lines[0]), lines


def test_no_config_beside_the_checkpoint(inspect, work_dirs, tmp_path):
    checkpoint = tmp_path / 'epoch_1.pth'
    checkpoint.write_bytes((work_dirs['liera'] / 'epoch_1.pth').read_bytes())
    refused(inspect, f'0 configs lie beside {checkpoint}', checkpoint)


def test_missing_checkpoint(inspect, work_dirs):
    refused(inspect, 'Checkpoint not found: .*/epoch_2.pth', work_dirs['liera'] / 'epoch_2.pth')


def test_config_without_adapters(inspect, work_dirs):
    refused(inspect, 'frozen_digits.py has no adapted backbone', work_dirs['liera'] / 'epoch_1.pth', DIGITS.format('frozen'))


def test_checkpoint_of_another_config(inspect, work_dirs):
    refused(inspect, 'epoch_1.pth was not trained with .*pissa_digits.py', work_dirs['lora'] / 'epoch_1.pth',
            DIGITS.format('pissa'))


def test_adapter_of_another_config(inspect, work_dirs):
    refused(inspect, "trained with another configuration: update 'additive', here 'taylor'",
            work_dirs['lora'] / 'adapter.safetensors', DIGITS.format('liera'))


@pytest.mark.parametrize('name', ['epoch_1.pth', 'adapter.safetensors'])
def test_damaged_file(inspect, work_dirs, tmp_path, name):
    content = (work_dirs['liera'] / name).read_bytes()
    (tmp_path / name).write_bytes(content[:len(content) // 2])
    refused(inspect, f'{name} .*damaged', tmp_path / name, DIGITS.format('liera'))


def test_picture_must_be_a_png(inspect, work_dirs, capsys):
    with pytest.raises(SystemExit):
        inspect(work_dirs['liera'] / 'epoch_1.pth', '--out', 'drawn.jpg')
    assert '--out must be a .png file, not drawn.jpg' in capsys.readouterr().err
