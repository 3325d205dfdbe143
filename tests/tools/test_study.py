"""tools/analysis_tools/study.py: every run is trained once, however often the script is stopped and called again."""
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from liera_mm.core.errors import SetupError

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / 'tools/analysis_tools'))

import study  # noqa: E402
import study_run  # noqa: E402
from study_run import Run  # noqa: E402


def work(connection, out, data, keep, jobs):
    """In the place of the process that trains: leaves the result of a training, unless the folder says otherwise."""
    os.setsid()
    while True:
        run = connection.recv()
        folder = study.work_dir(out, run)
        folder.mkdir(parents=True, exist_ok=True)
        with open(out / 'calls', 'a') as calls:
            calls.write(f'{run.method} {run.seed} {os.environ["CUDA_VISIBLE_DEVICES"]}\n')
        if (out / f'{run.method} dies').exists():
            os._exit(7)
        if (out / f'{run.method} hangs').exists():
            sleeper = subprocess.Popen(['sleep', '60'])
            (folder / 'pids').write_text(f'{os.getpid()} {sleeper.pid}')
            time.sleep(60)
        if (out / f'{run.method} breaks').exists():
            connection.send('Traceback\nRuntimeError: no training today\nTomorrow there is')
            continue
        file = study.result_file(out, run)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(
            run._asdict(), options=dict(run.options), fingerprint=study_run.fingerprint(run), trained=10 * (run.rank or 0),
            backbone=1000, metrics={'coco/bbox_mAP': .3 + .01 * run.seed - abs((run.alpha or 0) - 32) / 1000},
            test_metrics={'coco/bbox_mAP': .5} if run.method == 'full' else None,
            seconds=5., jobs=jobs, step_ms=None, peak_gib=None, device='CPU', torch='2', commit=None,
            curve=[[10, 2.], [20, .75]])))
        connection.send(None)


@pytest.fixture(scope='module')
def data(tiny_digits, tmp_path_factory):
    """A folder of data sets."""
    folder = tmp_path_factory.mktemp('data')
    (folder / 'digits').symlink_to(tiny_digits)
    return folder


@pytest.fixture
def call(monkeypatch, tmp_path, capsys, data):
    """A function that calls the script, and gives what it printed."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(ROOT)

    def run(command, *args):
        data_option = () if command == 'report' else ('--data', str(data))
        monkeypatch.setattr(sys, 'argv', [
            'analysis_tools/study.py', command, '--out', str(tmp_path), '--worlds', 'digits', *data_option, *args])
        capsys.readouterr()
        study.main()
        return capsys.readouterr().out

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def run(monkeypatch, call):
    """The same for the command run, with the stand-in for trainings."""
    monkeypatch.setattr(study, 'work', work)
    monkeypatch.setattr(study, 'CONTEXT', multiprocessing.get_context('fork'))
    return lambda *args: call('run', *args)


def calls(folder):
    return [' '.join(line.split()[:2]) for line in (folder / 'calls').read_text().splitlines()]


def results(folder):
    return {file.stem for file in folder.glob('results/digits/*.json')}


# What runs


@pytest.fixture
def plan(monkeypatch, tmp_path):
    """A function that gives the runs which a command line asks for."""
    monkeypatch.chdir(ROOT)

    def plan(*args):
        plans = []
        with monkeypatch.context() as patch:
            patch.setattr(study, 'run_command', lambda args: plans.extend(study.plan(args)))
            patch.setattr(sys, 'argv', ['analysis_tools/study.py', 'run', '--out', str(tmp_path), *args])
            patch.setattr(signal, 'signal', lambda *_: None)
            study.main()
        return plans

    return plan


def test_every_combination_once(plan):
    """Seeds outermost, methods innermost; a method without adapters has neither rank nor alpha."""
    runs = plan('--worlds', 'cells', 'digits', '--methods', 'full', 'lora', '--alphas', '8', '32', '--seeds', '1', '0', '1')
    assert [(run.world, run.method, run.rank, run.alpha) for run in runs[:len(runs) // 2]] == [
        ('cells', 'full', None, None), ('cells', 'lora', 4, 8), ('digits', 'full', None, None), ('digits', 'lora', 4, 8),
        ('cells', 'lora', 4, 32), ('digits', 'lora', 4, 32)]
    assert [run.seed for run in runs] == [1] * 6 + [0] * 6
    assert {run.lr for run in runs} == {2e-3}  # of the configs


def test_alpha_by_the_rank(plan):
    runs = plan('--worlds', 'cells', '--methods', 'lora', '--ranks', '4', '16', '--alphas', '2r', '12sqrtr', '9')
    assert [(run.rank, run.alpha) for run in runs] == [(4, 8), (4, 24), (4, 9), (16, 32), (16, 48), (16, 9)]


@pytest.mark.parametrize('option', [('--alphas', 'r'), ('--alphas', '-1'), ('--alphas', '0r'), ('--alphas', '2x'),
                                    ('--lrs', '0'), ('--ranks', '0'), ('--ranks', '1.5'), ('--jobs', '0'), ('--gpus', '0'),
                                    ('--minutes', '0'), ('--methods', 'lorra'), ('--worlds', 'moon'), ('--seeds', 'one'),
                                    ('--seeds', '-1'), ('--lrs', 'inf'), ('--lrs', 'nan'), ('--alphas', '1e999')],
                         ids=' '.join)
def test_bad_options(plan, option, capsys):
    with pytest.raises(SystemExit) as error:
        plan(*option)
    assert error.value.code == 2 and option[0] in capsys.readouterr().err


def test_options_of_adapters_are_for_adapters(plan):
    runs = plan('--worlds', 'cells', '--methods', 'full', 'frozen', 'lora', '--cfg-options',
                'model.backbone.liera.train_norm=True', 'train_cfg.max_epochs=2')
    assert [[key for key, _ in run.options] for run in runs] == [['train_cfg.max_epochs']] * 2 + [
        ['model.backbone.liera.train_norm', 'train_cfg.max_epochs']]
    assert len({run.name for run in runs}) == 3
    assert study_run.config_of(runs[2]).model.backbone.liera.train_norm


@pytest.mark.parametrize(('key', 'option'), [('optim_wrapper.optimizer.lr', '--lrs'), ('randomness.seed', '--seeds'),
                                            ('model.backbone.liera.rank', '--ranks')])
def test_settings_that_no_table_would_show(plan, key, option):
    with pytest.raises(SetupError, match=f'{key} .*\nSet it by {option}'):
        plan('--methods', 'lora', '--cfg-options', f'{key}=3')


@pytest.mark.parametrize('world', study.WORLDS)
@pytest.mark.parametrize('method', study.METHODS)
def test_configs(world, method, monkeypatch):
    """What a run trains in the backbone is what its method says."""
    from mmengine.registry import MODELS, DefaultScope
    monkeypatch.chdir(ROOT)
    adapters = method in study.ADAPTERS
    run = Run(world, method, 3e-4, 4 if adapters else None, 16 if adapters else None, (), 5)
    cfg = study_run.config_of(run, 'elsewhere')
    assert cfg.optim_wrapper.optimizer.lr == 3e-4 and cfg.randomness.seed == 5
    assert cfg.train_dataloader.dataset.get('dataset', cfg.train_dataloader.dataset).data_root == f'elsewhere/{world}/'
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(cfg.model.backbone)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    base = {name for name, _ in backbone.named_parameters() if '.adapter.' not in name}
    counts = study_run.count_parameters(backbone)
    assert counts['backbone'] == dict(digits=1_089_480).get(world, 2_257_984 - 34_112)
    assert counts['trained'] == sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    if method == 'full':
        assert trained == base and type(backbone).__name__ in ('MobileNetV2', 'ConvNeXt')
    elif method == 'biases':
        assert trained == {name for name in base if name.endswith('bias')} != set()
    elif method == 'norms':
        assert trained and not any('conv' in name.rpartition('.')[0].rpartition('.')[2] for name in trained)
    else:
        assert bool(trained) == adapters
        assert (trained <= base) == (not adapters) and ((trained & base) != set()) == method.endswith('+norms')
        assert not adapters or (backbone.liera['rank'], backbone.liera['alpha']) == (4, 16)


# Running


def test_run(run, tmp_path):
    printed = run('--methods', 'lora', 'frozen', '--seeds', '0', '1', '--jobs', '3')
    assert sorted(calls(tmp_path)) == ['frozen 0', 'frozen 1', 'lora 0', 'lora 1']
    assert results(tmp_path) == {f'{name}_s{seed}' for name in ('lora_lr0.002_r4_a16', 'frozen_lr0.002') for seed in (0, 1)}
    assert '4 runs, 0 of them finished' in printed and '[4/4]' in printed
    assert 'lora lr 0.002 rank 4 alpha 16 seed 1: bbox mAP 0.294 (5 s)' in printed


def test_a_world_that_was_not_made(run):
    for world in set(study.WORLDS) - {'digits'}:
        with pytest.raises(SetupError, match=f'no folder .*{world} .*\nMake it by .*, or .* --data') as error:
            run('--methods', 'lora', '--worlds', world)
        assert (ROOT / re.search('by (.*), or', str(error.value))[1]).is_file()


def test_what_is_finished_is_left_out(run, tmp_path):
    run('--methods', 'lora')
    assert '[1/1]' not in run('--methods', 'lora')
    run('--methods', 'lora', '--seeds', '0', '1')
    assert calls(tmp_path) == ['lora 0', 'lora 1']


def test_results_in_one_file(run, call, tmp_path):
    """As they are kept: they count as finished, and are in the next report."""
    run('--methods', 'lora', '--seeds', '0', '1')
    call('report')
    shutil.rmtree(tmp_path / 'results')
    assert '2 runs, 2 of them finished' in run('--methods', 'lora', '--seeds', '0', '1')
    run('--methods', 'frozen')
    call('report')
    kept = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [(result['method'], result['seed']) for result in kept] == [('frozen', 0), ('lora', 0), ('lora', 1)]
    assert calls(tmp_path) == ['lora 0', 'lora 1', 'frozen 0']


@pytest.mark.parametrize('option', [
    'model.backbone.liera.targets=[conv,linear]', 'model.backbone.liera.targets=(conv,linear)',
    'optim_wrapper.clip_grad=dict(norm_type=2,max_norm=1.)', "custom_hooks=[dict(type='LieRAHook',card=dict(data='x'))]"])
def test_options_that_are_lists_or_dicts(run, call, tmp_path, option):
    options = '--methods', 'lora', 'frozen', '--cfg-options', option
    run(*options)
    assert '2 runs, 2 of them finished' in run(*options)
    call('report')
    shutil.rmtree(tmp_path / 'results')
    assert '2 runs, 2 of them finished' in run(*options, '--best')


@pytest.mark.parametrize('text', ['', '{"world": "dig', '<<<<<<< HEAD', '[]', '{"world": "digits"}', 'null'])
def test_results_that_cannot_be_read(run, call, tmp_path, text):
    run('--methods', 'lora')
    call('report')
    with open(tmp_path / 'results.jsonl', 'a') as file:
        file.write(text + '\n')
    for command in (lambda: call('report'), lambda: run('--methods', 'lora', '--best')):
        with pytest.raises(SetupError, match='results.jsonl, line 2, is no result of a run\n'):
            command()
    (tmp_path / 'results.jsonl').unlink()
    (tmp_path / 'results/digits/lora.json').write_text(text)
    with pytest.raises(SetupError, match='lora.json is no result of a run\n'):
        call('report')


def test_options_as_the_tools_take_them(run):
    with pytest.raises(SetupError, match='optim_wraper.clip_grad changes nothing: .*\nDid you mean optim_wrapper'):
        run('--cfg-options', 'optim_wraper.clip_grad=None')
    cfg = study_run.config_of(Run('digits', 'lora', 1e-3, 4, 8, (('custom_hooks.0.card', dict(data='x')), ), 0))
    assert cfg.custom_hooks[0].card == dict(data='x') and len(cfg.custom_hooks) == 1


@pytest.mark.parametrize('content', [b'\xff', b'without metrics'])
def test_results_that_are_damaged(run, call, tmp_path, content):
    run('--methods', 'lora')
    file, = tmp_path.glob('results/digits/*.json')
    file.write_bytes(json.dumps(dict(json.loads(file.read_text()), metrics={})).encode() if len(content) > 1 else content)
    with pytest.raises(SetupError, match=' is no result of a run\n'):
        call('report')


def test_a_training_that_detects_nothing(monkeypatch, tmp_path, data):
    """Scores zero, where MMDetection's evaluation gives no metrics."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')
    monkeypatch.setattr(study_run.Runner, 'train', lambda self: None)
    monkeypatch.setattr(study_run.Runner, 'val', lambda self: {})
    run = Run('digits', 'frozen', 1e-3, None, None, (), 0)
    study_run.train(run, tmp_path, str(data), False, 1)
    assert study.read_results(tmp_path)[0]['metrics'] == {'coco/bbox_mAP': 0, 'coco/segm_mAP': 0}


def test_best(run, tmp_path):
    """Of those that were tuned, the setting with the highest mAP."""
    with pytest.raises(SetupError, match='no finished run of lora in the world digits'):
        run('--methods', 'lora', '--best')
    run('--methods', 'lora', 'frozen', '--alphas', '8', '32', '128')
    with pytest.raises(SetupError, match='no finished run of lora in the world digits with seed 1'):
        run('--methods', 'lora', '--best', '--seeds', '1')
    run('--methods', 'lora', 'frozen', '--best', '--seeds', '0', '1')
    run('--methods', 'lora', '--best', '--alphas', '8', '128', '--seeds', '0', '2')
    assert results(tmp_path) == {*(f'lora_lr0.002_r4_a{alpha}_s0' for alpha in (8, 32, 128)), 'lora_lr0.002_r4_a32_s1',
                                 'frozen_lr0.002_s0', 'frozen_lr0.002_s1', 'lora_lr0.002_r4_a8_s2'}


@pytest.mark.parametrize(('what', 'reason', 'end'), [
    ('breaks', 'RuntimeError: no training today', 'Tomorrow there is'),
    ('dies', 'its process died with exit status 7', 'exit status 7')])
def test_a_failure_leaves_the_others(run, tmp_path, what, reason, end, capsys):
    """Whether a training raises an error or its process dies."""
    (tmp_path / f'lora {what}').touch()
    with pytest.raises(SetupError, match=r'2 of 4 runs failed, such as digits: lora .*\nSee the end of .*output.txt'):
        run('--methods', 'lora', 'frozen', '--seeds', '0', '1')
    assert capsys.readouterr().out.count(f'failed: {reason}') == 2
    assert results(tmp_path) == {'frozen_lr0.002_s0', 'frozen_lr0.002_s1'}
    assert (tmp_path / 'runs/digits/lora_lr0.002_r4_a16_s0/output.txt').read_text().endswith(end)
    (tmp_path / f'lora {what}').unlink()
    run('--methods', 'lora')
    assert 'lora_lr0.002_r4_a16_s0' in results(tmp_path)


def test_a_result_of_another_config_is_refused(run, tmp_path, monkeypatch):
    """It would stand in a table beside runs that are not comparable."""
    run('--methods', 'lora')
    monkeypatch.setitem(study.METHODS, 'lora', dict(update='exp'))
    with pytest.raises(SetupError, match='lora_lr0.002_r4_a16_s0.json is the result of another config, with other model\n'):
        run('--methods', 'lora')
    run('--methods', 'lora', '--cfg-options', 'train_cfg.max_epochs=1')  # is another run
    config_of = study_run.config_of
    monkeypatch.setitem(study.METHODS, 'lora', dict(update='additive'))
    monkeypatch.setattr(study_run, 'config_of', lambda run: Config(dict(config_of(run).to_dict(), test_evaluator=None)))
    run('--methods', 'lora')  # what is tested besides validation has no say
    assert len(results(tmp_path)) == 2


def test_data_elsewhere_are_the_same_config():
    run = Run('digits', 'lora', 1e-3, 4, 8, (), 0)
    assert study_run.config_of(run, 'there').data_root == 'there/digits/'
    assert study_run.fingerprint(run) == study_run.fingerprint(run)


@pytest.mark.parametrize('seed', ['0', '1'])
def test_time_that_would_not_be_enough(run, tmp_path, seed):
    """A run is known to take five seconds."""
    run('--methods', 'frozen')
    printed = run('--methods', 'frozen', 'lora', '--seeds', seed, '--minutes', '.05')
    assert calls(tmp_path) == ['frozen 0']
    assert f'{1 if seed == "0" else 2} of 2 runs are left: call this again' in printed


def alive(pid):
    try:
        return 'State:\tZ' not in Path(f'/proc/{pid}/status').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids):
    deadline = time.time() + 10
    while any(map(alive, pids)):
        assert time.time() < deadline


def test_when_the_time_is_up_all_ends(run, tmp_path, monkeypatch):
    """And what trainings have started."""
    (tmp_path / 'lora hangs').touch()
    monkeypatch.setattr(study, 'wait', lambda connections, timeout: wait_for(tmp_path, 'lora_lr0.002_r4_a16_s0/pids'))
    printed = run('--methods', 'lora', '--minutes', '10')
    assert 'the time is up' in printed and '1 of 1 runs are left' in printed
    wait_until_dead((tmp_path / 'runs/digits/lora_lr0.002_r4_a16_s0/pids').read_text().split())


def wait_for(folder, name):
    deadline = time.time() + 60
    while not list(folder.glob(f'runs/*/{name}')) or not next(folder.glob(f'runs/*/{name}')).read_text():
        assert time.time() < deadline
        time.sleep(.05)
    return []


def test_stopping_stops_the_runs(run, tmp_path, monkeypatch):
    """One that went on by itself would be written over by the next call."""
    (tmp_path / 'lora hangs').touch()

    def stop(connections, timeout):
        wait_for(tmp_path, '*/pids')
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(study, 'wait', stop)
    with pytest.raises(SystemExit, match='interrupted: call it again to go on'):
        run('--methods', 'lora')
    wait_until_dead(next(tmp_path.glob('runs/*/*/pids')).read_text().split())


def test_gpus_are_shared_out(run, tmp_path, monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,2,7')
    run('--methods', 'lora', '--seeds', '0', '1', '2', '--jobs', '3', '--gpus', '2')
    assert {line.split()[2] for line in (tmp_path / 'calls').read_text().splitlines()} <= {'4', '2'}
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '4,2,7'
    assert study.visible_devices(None) == ['4', '2', '7']


# Results


def test_report(run, call, tmp_path):
    with pytest.raises(SetupError, match='has no results'):
        call('report')
    run('--methods', 'lora', 'frozen', '--alphas', '8', '32', '--seeds', '0', '1')
    run('--methods', 'full', 'lora', '--ranks', '2')
    text = call('report')
    assert text == (tmp_path / 'report.md').read_text() + '\n'
    # Each at its best
    assert '| lora | 0.002 | 4 | 32 | - | 40 | 4.0% | 0.305 (0.300 to 0.310) | - | 1.138 | 2 | 0.750 | - | - | 5 |' in text
    assert '| 0.0% | 0.268 (0.268 to 0.268) | 0.500 (0.500 to 0.500) | 1.000 | 1 | 0.750 | - | - | 5 |' in text  # full
    assert '| lora | 0.002 | 4 | 8 | - | 0.281 (0.276 to 0.286) | 2 | 0.750 |' in text  # every setting
    assert '| lora | 0.002 | 2 | 16 | - | 0.284 (0.284 to 0.284) | 1 | 0.750 |' in text
    for name in ('alpha', 'rank', 'parameters'):
        assert (tmp_path / f'{name}.png').stat().st_size > 10_000
    assert 'lora' not in call('report', '--methods', 'full')


OPTIONS = ['--cfg-options', 'train_cfg.max_epochs=2', 'train_dataloader.batch_size=1', 'model.test_cfg.rcnn.score_thr=0.',
           *(f'{split}_dataloader.{option}' for split in ('train', 'val', 'test')
             for option in ('num_workers=0', 'persistent_workers=False'))]


def test_real_runs(call, tmp_path):
    """In one process after another; what they print goes to a file of their own, which is kept if wanted."""
    printed = call('run', '--methods', 'liera', 'biases', '--keep', *OPTIONS)
    for name in ('liera', 'biases'):
        file, = tmp_path.glob(f'results/digits/{name}_*.json')
        result = json.loads(file.read_text())
        assert f'{result["metrics"]["coco/bbox_mAP"]:.3f}' in printed and 'coco/segm_mAP_50' in result['metrics']
        assert result['curve'][0][0] == 10 and 0 < result['curve'][0][1] < 20 and result['step_ms'] > 0
        output, = tmp_path.glob(f'runs/digits/{name}_*/output.txt')
        assert 'Saving checkpoint at 2 epochs' in output.read_text() and 'Epoch(val)' in output.read_text()
    assert result['trained'] < 20_000
    assert '.jpg' in call('sheet', '--methods', 'liera', '--images', '2', *OPTIONS)
    sheet, = tmp_path.glob('sheet_digits_liera_*.jpg')
    assert sheet.stat().st_size > 10_000
    for checkpoint in tmp_path.glob('runs/digits/liera_*/*.pth'):
        checkpoint.unlink()
    with pytest.raises(SetupError, match='no checkpoint of these runs'):
        call('sheet', '--methods', 'liera', 'frozen', *OPTIONS)


def test_an_interrupted_training_goes_on_as_it_would_have(monkeypatch, tmp_path, data):
    """After the first of two epochs, and after the second, before validation."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('mmengine.device.utils.DEVICE', 'cpu')
    options = tuple((key, int(value) if value.isdigit() else float(value) if value == '0.' else False)
                    for key, _, value in (option.partition('=') for option in OPTIONS[1:]))
    run = Run('digits', 'lora', 1e-3, 4, 8, options, 0)

    def train(out):
        try:
            study_run.train(run, tmp_path / out, str(data), False, 1)
        finally:
            study_run.forget()
        assert not study_run.work_dir(tmp_path / out, run).exists()
        return json.loads(study_run.result_file(tmp_path / out, run).read_text())

    expected = train('whole')
    with monkeypatch.context() as patch:
        record = study_run.Recorder.after_train_iter
        patch.setattr(study_run.Recorder, 'after_train_iter', lambda self, runner, *args, **kwargs: (
            1 / (runner.iter != 8), record(self, runner, *args, **kwargs)))
        with pytest.raises(ZeroDivisionError):
            train('torn')
    with monkeypatch.context() as patch:
        patch.setitem(study_run.RUN_OPTIONS, 'optim_wrapper.optimizer.weight_decay', .1)
        with pytest.raises(SetupError, match='has an interrupted run of another config, with other optim_wrapper\n'):
            train('torn')
    with monkeypatch.context() as patch:
        patch.setattr(study_run.Runner, 'val', lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train('torn')
    result = train('torn')
    assert result['curve'] == expected['curve'] != []
    assert result['metrics'] == expected['metrics']
