"""Brief trainings of MMDetection's detectors: the table says what was done, and what went wrong."""
import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/train_detectors.py'
spec = importlib.util.spec_from_file_location('train_detectors', TOOL)
detectors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(detectors)

SCALARS = [dict(loss=3.5, time=2, memory=900, step=1), dict(loss=2.5, time=1, memory=1000, step=2),
           {'coco/bbox_mAP': .25, 'time': 1, 'step': 2}]


@pytest.mark.parametrize('scalars, code, log, row', [
    (SCALARS, 0, '', '| FCOS | 2 | 3.50, 2.50 | 1500 | 1000 | coco/bbox_mAP 0.250 |'),
    (SCALARS[:1], 1, 'a\ntorch.AcceleratorError: busy\nsearch the web\n',
     '| FCOS | 1 | 3.50 | 2000 | 900 | 1: torch.AcceleratorError: busy |'),
    (SCALARS[:2], 0, 'a\nb\nc\n', '| FCOS | 2 | 3.50, 2.50 | 1500 | 1000 | 0: b; c |'),
    ([*SCALARS[:2], dict(time=1)], 0, '', '| FCOS | 2 | 3.50, 2.50 | 1500 | 1000 | done, no detections |'),
    ([], None, '', '| FCOS | 0 |  |  | 0 | more than 9 s:  |'),
])
def test_row(scalars, code, log, row, tmp_path, monkeypatch):
    def run(command, stdout, **kwargs):
        assert (tmp_path / 'FCOS.py').read_text().startswith("_base_ = 'mmdet::fcos/")
        folder = tmp_path / 'FCOS/now/vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text(''.join(f'{json.dumps(line)}\n' for line in scalars))
        stdout.write(log)
        if code is None:
            raise subprocess.TimeoutExpired(command, kwargs['timeout'])
        return SimpleNamespace(returncode=code)

    (tmp_path / 'FCOS/before/vis_data').mkdir(parents=True)
    (tmp_path / 'FCOS/before/vis_data/scalars.json').write_text(json.dumps(SCALARS[0]))
    monkeypatch.setattr(subprocess, 'run', run)
    args = SimpleNamespace(out=tmp_path, data=tmp_path, steps=2, images=1, timeout=9)
    assert detectors.line(detectors.train('FCOS', args, False)) == row


def test_configs_exist():
    folder = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim/configs'
    assert all((folder / config).is_file() for config in detectors.DETECTORS.values())
