"""Two processes do what one does: the same gradients, checkpoints and metrics. On the CPU, over gloo."""
import functools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.fsdp
from mmengine.registry import MODELS
from trainings import (
    DIGITS_CONFIG,
    ROOT,
    SETTINGS,
    SHARDS,
    classifier,
    free_port,
    in_process,
    run_detector,
    train,
    use_in_shards,
)

from liera_mm.core.errors import SetupError
from liera_mm.engine.safe_loading import read_checkpoint
from liera_mm.engine.sharding import FullyShardStrategy


@pytest.fixture(scope='module')
def run():
    """A function that calls one of trainings.py in some processes, and gives what each of them returned."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['liera_mm.engine.cli', 'mmdet.apis'])

    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(2, context) as pool:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')

        def call(function, processes, *args):
            port = free_port()
            futures = [pool.submit(in_process, function, rank, processes, port, args) for rank in range(processes)]
            try:
                return [pickle.loads(future.result(timeout=120)) for future in futures]
            except SetupError as error:
                if hasattr(torch.distributed.fsdp, 'fully_shard') or 'FullyShardStrategy needs torch' not in str(error):
                    raise
                pytest.skip(str(error))

        yield call


@pytest.fixture(scope='module')
def trained(run, tmp_path_factory):
    """A function that gives what one process, or each of two, did in a training with a setting, and where."""

    @functools.cache
    def get(setting, kind):
        folder = tmp_path_factory.mktemp(f'{setting}-{kind}')
        options = dict(setting=setting, **(SHARDS if kind == 'shards' else {}))
        return SimpleNamespace(processes=run(train, 1 if kind == 'one' else 2, folder, options), folder=folder)

    return get


def detector_options(digits, **options):
    """Options of a digits config for the tiny data set."""
    steps = dict(train=2, val=1, test=1)
    return {
        'data_root': str(digits), 'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 9,
        **{f'{split}_dataloader.dataset.pipeline.{step}.scale': (64, 64) for split, step in steps.items()},
        **{f'{split}_dataloader.{key}': value for split in steps
           for key, value in dict(num_workers=0, persistent_workers=False).items()},
        **options
    }


@pytest.fixture(scope='module')
def detector(run, digits, tmp_path_factory):
    """A detector that two processes have trained for two steps on images of which only one has an object."""
    folder = tmp_path_factory.mktemp('detector')
    annotations = json.loads((digits / 'annotations/instances_train2017.json').read_text())
    (folder / 'none.json').write_text(json.dumps(dict(annotations, annotations=annotations['annotations'][:1])))
    options = detector_options(digits, **{
        'train_dataloader.dataset.ann_file': str(folder / 'none.json'), 'train_dataloader.batch_size': 1,
        'train_dataloader.dataset.filter_cfg.filter_empty_gt': False, 'default_hooks.checkpoint.interval': 1})
    return SimpleNamespace(iterations=run(run_detector, 2, 'train', folder, options), checkpoint=folder / 'epoch_1.pth')


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


# Training


KINDS = [(setting, kind) for setting in SETTINGS for kind in ('two', 'shards') if (setting, kind) != ('full', 'shards')]


@pytest.mark.parametrize('setting, kind', KINDS)
def test_two_processes_train_as_one(trained, setting, kind):
    """Half of the batch each; that their random numbers differ makes no difference."""
    one, = trained(setting, 'one').processes
    first, second = trained(setting, kind).processes
    assert_same(first['end'], second['end'])
    assert len(one['gradients']) == len(first['gradients']) == 4
    for step in range(4):
        assert_same(first['gradients'][step], second['gradients'][step])
        assert_close(first['gradients'][step], one['gradients'][step])
    assert_close(first['end'], one['end'])
    moved = {name for name, tensor in first['end'].items() if not torch.equal(tensor, first['start'][name])}
    assert moved == first['gradients'][0].keys()


@pytest.mark.parametrize('setting', SETTINGS)
def test_what_is_exchanged(trained, setting):
    """In each step, the gradients of what trains in single precision, and nothing else."""
    one, = trained(setting, 'one').processes
    parameters = sum(gradient.numel() for gradient in one['gradients'][0].values())
    assert one['traffic'] == []
    for process in trained(setting, 'two').processes:
        assert {name for name, _ in process['traffic']} == {'gloo:all_reduce'}
        assert sum(math.prod(shape) for _, shapes in process['traffic'] for shape in shapes) == parameters


def test_what_each_process_holds(trained):
    """About half of every tensor, where they are in shards: some have an odd number of rows."""
    all_of_it = trained('lora', 'one').processes[0]['held']
    assert trained('lora', 'two').processes[1]['held'] == all_of_it
    for process in trained('lora', 'shards').processes:
        assert all(.45 < share / size < .55 for share, size in zip(process['held'], all_of_it))


@pytest.mark.parametrize('setting', ['pissa', 'dora', 'atom'])
def test_processes_start_with_the_tensors_of_the_first(run, tmp_path, setting):
    """Even if they are given other weights, of which the starts of PiSSA, DoRA and atoms are computed."""
    backbone = MODELS.build(classifier(tmp_path, 'full').model.backbone)
    backbone.init_weights()
    for rank in range(2):
        weights = {f'backbone.{name}': tensor * (1 + rank / 10) for name, tensor in backbone.state_dict().items()}
        torch.save(weights, tmp_path / f'{rank}.pth')
    options = [dict(load_from=str(tmp_path / f'{rank}.pth')) for rank in range(2)]
    first, second = run(train, 2, tmp_path / 'two', dict(setting=setting, epochs=1), options)
    assert_same(first['start'], second['start'])
    assert_same(first['end'], second['end'])
    weight = 'backbone.stages.0.0.depthwise_conv.weight'
    assert torch.equal(first['start'][weight], backbone.state_dict()[weight[len('backbone.'):]])


def test_images_without_objects(detector):
    """Every parameter gets a gradient, or DDP, which does not look for unused ones, refuses the next step."""
    assert detector.iterations == [2, 2]


# Checkpoints and logs


@pytest.mark.parametrize('kind', ['two', 'shards'])
def test_the_first_process_writes(trained, kind):
    """As much as one process alone does."""
    ours, theirs = ([path for path in trained('lora', number).folder.rglob('*') if path.is_file()]
                    for number in (kind, 'one'))
    assert sorted(path.name for path in ours if path.suffix == '.pth') == ['epoch_1.pth', 'epoch_2.pth']
    assert len(ours) == len(theirs)
    log, = (path.read_text() for path in ours if path.suffix == '.log')
    for epoch in (1, 2):
        assert log.count(f'Saving checkpoint at {epoch} epochs') == 1


@pytest.mark.parametrize('before', ['one', 'two', 'shards'])
@pytest.mark.parametrize('after', ['one', 'two', 'shards'])
def test_resuming_with_another_number_of_processes(run, trained, tmp_path, before, after):
    checkpoint = trained('lora', before).folder / 'epoch_1.pth'
    resumed = run(train, 1 if after == 'one' else 2, tmp_path,
                  dict(resume=True, load_from=str(checkpoint), **(SHARDS if after == 'shards' else {})))
    for process in resumed:
        assert len(process['gradients']) == 2
        assert_close(process['end'], trained('lora', 'one').processes[0]['end'])


def test_resumed_processes_draw_their_own_random_numbers(run, tmp_path):
    """Bit for bit those that they would have drawn, where the number of processes is the same."""
    options = dict(drop_path=.5)
    straight = run(train, 2, tmp_path / 'straight', options)
    resumed = run(train, 2, tmp_path / 'resumed',
                  dict(options, resume=True, load_from=str(tmp_path / 'straight/epoch_1.pth')))
    assert_same(resumed[0]['end'], straight[0]['end'])
    first, second = read_checkpoint(tmp_path / 'resumed/epoch_2.pth')['random_states']
    assert not torch.equal(first['torch'], second['torch'])


def test_processes_that_would_resume_from_different_iterations(run, trained, tmp_path):
    """As on nodes of which one does not see the work dir of the other."""
    checkpoint = str(trained('lora', 'two').folder / 'epoch_1.pth')
    with pytest.raises(SetupError, match='the processes would start at different iterations: 2, 0'):
        run(train, 2, tmp_path, {}, [dict(resume=True, load_from=checkpoint), {}])


# Shards


def test_checkpoints_of_shards(trained):
    """What they hold, and how it is named, is the same as without shards."""
    ours, theirs = (read_checkpoint(trained('lora', kind).folder / 'epoch_2.pth') for kind in ('shards', 'one'))
    assert ours.keys() == theirs.keys()
    assert_close(ours['state_dict'], theirs['state_dict'])
    assert ours['optimizer']['param_groups'] == theirs['optimizer']['param_groups']
    ours, theirs = ({number: state['momentum_buffer'] for number, state in checkpoint['optimizer']['state'].items()}
                    for checkpoint in (ours, theirs))
    assert_close(ours, theirs)


def test_public_functions_of_a_model_in_shards(run, tmp_path):
    if not hasattr(torch.distributed.fsdp, 'fully_shard'):
        pytest.skip('torch >= 2.6')
    held = []
    for (whole, shards), refusals, held_here, expected, output in run(use_in_shards, 2, tmp_path):
        for ours, theirs in zip(shards[:2], whole):
            assert_same(ours, theirs)
        assert shards[2:] == whole[2:]
        assert len(refusals) == 3 and all(text.startswith('The model is in shards') for text in refusals)
        torch.testing.assert_close(output, expected)
        held.append(held_here)
    assert all(a or b for a, b in zip(*held)) and held[0] != held[1]


def test_torch_without_fully_shard(monkeypatch):
    monkeypatch.delattr(torch.distributed.fsdp, 'fully_shard', raising=False)
    with pytest.raises(SetupError, match=rf'needs torch 2.6 .*{re.escape(torch.__version__)}\n.*runner_type=Runner'):
        FullyShardStrategy().shard()


def test_who_shards(run, tmp_path):
    with pytest.raises(SetupError, match='nothing has sharded the model'):
        run(train, 2, tmp_path, dict(setting='full', **SHARDS))


@pytest.mark.parametrize('processes', [1, 2])
def test_averages_of_shards(run, tmp_path, processes):
    """EMAHook would copy shards to whole tensors; with one process there are none."""
    options = dict(SHARDS, hooks=[dict(type='EMAHook')])
    if processes == 1:
        assert len(run(train, 1, tmp_path, options)[0]['gradients']) == 4
    else:
        with pytest.raises(SetupError, match='EMAHook averages whole tensors'):
            run(train, 2, tmp_path, options)


def test_a_loss_that_is_not_finite(run, tmp_path):
    with pytest.raises(SetupError, match='The loss is not finite'):
        run(train, 2, tmp_path, dict(SHARDS, lr=1e30))


def test_a_detector_in_shards(run, digits, tmp_path):
    """Its metrics after an epoch are those of its checkpoint without shards, and old checkpoints are removed."""
    options = detector_options(digits, **{
        **SHARDS, 'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 1,
        'default_hooks.checkpoint.save_best': 'coco/bbox_mAP', 'model.test_cfg.rcnn.score_thr': 0.,
        'model.backbone.liera.scale': 'plain'})  # learns something in so few steps
    first, second = run(run_detector, 2, 'validate', tmp_path, options)
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['best_coco_bbox_mAP_epoch_2.pth', 'epoch_2.pth']
    options['load_from'] = str(tmp_path / 'epoch_2.pth')
    alone, = run(run_detector, 1, 'test', tmp_path, options)
    assert first == second == pytest.approx(alone, abs=1e-3) and alone['coco/bbox_mAP'] > 0


# Metrics


def test_metrics_of_uneven_shards(run, digits, detector, tmp_path):
    """Three images for two processes: each counts once, to the last digit."""
    annotations = json.loads((digits / 'annotations/instances_train2017.json').read_text())
    annotations['images'].pop()
    kept = {image['id'] for image in annotations['images']}
    annotations['annotations'] = [one for one in annotations['annotations'] if one['image_id'] in kept]
    (tmp_path / 'three.json').write_text(json.dumps(annotations))
    options = detector_options(digits, **{
        'test_dataloader.dataset.ann_file': str(tmp_path / 'three.json'),
        'test_dataloader.dataset.data_prefix.img': 'train2017/',
        'test_evaluator.ann_file': str(tmp_path / 'three.json'), 'model.test_cfg.rcnn.score_thr': 0.,
        'load_from': str(detector.checkpoint)})
    (one, ), (first, second) = (run(run_detector, processes, 'test', tmp_path, options) for processes in (1, 2))
    assert first == second == one
    assert len(kept) == 3 and one['coco/bbox_mAP'] > 0


# Processes that die


def worker(job, rank, restarts):
    """Process id of a process that torchrun has started."""
    for pid in Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split():
        if {f'RANK={rank}', f'TORCHELASTIC_RESTART_COUNT={restarts}'} <= {
                *Path(f'/proc/{pid}/environ').read_text().split('\0')}:
            return int(pid)
    raise AssertionError(f'there is no process {rank}')


@pytest.mark.skipif(not Path('/proc/self/environ').is_file(), reason='it finds processes in /proc')
def test_a_killed_process(digits, tmp_path):
    """The job restarts and goes on from the latest checkpoint; killed once more, it ends with an error that says why."""
    options = detector_options(digits, **{'train_cfg.max_epochs': 99, 'default_hooks.checkpoint.interval': 1,
                                          'default_hooks.checkpoint.max_keep_ckpts': 99})
    words = [f'{key}={value}'.replace(' ', '') for key, value in options.items()]
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', OMP_NUM_THREADS='1',
               CUDA_VISIBLE_DEVICES='', MAX_RESTARTS='1', PORT=str(free_port()))
    work_dir, output = tmp_path / 'work_dir', tmp_path / 'output'
    with open(output, 'w') as file:
        job = subprocess.Popen([ROOT / 'tools/dist_train.sh', DIGITS_CONFIG, '2', '--work-dir', work_dir, '--cfg-options',
                                *words], stdout=file, stderr=file, env=env)
    try:
        for restarts, epoch in enumerate((1, 4)):
            deadline = time.time() + 90
            while not (work_dir / f'epoch_{epoch}.pth').is_file():
                assert job.poll() is None and time.time() < deadline, output.read_text()[-4000:]
                time.sleep(.05)
            os.kill(worker(job, 1, restarts), signal.SIGKILL)
        assert job.wait(timeout=60) == 1
    finally:
        job.terminate()  # and with it the processes that it has started
        job.wait()
    text = output.read_text()
    assert text.count(f'{work_dir} has no checkpoint to resume from: training from the beginning\n') == 1
    assert re.findall(r'resumed epoch: (\d+)', text) in (['1'], ['2'], ['3'])
    assert 'Signal 9 (SIGKILL) received by PID' in text and 'rank      : 1 (local_rank: 1)' in text
