"""README's one edit on a few of MMDetection's own configs, in the tool that tries them all."""
import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / 'tools/analysis_tools/detector_matrix.py'


def run(out, *arguments):
    return subprocess.run([sys.executable, TOOL, out, *arguments], capture_output=True, text=True, check=True).stdout


def test_configs_of_the_zoo(tmp_path):
    """Frozen stages, and a part of the backbone that nothing uses; what was tried is not tried again."""
    out = tmp_path / 'out.json'
    names = ['retinanet/retinanet_r18_fpn_1x_coco.py', 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py']
    assert '2 of the 2 configs that stock MMDetection can train here pass every column; 0 of 2 it cannot' in run(out, *names)
    results = json.loads(out.read_text())
    assert all(set(row.values()) == {'ok'} and list(row)[-1] == 'export' for row in results.values())
    results[names[0]] = dict(stock='failed')
    out.write_text(json.dumps(results))
    again = run(out, *names)
    assert f'{names[0]}: stock: failed' in again and '1 of the 1 configs' in again
