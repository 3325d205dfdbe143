"""tools/digits_table.py: every run is trained and tested once, however often the script is stopped and called again."""
import importlib.util
import signal
import sys
import time
from pathlib import Path

import pytest

from liera_mm.errors import SetupError

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location('digits_table_tool', ROOT / 'tools/digits_table.py')
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

# Stand-ins for tools/train.py and tools/test.py, which leave in the work dir what these do
TRAIN = """
import sys
from pathlib import Path
work_dir = Path(sys.argv[1])
with open(work_dir / 'calls', 'a') as calls:
    calls.write('train\\n')
if (work_dir / 'breaks').exists():
    sys.exit('no training today')
(work_dir / 'last_checkpoint').write_text(f'where/it/was/written/{sys.argv[2]}')
"""
TEST = """
import json, sys
from pathlib import Path
work_dir = Path(sys.argv[1])
with open(work_dir / 'calls', 'a') as calls:
    calls.write('test\\n')
(work_dir / 'test/20250101').mkdir(parents=True)
seed = int(work_dir.name.split('_')[1])
metrics = {'coco/bbox_mAP': .2 + .1 * seed, 'coco/segm_mAP': .1}
(work_dir / 'test/20250101/20250101.json').write_text(json.dumps(metrics))
"""


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """A function that calls the script, and gives what it printed."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(ROOT)

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['digits_table.py', '--out', str(tmp_path), *args])
        capsys.readouterr()
        tool.main()
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def make_table(monkeypatch, call, tiny_digits):
    """The same for two variants, with the stand-ins."""
    monkeypatch.setattr(time, 'sleep', lambda _: None)
    monkeypatch.setattr(tool, 'train_command', lambda config, work_dir, *options: [
        sys.executable, '-c', TRAIN, str(work_dir), 'epoch_5.pth'])
    monkeypatch.setattr(tool, 'test_command', lambda config, work_dir, *options: [
        sys.executable, '-c', TEST, str(work_dir)])
    return lambda *args: call('--variants', 'liera', 'dora', '--cfg-options', f'data_root={tiny_digits}', *args)


def calls(work_dir):
    return (work_dir / 'calls').read_text().split()


def test_table(make_table, tmp_path):
    printed = make_table('--seeds', '2', '--jobs', '3')
    assert (tmp_path / 'table.md').read_text().splitlines() == [
        '| variant | trainable in the backbone | bbox mAP | segm mAP | seeds |',
        '| --- | --- | --- | --- | --- |',
        '| liera | 226,984 | 0.250 (0.200 to 0.300) | 0.100 (0.100 to 0.100) | 2 |',
        '| dora | 232,816 | 0.250 (0.200 to 0.300) | 0.100 (0.100 to 0.100) | 2 |',
        '', 'Mean of the seeds (lowest to highest).']
    assert printed.endswith((tmp_path / 'table.md').read_text())
    assert [calls(folder) for folder in tmp_path.glob('*/*')] == [['train', 'test']] * 4


def test_what_is_finished_is_left_out(make_table, tmp_path):
    make_table('--seeds', '1')
    assert make_table('--seeds', '1') == (tmp_path / 'table.md').read_text()
    make_table('--seeds', '2')
    assert [calls(tmp_path / f'liera/seed_{seed}') for seed in (0, 1)] == [['train', 'test']] * 2


@pytest.mark.parametrize(('checkpoint', 'expected'), [('epoch_4.pth', ['train', 'test']), ('epoch_5.pth', ['test'])])
def test_what_was_interrupted_goes_on(make_table, tmp_path, checkpoint, expected):
    """In training, or in the test after it."""
    work_dir = tmp_path / 'liera/seed_0'
    work_dir.mkdir(parents=True)
    (work_dir / 'last_checkpoint').write_text(f'elsewhere/{checkpoint}')
    make_table('--seeds', '1')
    assert calls(work_dir) == expected


def test_a_failure_leaves_the_others(make_table, tmp_path):
    work_dir = tmp_path / 'liera/seed_0'
    work_dir.mkdir(parents=True)
    (work_dir / 'breaks').touch()
    with pytest.raises(SetupError, match=r'1 of 2 runs failed, such as .*liera/seed_0\nSee the end of .*output.txt'):
        make_table('--seeds', '1')
    assert (work_dir / 'output.txt').read_text() == 'no training today\n'
    rows = (tmp_path / 'table.md').read_text().splitlines()
    assert rows[2] == '| liera | 226,984 | - | - | 0 |' and rows[3].endswith('0.200) | 0.100 (0.100 to 0.100) | 1 |')
    (work_dir / 'breaks').unlink()
    assert '| liera | 226,984 | 0.200' in make_table('--seeds', '1')


def test_runs_of_another_config_are_refused(make_table, tmp_path):
    """They would stand in the table beside runs that are not comparable."""
    make_table('--seeds', '1')
    with pytest.raises(SetupError, match='liera/seed_0 has a run of another config, with other train_cfg\n'):
        make_table('train_cfg.max_epochs=1', '--seeds', '1')


@pytest.mark.parametrize('option', ['--seeds', '--jobs'])
def test_none_to_run(make_table, option):
    with pytest.raises(SystemExit):
        make_table(option, '0')


def alive(pid):
    try:
        return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_stopping_stops_the_runs(make_table, tmp_path, monkeypatch):
    """And what they have started. A run that went on by itself would be written over by the next call."""
    monkeypatch.setattr(tool, 'train_command', lambda config, work_dir, *_: [
        'sh', '-c', 'sleep 60 & echo $! > $0/worker; wait', str(work_dir)])

    def stop(seconds):
        if sum(file.read_text() != '' for file in tmp_path.glob('*/*/worker')) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(time, 'sleep', stop)
    processes, start = [], tool.start
    monkeypatch.setattr(tool, 'start', lambda run: processes.append(start(run)) or processes[-1])
    with pytest.raises(SystemExit, match='interrupted: call it again to go on'):
        make_table('--jobs', '2')
    assert [process.returncode for process in processes] == [-signal.SIGTERM] * 2
    deadline = time.time() + 10
    while any(map(alive, [int(file.read_text()) for file in tmp_path.glob('*/*/worker')])):
        assert time.time() < deadline


def test_real_runs(call, tmp_path, tiny_options):
    """One training without validation, and one test."""
    printed = call('--variants', 'pissa-liera', '--seeds', '1', *tiny_options)
    work_dir = tmp_path / 'pissa-liera/seed_0'
    assert f'| pissa-liera | 226,984 | {tool.test_metrics(work_dir)["coco/bbox_mAP"]:.3f} (' in printed
    assert tool.last_checkpoint(work_dir) == work_dir / 'epoch_1.pth'
    output = (work_dir / 'output.txt').read_text()
    assert 'Epoch(val)' not in output and output.count('Epoch(test)') > 0
