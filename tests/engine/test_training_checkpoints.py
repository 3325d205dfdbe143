"""Checkpoints of a training: what they leave out and get back, and what damage and a full disk do to them."""
import contextlib
import os
import random
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, init_detector
from mmengine.config import Config
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from safetensors.torch import load_file

from liera_mm.core.errors import SetupError
from liera_mm.engine.checkpoint import CheckpointBackend, random_state, set_random_state
from liera_mm.engine.safe_loading import latest_checkpoint, read_checkpoint
from liera_mm.models.pretrained import decode_record

pytestmark = pytest.mark.usefixtures('one_thread', 'on_the_cpu')

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / 'liera_mm/weights/mask-rcnn_convnextv2-mini_glyphs.safetensors'
RECORD = 'backbone.liera_record'


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]


def refused(run, message):
    with pytest.raises(SetupError, match=message) as error:
        run()
    assert len(str(error.value).splitlines()) == 2
    return str(error.value)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """The weights that ship with the package as another file, in single precision."""
    path = tmp_path_factory.mktemp('base') / 'base.pth'
    torch.save(dict(state_dict={name: tensor.float() for name, tensor in load_file(SHIPPED).items()}), path)
    return path


def train(make_runner, *config, **options):
    runner = make_runner(*config, **{'train_cfg.val_interval': 9, **options})
    runner.train()
    return SimpleNamespace(
        path=Path(runner.work_dir, 'epoch_1.pth'),
        config=runner.cfg,
        state=clone(runner.model),
        log=next(Path(runner.log_dir).glob('*.log')).read_text())


@pytest.fixture(scope='module')
def trained(on_the_cpu, make_runner, base):
    """A training from init_cfg, with a base of its own."""
    return train(make_runner, **{'model.backbone.init_cfg.checkpoint': str(base)})


@pytest.fixture(scope='module')
def tuned(on_the_cpu, make_runner, base, tmp_path_factory):
    """A training whose base is that of a detector given as load_from."""
    whole = torch.load(base, weights_only=True)
    for name, tensor in whole['state_dict'].items():
        if name.startswith('backbone.'):
            tensor.mul_(1.01)
    path = tmp_path_factory.mktemp('tuned') / 'detector.pth'
    torch.save(whole, path)
    return train(make_runner, load_from=str(path)), path


def build_and_load(checkpoint, config, **options):
    """The state of a detector that was never trained here, after loading a checkpoint as mmdet's users do."""
    config = Config(config.to_dict())
    config.merge_from_dict(options)
    return clone(init_detector(config, str(checkpoint), device='cpu', cfg_options=options or None))


# The frozen weights


def test_a_checkpoint_is_small(trained, tuned, make_runner):
    full = train(make_runner, ROOT / 'configs/digits/mask-rcnn_convnextv2-mini_full_digits.py')
    for path in (trained.path, tuned[0].path):
        assert path.stat().st_size < .75 * full.path.stat().st_size
        assert len([name for name in read_checkpoint(path)['state_dict'] if name.startswith('backbone.')]) == 34 * 3 + 1


@pytest.mark.parametrize('given', ['no init_cfg', 'init_cfg', 'inferencer'])
def test_mmdet_gets_the_whole_model(trained, tuned, given):
    """init_detector takes the init_cfg out of the config; the checkpoint then says where the weights are."""
    for run in (trained, tuned[0]):
        if given == 'inferencer':
            config = Config(run.config.to_dict())
            ours = clone(DetInferencer(config, str(run.path), device='cpu', show_progress=False).model)
        else:
            ours = build_and_load(run.path, run.config, **{'model.backbone.with_cp': False} if given == 'init_cfg' else {})
        assert_equal(ours, run.state)


@pytest.mark.parametrize('options', [
    {'model.backbone.liera.method': 'pissa'},
    {'model.backbone.liera.method': 'dora'},
    {'model.backbone.liera.train_norm': True},
    {'model.backbone.liera': None},
    {'model.backbone': dict(_delete_=True, type='LieRABackbone', liera=dict(rank=2), backbone=dict(
        type='mmpretrain.ConvNeXt', arch=dict(depths=[2, 2, 4, 2], channels=[24, 48, 96, 192]), use_grn=True,
        out_indices=[0, 1, 2, 3], layer_scale_init_value=0., gap_before_final_norm=False, linear_pw_conv=False,
        init_cfg=dict(type='Pretrained', checkpoint=f'liera://{SHIPPED.stem}', prefix='backbone.')))},
    {'default_hooks.checkpoint.published_keys': ['meta', 'state_dict']},
], ids=['pissa', 'dora', 'train_norm', 'frozen', 'around', 'published'])
def test_variants(make_runner, options):
    run = train(make_runner, **options)
    path, = run.path.parent.glob('epoch_1-*.pth') if 'default_hooks.checkpoint.published_keys' in options else [run.path]
    stored = read_checkpoint(path)['state_dict']
    record = decode_record(stored.pop(RECORD))
    assert len(record['fingerprint']) > 50
    assert {f'backbone.{name}' for name in record['fingerprint']} == run.state.keys() - stored.keys()
    assert_equal(build_and_load(path, run.config), run.state)


def test_fetched_weights_do_not_reset_what_was_trained(trained, base):
    """The base alone starts PiSSA's and DoRA's tensors anew, but not where a checkpoint has them."""
    model = init_detector(Config(trained.config.to_dict()), str(trained.path), device='cpu')
    before = clone(model)
    checkpoint = read_checkpoint(trained.path)
    model.load_state_dict(checkpoint['state_dict'])  # strict: nothing is missing or left over
    assert_equal(clone(model), before)


def change(path, out, name):
    """A copy of a checkpoint in which one weight has another last bit."""
    content = torch.load(path, weights_only=True)
    tensor = content['state_dict'][name].view(-1)
    tensor[0] = torch.nextafter(tensor[0], torch.tensor(9.))
    torch.save(content, out)
    return str(out)


@pytest.mark.parametrize('run', ['test', 'val', 'resume', 'init_detector', 'init_cfg'])
def test_a_base_with_one_weight_changed_is_refused(make_runner, trained, base, tmp_path, run):
    other = change(base, tmp_path / 'other.pth', 'backbone.stages.2.1.norm.weight')
    options = {'model.backbone.init_cfg.checkpoint': other}
    message = r'other.pth has others: stages.2.1.norm.weight of 124 tensors differ'
    if run == 'init_detector':  # which has only the source that the checkpoint names
        content = base.read_bytes()
        base.write_bytes(Path(other).read_bytes())
        try:
            refused(lambda: build_and_load(trained.path, trained.config), message.replace('other.pth', 'base.pth'))
        finally:
            base.write_bytes(content)
    elif run == 'init_cfg':
        refused(lambda: build_and_load(trained.path, trained.config, **options), message)
    else:
        runner = make_runner(**options, load_from=str(trained.path), resume=run == 'resume')
        refused(runner.train if run == 'resume' else getattr(runner, run), message)


def test_a_base_that_was_moved(make_runner, trained, tuned, base, tmp_path):
    """The error says how to name the new place, and that works: for the base of init_cfg, and for that of load_from."""
    for run, source in ((trained, base), (tuned[0], tuned[1])):
        moved = tmp_path / 'moved.pth'
        source.rename(moved)
        try:
            message = refused(lambda run=run: build_and_load(run.path, run.config),
                              f'frozen weights that are not there: {source} cannot be loaded .*can not be found')
            options = dict(option.split('=') for option in message.split() if option.startswith('model.'))
            assert options == {'model.backbone.init_cfg.type': 'Pretrained', 'model.backbone.init_cfg.checkpoint': 'FILE',
                               'model.backbone.init_cfg.prefix': 'PREFIX'}
            options.update({'model.backbone.init_cfg.checkpoint': str(moved), 'model.backbone.init_cfg.prefix': 'backbone.'})
            assert_equal(build_and_load(run.path, run.config, **options), run.state)
        finally:
            moved.rename(source)


def test_the_log_says_what_stays_in(make_runner, trained, tmp_path):
    """A base in the work dir could be overwritten by the training itself."""
    assert trained.log.count('LieRA  checkpoints leave out 124 frozen tensors of backbone, which are those of ') == 1
    runner = make_runner(**{'model.backbone.init_cfg': None, 'train_cfg.val_interval': 9})
    path = Path(runner.work_dir, 'start.pth')
    torch.save(trained.state, path)
    runner._load_from = str(path)
    runner.train()
    log = next(Path(runner.log_dir).glob('*.log')).read_text()
    assert log.count('LieRA  checkpoints hold 124 frozen tensors of backbone: these cannot be had again') == 1
    stored = read_checkpoint(path.with_name('epoch_1.pth'))['state_dict']
    assert decode_record(stored.pop(RECORD))['fingerprint'] == {}
    assert_equal(stored, clone(runner.model))
    path.unlink()
    assert_equal(build_and_load(path.with_name('epoch_1.pth'), runner.cfg), clone(runner.model))


def test_a_training_that_starts_from_a_checkpoint_without_base(make_runner, tuned):
    """Its checkpoints name the source of that one's base, not the checkpoint."""
    first, source = tuned
    second = train(make_runner, load_from=str(first.path))
    record = decode_record(read_checkpoint(second.path)['state_dict'][RECORD])
    assert record['source'] == dict(option='load_from', checkpoint=str(source), prefix='backbone.')
    frozen = [name for name in first.state if name[len('backbone.'):] in record['fingerprint']]
    assert len(frozen) == 124 and all(torch.equal(second.state[name], first.state[name]) for name in frozen)
    assert_equal(build_and_load(second.path, second.config), second.state)


def test_the_base_of_init_cfg_given_once_more(make_runner, base):
    """By load_from, as in a whole checkpoint of the first training: the base is still that of init_cfg."""
    run = train(make_runner, **{'model.backbone.init_cfg.checkpoint': str(base), 'load_from': str(base)})
    record = decode_record(read_checkpoint(run.path)['state_dict'][RECORD])
    assert record['source'] == dict(option='init_cfg', checkpoint=str(base), prefix='backbone.')


def test_a_checkpoint_that_names_itself_as_its_base(tuned, tmp_path):
    run, source = tuned
    content = source.read_bytes()
    source.write_bytes(run.path.read_bytes())
    try:
        refused(lambda: build_and_load(run.path, run.config), 'names itself as their source')
    finally:
        source.write_bytes(content)


def test_other_settings_are_refused_without_hooks_too(trained):
    refused(lambda: build_and_load(trained.path, trained.config, **{'model.backbone.liera.update': 'exp'}),
            "other liera settings: update 'taylor', here 'exp'")


# Damage


@pytest.mark.parametrize('damage', ['cut', 'a byte', 'a run of zeros', 'a piece missing'])
def test_a_damaged_checkpoint_is_refused(trained, tmp_path, damage):
    data, path = trained.path.read_bytes(), tmp_path / 'damaged.pth'
    rng = random.Random(0)
    for _ in range(10):
        start = rng.randrange(len(data))
        while not data[start]:
            start = rng.randrange(len(data))
        path.write_bytes({
            'cut': data[:start],
            'a byte': data[:start] + bytes([data[start] ^ rng.randrange(1, 256)]) + data[start + 1:],
            'a run of zeros': data[:start] + bytes(len(data[start:start + 5000])) + data[start + 5000:],
            'a piece missing': data[:start] + data[start + 5000:],
        }[damage])
        with contextlib.suppress(AssertionError):
            refused(lambda: read_checkpoint(path), 'damaged.pth is no checkpoint, or a damaged one')
            continue
        # What has no checksum has no meaning: dates and attributes of the archive's entries
        assert damage == 'a byte'
        assert_equal(read_checkpoint(path)['state_dict'], read_checkpoint(trained.path)['state_dict'])


@pytest.mark.parametrize('name', ['last_checkpoint names it', 'last_checkpoint is empty', 'no last_checkpoint',
                                  'last_checkpoint names one that is gone', 'the newest is torn', 'elsewhere'])
def test_latest_checkpoint(tmp_path, capsys, name):
    folder = tmp_path / ('elsewhere' if name == 'elsewhere' else '.')
    folder.mkdir(exist_ok=True)
    for epoch in (1, 2, 10):
        torch.save(dict(epoch=epoch), folder / f'epoch_{epoch}.pth')
        os.utime(folder / f'epoch_{epoch}.pth', (epoch, epoch))
    torch.save(dict(epoch=0), folder / 'best_coco_epoch_11.pth')  # it has no optimizer
    (folder / 'epoch_12.pth.7.partial').write_bytes(b'half')
    expected, pointer = folder / 'epoch_10.pth', tmp_path / 'last_checkpoint'
    if name == 'last_checkpoint names it':
        expected = folder / 'epoch_2.pth'
        pointer.write_text(str(expected))
    elif name == 'last_checkpoint is empty':
        pointer.write_text('')
    elif name in ('last_checkpoint names one that is gone', 'elsewhere'):
        pointer.write_text(str(folder / 'epoch_9.pth'))
    elif name == 'the newest is torn':
        expected.write_bytes(expected.read_bytes()[:-100])
        pointer.write_text(str(expected))
        expected = folder / 'epoch_2.pth'
    assert latest_checkpoint(str(tmp_path)) == str(expected)
    assert ('epoch_10.pth is no checkpoint, or a damaged one' in capsys.readouterr().out) == (name == 'the newest is torn')


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(str(tmp_path)) is None
    assert latest_checkpoint(str(tmp_path / 'nowhere')) is None


def test_the_old_checkpoint_goes_when_the_new_one_is_there(tmp_path):
    old, new = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    partial = tmp_path / 'epoch_2.pth.123.partial'  # of a process that was killed
    backend, other = (get_file_backend(str(tmp_path), backend_args=dict(backend='checkpoints')) for _ in range(2))
    assert type(backend) is CheckpointBackend
    backend.put(b'one', old)
    partial.write_bytes(b'tw')
    backend.remove(old)
    assert old.read_bytes() == b'one'
    other.put(b'two', new)
    assert [path.name for path in tmp_path.iterdir()] == ['epoch_2.pth'] and new.read_bytes() == b'two'
    backend.remove(new)
    other.put(b'again', new)  # as with save_best, which saves the last one once more
    assert new.read_bytes() == b'again'


def test_a_full_disk(make_runner):
    """The second checkpoint does not fit: an error of two lines, and the first is still there."""
    options = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 9, 'default_hooks.checkpoint.max_keep_ckpts': 1}
    runner = make_runner(**options)
    first, limits = Path(runner.work_dir, 'epoch_1.pth'), resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillTheDisk(Hook):

        def before_train_epoch(self, runner):
            if first.exists():
                resource.setrlimit(resource.RLIMIT_FSIZE, (first.stat().st_size // 2, limits[1]))

    runner.register_hook(FillTheDisk())
    try:
        message = refused(runner.train, 'epoch_2.pth could not be saved: .*File too large')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '--resume continues from there' in message
    assert [path.name for path in first.parent.glob('epoch*')] == ['epoch_1.pth']
    assert latest_checkpoint(runner.work_dir) == str(first)


def test_random_state(tmp_path):

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    torch.save(random_state(), tmp_path / 'state')
    expected = draw()
    assert draw() != expected
    set_random_state(torch.load(tmp_path / 'state', weights_only=True))
    assert draw() == expected
