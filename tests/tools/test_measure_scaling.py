"""What of the measurement runs without GPUs: the configs of its trainings, and what it makes of their logs."""
import json
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """Folder, printed lines and commands of a measurement whose trainings take 100 ms a step, and 110 ms on two GPUs."""
    commands = []

    def train(command, **kwargs):
        commands.append(command)
        folder = command[-1] / 'time/vis_data'
        folder.mkdir(parents=True)
        times = [9.] * 20 + [.1 if command[2] == '1' else .11] * 10
        lines = [dict(time=time, data_time=.01, memory=1000, loss=step) for step, time in enumerate(times)]
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, [*lines, {'coco/bbox_mAP': 0.}])))

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('subprocess.run', train)
    monkeypatch.setattr(sys, 'argv', ['measure_scaling.py', '--gpus', '2', '--steps', '30', '--out', str(tmp_path)])
    main = runpy.run_path('tools/analysis_tools/measure_scaling.py')['main']
    monkeypatch.setitem(main.__globals__, 'random_weights', lambda path: path.touch())
    main()
    return tmp_path, capsys.readouterr().out.splitlines(), commands


def test_throughput(measured):
    folder, lines, _ = measured
    lines = [line.split() for line in lines if 'images/s' in line]
    assert [(line[0], line[1], line[3], line[-2]) for line in lines] == [
        ('liera_r16', '1', '4', '1.00'), ('liera_r16', '2', '2', '0.91'), ('liera_r16', '2', '4', '1.82'),
        ('full', '1', '4', '1.00'), ('full', '2', '4', '1.82')]
    rows = json.loads((folder / 'scaling.json').read_text())
    assert [round(row['images_a_second'], 1) for row in rows] == [40., 36.4, 72.7, 40., 72.7]
    assert rows[0]['losses'] == list(range(30)) and rows[0]['memory_mib'] == 1000
    assert (folder / 'losses.png').stat().st_size > 5000


def test_what_is_trained(measured):
    """As many steps of as many images with every number of GPUs, at full size."""
    folder, _, commands = measured
    assert [command[0] for command in commands] == ['tools/dist_train.sh'] * 5
    for command, images in zip(commands, (4, 2, 4, 4, 4)):
        cfg = Config.fromfile(command[1])
        assert cfg.train_dataloader.batch_size == images
        assert cfg.train_dataloader.dataset.indices == 30 * images * int(command[2])
        assert cfg.train_dataloader.dataset.data_root == 'data/digits/'
        assert len(cfg.train_dataloader.dataset.metainfo.classes) == cfg.model.roi_head.bbox_head.num_classes == 10
        assert cfg.model.backbone.init_cfg.checkpoint == str(folder / 'random.pth')
        assert cfg.train_pipeline[3].crop_size == (1024, 1024)
