"""Adapter files: what goes in, what comes back, and all that is refused."""
import copy
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from liera_mm import __version__, adapt, adapter_state_dict, load_adapter, merge, save_adapter, unmerge
from liera_mm.core.adapted import adapted_layers, intended_parameters
from liera_mm.core.algebra import METHODS
from liera_mm.core.checkpoint import FORMAT, fingerprint, seal
from liera_mm.core.group import UPDATES

pytestmark = pytest.mark.usefixtures('one_thread')

SETTINGS = {
    'rank': 2,
    'alpha': 4,
    'overrides': [{'targets': ['depthwise'], 'method': 'dense'}],
    'train_norm': True,
    'train_bias': True
}


@pytest.fixture
def model(net, image, perturb):
    """An adapted and trained network; its batch norm has seen images."""
    perturb(adapt(net, **SETTINGS)).train()(image)
    return net.eval()


@pytest.fixture
def other(net, model, perturb):
    """The same base with other factors, norms, biases and statistics."""
    other = perturb(copy.deepcopy(model))
    other.stem[1].reset_running_stats()
    return other


@pytest.fixture
def path(model, tmp_path):
    save_adapter(model, tmp_path / 'adapter.safetensors')
    return tmp_path / 'adapter.safetensors'


def contents(path):
    with safe_open(path, 'pt') as file:  # clones, since the tensors are views of the file
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


def write(path, tensors, metadata):
    """As save_adapter() would, with a right checksum."""
    path.write_bytes(seal(tensors, {key: value for key, value in metadata.items() if key != 'checksum'}))
    return path


def assert_equal(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def assert_refused(model, source, match):
    """load_adapter() raises an error that names the problem, and the model is as it was, merged or not."""
    for prepare in (merge, unmerge):
        prepare(model)
        state = copy.deepcopy(model.state_dict())
        flags = [(id(p), p.requires_grad, p.detach().clone()) for p in model.parameters()]
        with pytest.raises(ValueError, match=match):
            load_adapter(model, source)
        assert_equal(model.state_dict(), state)
        assert all(layer.merged == (prepare is merge) for _, layer in adapted_layers(model))
        for parameter, (identity, flag, value) in zip(model.parameters(), flags):
            assert (id(parameter), parameter.requires_grad) == (identity, flag)
            assert torch.equal(parameter, value)


# What is in an adapter


def test_adapter_state_dict_is_all_that_is_not_frozen(model):
    state = adapter_state_dict(model)
    buffers = {'stem.1.running_mean', 'stem.1.running_var', 'stem.1.num_batches_tracked'}
    buffers |= {f'{name}.adapter.rms' for name, layer in adapted_layers(model) if layer.adapter.rms is not None}
    assert set(state) == intended_parameters(model) | buffers
    assert set(state).isdisjoint(fingerprint(model))
    assert set(state) | set(fingerprint(model)) == set(model.state_dict())
    assert_equal(adapter_state_dict(merge(model)), state)


def test_only_factors_where_nothing_else_trains():
    model = adapt(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4)))
    assert list(adapter_state_dict(model)) == ['0.adapter.A', '0.adapter.B', '0.adapter.rms']


def test_file_contents(model, path):
    tensors, metadata = contents(path)
    assert_equal(dict(sorted(tensors.items())), dict(sorted(adapter_state_dict(model).items())))
    assert metadata['format'] == FORMAT and metadata['version'] == __version__
    assert json.loads(metadata['config']) == json.loads(json.dumps(model.liera))
    assert json.loads(metadata['fingerprint']) == fingerprint(model)
    assert sorted(file.name for file in path.parent.iterdir()) == ['adapter.md', path.name]


def test_merging_does_not_change_the_file(model, path, tmp_path):
    save_adapter(merge(model), tmp_path / 'merged')
    assert (tmp_path / 'merged').read_bytes() == path.read_bytes()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_file_in_another_precision(model, other, tmp_path, dtype):
    save_adapter(model, tmp_path / 'adapter', dtype)
    expected = {name: t.to(dtype) if t.is_floating_point() and t.dim() else t
                for name, t in adapter_state_dict(model).items()}
    assert_equal(dict(sorted(contents(tmp_path / 'adapter')[0].items())), dict(sorted(expected.items())))
    load_adapter(other, tmp_path / 'adapter')
    ours = adapter_state_dict(other)
    assert_equal(ours, {name: tensor.to(ours[name].dtype) for name, tensor in expected.items()})


@pytest.mark.parametrize(('value', 'dtype'), [(torch.nan, None), (torch.inf, None), (1e5, torch.float16)])
def test_what_is_not_finite_is_not_saved(model, tmp_path, value, dtype):
    with torch.no_grad():
        model.head.adapter.A[0, 0] = value
    with pytest.raises(ValueError, match='not saved: head.adapter.A has values that are not finite in torch.float'):
        save_adapter(model, tmp_path / 'adapter', dtype)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('dtype', [torch.int8, torch.complex64, torch.float8_e4m3fn, 'float16'], ids=str)
def test_no_precision_of_an_adapter(model, tmp_path, dtype):
    with pytest.raises(ValueError, match=f'dtype must be torch.float16, .*, not {dtype!r}'):
        save_adapter(model, tmp_path / 'adapter', dtype)
    assert not [*tmp_path.iterdir()]


# Loading


@pytest.mark.parametrize('merged', [False, True], ids=['unmerged', 'merged'])
@pytest.mark.parametrize('source', ['path', 'str', 'mapping', 'ordered'])
def test_load(model, other, path, image, source, merged):
    assert not torch.equal(other(image), model(image))
    parameters = list(map(id, other.parameters()))
    if merged:
        merge(other)
    mapping = adapter_state_dict(model)
    sources = {'path': path, 'str': str(path), 'mapping': mapping, 'ordered': OrderedDict(mapping)}
    assert load_adapter(other, sources[source]) is other
    assert_equal(other.state_dict(), model.state_dict())
    assert torch.equal(other(image), model(image))
    assert other.stem[1].num_batches_tracked == 1
    assert list(map(id, other.parameters())) == parameters  # an optimizer still holds them
    assert {name for name, p in other.named_parameters() if p.requires_grad} == intended_parameters(other)


@pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])
def test_load_into_a_fresh_process(net, perturb, image, tmp_path, method, update):
    base = copy.deepcopy(net)
    perturb(adapt(net, rank=2, method=method, update=update))
    save_adapter(net, tmp_path / 'adapter')
    fresh = load_adapter(adapt(base, rank=2, method=method, update=update), tmp_path / 'adapter')
    assert torch.equal(fresh(image), net(image))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(model, other, tmp_path, dtype):
    save_adapter(model.to(dtype), tmp_path / 'adapter')
    assert_equal(load_adapter(other.to(dtype), tmp_path / 'adapter').state_dict(), model.state_dict())


def test_channels_last(model, other, path, tmp_path):
    model.to(memory_format=torch.channels_last)
    save_adapter(model, tmp_path / 'channels_last')
    assert_equal(contents(tmp_path / 'channels_last')[0], contents(path)[0])
    assert_equal(load_adapter(other, tmp_path / 'channels_last').state_dict(), model.state_dict())
    assert_equal(load_adapter(model, path).state_dict(), other.state_dict())


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_from_and_to_a_gpu(model, other, path, tmp_path):
    save_adapter(model.cuda(), tmp_path / 'gpu')
    assert_equal(contents(tmp_path / 'gpu')[0], contents(path)[0])
    load_adapter(other.cuda(), path)
    assert_equal(other.state_dict(), model.state_dict())
    assert fingerprint(other) == fingerprint(model.cpu())


def test_a_layer_under_two_names(tmp_path, perturb):
    shared = nn.Linear(4, 4)
    model = perturb(adapt(nn.Sequential(shared, shared)))
    fresh = perturb(copy.deepcopy(model))
    save_adapter(model, tmp_path / 'adapter')
    assert_equal(load_adapter(fresh, tmp_path / 'adapter').state_dict(), model.state_dict())


# Another model


@pytest.mark.parametrize(('change', 'match'), [
    (lambda s: s.pop('head.adapter.A'), 'missing head.adapter.A; unexpected nothing'),
    (lambda s: s.pop('stem.1.running_var'), 'missing stem.1.running_var'),
    (lambda s: s.update({'neck.adapter.A': torch.ones(1)}), 'missing nothing; unexpected neck.adapter.A'),
    (lambda s: s.update({'head.weight': torch.ones(2, 4)}), 'unexpected head.weight'),
    (lambda s: s.update({'model.head.bias': s.pop('head.bias')}), 'missing head.bias; unexpected model.head.bias'),
    (lambda s: s.clear(), 'missing head.adapter.A, head.adapter.B, head.adapter.rms and .* more'),
    (lambda s: s.update({'head.adapter.A': torch.ones(3, 4)}), r'head.adapter.A is \(3, 4\).*\(2, 4\)'),
    (lambda s: s.update({'head.adapter.A': s['head.adapter.A'].T.contiguous()}), r'head.adapter.A is \(4, 2\)'),
    (lambda s: s.update({'head.bias': torch.ones(1)}), r'head.bias is \(1,\)'),  # would broadcast
    (lambda s: s.update({'head.bias': torch.ones(2, dtype=torch.int32)}), 'head.bias .*int32'),
    (lambda s: s.update({'head.bias': torch.ones(2, dtype=torch.bool)}), 'head.bias .*bool'),
    (lambda s: s.update({'stem.1.num_batches_tracked': torch.tensor(1.5)}), 'num_batches_tracked .*float32'),
    (lambda s: s['head.adapter.A'].view(-1)[-1:].fill_(torch.nan), 'head.adapter.A .*not finite'),
    (lambda s: s['stem.1.running_var'][:1].fill_(torch.inf), 'stem.1.running_var .*not finite'),
    (lambda s: s['stages.0.grn.gamma'].view(-1)[:1].fill_(-torch.inf), 'stages.0.grn.gamma .*not finite'),
])
@pytest.mark.parametrize('as_file', [False, True], ids=['mapping', 'file'])
def test_tensors_that_do_not_fit(other, path, change, match, as_file):
    tensors, metadata = contents(path)
    change(tensors)
    assert_refused(other, write(path, tensors, metadata) if as_file else tensors, match)


@pytest.mark.parametrize(('key', 'value'), [
    ('rank', 3),
    ('alpha', 8),
    ('method', 'dense'),
    ('update', 'exp'),
    ('targets', ['*']),
    ('overrides', []),
    ('overrides', [{'targets': ['depthwise'], 'method': 'dense', 'update': 'exp'}]),
    ('train_norm', False),
    ('train_bias', False),
])
def test_another_configuration(net, perturb, tmp_path, key, value):
    base = copy.deepcopy(net)
    save_adapter(perturb(adapt(net, **SETTINGS)), tmp_path / 'adapter')
    other = adapt(base, **{**SETTINGS, key: value})
    assert_refused(other, tmp_path / 'adapter', f'another configuration: {key} .*, here .*$')


def test_several_differences_are_all_named(net, tmp_path):
    base = copy.deepcopy(net)
    save_adapter(adapt(net, **SETTINGS), tmp_path / 'adapter')
    other = adapt(base, **{**SETTINGS, 'rank': 3, 'update': 'exp'})
    assert_refused(other, tmp_path / 'adapter', "configuration: rank 2, here 3; update 'taylor', here 'exp'")


def test_the_same_configuration_in_other_types(net, tmp_path):
    base = copy.deepcopy(net)
    save_adapter(adapt(net, rank=2, alpha=32, targets=('linear', 'conv')), tmp_path / 'adapter')
    load_adapter(adapt(base, rank=2, alpha=32., targets=['linear', 'conv']), tmp_path / 'adapter')


@pytest.mark.parametrize('update', UPDATES)
def test_a_file_from_before_there_were_scales(net, perturb, image, tmp_path, update):
    """It is plain; under additive, that is relative as well."""
    model = perturb(adapt(copy.deepcopy(net), rank=2, update=update, scale='plain'))
    save_adapter(model, tmp_path / 'adapter')
    tensors, metadata = contents(tmp_path / 'adapter')
    config = json.loads(metadata['config'])
    assert config.pop('scale') == 'plain'
    write(tmp_path / 'adapter', tensors, dict(metadata, config=json.dumps(config)))
    relative = adapt(copy.deepcopy(net), rank=2, update=update)
    if update == 'additive':
        load_adapter(relative, tmp_path / 'adapter')
        assert torch.equal(relative(image), model(image))
    else:
        assert_refused(relative, tmp_path / 'adapter', "another configuration: scale 'plain', here 'relative'$")
        assert torch.equal(load_adapter(adapt(net, rank=2, update=update, scale='plain'), tmp_path / 'adapter')(image),
                           model(image))


@pytest.mark.parametrize('name', ['stem.0.weight', 'stages.1.depthwise_conv.weight', 'stages.0.gamma', 'head.weight'])
def test_other_frozen_weights(other, path, name):
    with torch.no_grad():
        value = dict(other.named_parameters())[name].view(-1)[-1:]
        value.copy_(torch.nextafter(value, torch.tensor(9.)))  # the smallest change there is
    assert_refused(other, path, f'other frozen weights: {name} of 10 tensors differ')


def test_every_weight_differs(other, path):
    for name in fingerprint(other):
        nn.init.normal_(dict(other.named_parameters())[name])
    assert_refused(other, path, 'other frozen weights: .* and 7 more of 10 tensors differ')


@pytest.mark.parametrize('call', [
    adapter_state_dict,
    fingerprint,
    lambda model: save_adapter(model, 'never_written'),
    lambda model: load_adapter(model, {}),
], ids=['adapter_state_dict', 'fingerprint', 'save_adapter', 'load_adapter'])
def test_a_model_that_is_not_adapted(net, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='not adapted'):
        call(net)
    assert not os.listdir()


def test_a_file_for_a_model_that_is_not_adapted(path):
    with pytest.raises(ValueError, match='not adapted'):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), path)


# Damaged files


@pytest.mark.parametrize('keep', [0, 1, 7, 8, 9, .1, .5, .9, -1000, -100, -1])
def test_truncated(other, path, keep):
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data)) if isinstance(keep, float) else keep])
    assert_refused(other, path, f'{path.name} is no adapter file, or a damaged one')


def test_something_appended(other, path):
    path.write_bytes(path.read_bytes() + b'\0')
    assert_refused(other, path, 'damaged')


@pytest.fixture
def small():
    return adapt(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), rank=1)


@pytest.mark.parametrize('mask', [0x01, 0x02, 0x03, 0x20, 0x80, 0xff], ids=hex)
def test_a_flipped_byte(small, perturb, tmp_path, mask):
    """Every byte in turn, the header's and the padding's too."""
    path, state = tmp_path / 'adapter', copy.deepcopy(perturb(small).state_dict())
    save_adapter(small, path)
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1:])
        with pytest.raises(ValueError, match='adapter'):
            load_adapter(small, path)
    assert_equal(small.state_dict(), state)


@pytest.mark.parametrize('damage', ['a byte', 'a run of zeros', 'cut', 'a piece missing', 'a piece twice'])
def test_500_random_corruptions(model, path, damage):
    """100 of each kind."""
    data, state = path.read_bytes(), copy.deepcopy(model.state_dict())
    for _ in range(100):
        start, value = (int(torch.randint(n, ())) for n in (len(data), 255))
        end = start + 1 + int(torch.randint(200, ()))
        damaged = {
            'a byte': data[:start] + bytes([(data[start] + 1 + value) % 256]) + data[start + 1:],
            'a run of zeros': data[:start] + bytes(len(data[start:end])) + data[end:],
            'cut': data[:start],
            'a piece missing': data[:start] + data[end:],
            'a piece twice': data[:end] + data[start:],
        }[damage]
        if damaged == data:  # there were zeros before
            damaged = data + b' '
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{path.name}'):
            load_adapter(model, path)
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize('trial', range(20))
def test_random_garbage(small, tmp_path, trial):
    state = copy.deepcopy(small.state_dict())
    save_adapter(small, tmp_path / 'adapter')
    data = bytearray((tmp_path / 'adapter').read_bytes())
    start = (8 + int.from_bytes(data[:8], 'little')) * trial // 20  # a run of bytes that begins in the header
    data[start:start + 50] = bytes(torch.randint(256, (50, )).tolist())
    (tmp_path / 'adapter').write_bytes(data)
    with pytest.raises(ValueError, match='adapter'):
        load_adapter(small, tmp_path / 'adapter')
    assert_equal(small.state_dict(), state)


@pytest.mark.parametrize(('change', 'match'), [
    ({'format': None}, 'known format'),
    ({'format': 'liera_mm-adapter-99'}, 'liera_mm-adapter-99'),
    ({'format': 'liera_mm-adapter-1'}, 'known format'),  # it would have no checksum
    ({'config': None}, 'damaged'),
    ({'fingerprint': None}, 'damaged'),
    ({'config': '{'}, 'damaged'),
    ({'config': ''}, 'damaged'),
    ({'config': '[]'}, 'damaged'),
    ({'config': 'null'}, 'damaged'),
    ({'config': '{}'}, 'another configuration'),
    ({'fingerprint': '3'}, 'damaged'),
    ({'fingerprint': '{}'}, 'other frozen weights'),
], ids=str)
def test_damaged_metadata(other, path, change, match):
    tensors, metadata = contents(path)
    metadata = {key: value for key, value in {**metadata, **change}.items() if value is not None}
    assert_refused(other, write(path, tensors, metadata), f'{path.name}.*{match}')


@pytest.mark.parametrize('make, says', [
    (lambda path, state: save_file(state, path), ' of a known format: save_adapter did not'),
    (lambda path, state: save_file({'weight': torch.ones(3)}, path, {'format': 'pt'}), " of a known format: 'pt'"),
    (lambda path, state: torch.save(state, path), ', but a checkpoint of torch'),
    (lambda path, state: path.write_text('{"rank": 16}'), ', or a damaged one'),
    (lambda path, state: path.write_bytes(b''), ', or a damaged one'),
    (lambda path, state: path.write_bytes(bytes(1000)), ''),
], ids=['no_metadata', 'a_model', 'torch', 'text', 'empty', 'zeros'])
def test_files_of_another_kind(other, path, make, says):
    make(path, contents(path)[0])
    assert_refused(other, path, f'{path.name} is no adapter file{says}')


def test_a_missing_file(other, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_adapter(other, tmp_path / 'nowhere')


# Writing


def test_what_trains_beside_the_adapter(net, tmp_path, caplog):
    """It is not saved, which nobody would notice before the adapter is loaded."""
    save_adapter(adapt(net, rank=2, targets=['depthwise'], train=['head'], train_norm=True), tmp_path / 'whole')
    assert not caplog.records
    net.stem[0].weight.requires_grad_()
    save_adapter(net, tmp_path / 'part')
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'stem.0.weight train, but are no part of the adapter and not in ' in caplog.text


@pytest.mark.parametrize('fails', ['write', 'fsync', 'replace'])
@pytest.mark.parametrize('before', [None, b'the adapter of yesterday'], ids=['new', 'existing'])
def test_a_failed_save_leaves_what_was_there(model, tmp_path, monkeypatch, fails, before):
    path = tmp_path / 'adapter'
    if before:
        path.write_bytes(before)

    def fail(*args):
        raise OSError('no space left on device')

    if fails == 'write':
        monkeypatch.setattr('builtins.open', fail)
    else:
        monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match='no space left'):
        save_adapter(model, path)
    monkeypatch.undo()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


def test_the_file_appears_when_it_is_complete(model, tmp_path, monkeypatch):
    path, seen = tmp_path / 'adapter', []
    monkeypatch.setattr(os, 'fsync', lambda file: seen.append((path.exists(), os.fstat(file).st_size)))
    save_adapter(model, str(path))
    assert seen[0] == (False, path.stat().st_size)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['adapter', 'adapter.md']


def test_saving_again_replaces_the_file(model, other, path):
    save_adapter(other, path)
    assert_equal(load_adapter(model, path).state_dict(), other.state_dict())


# Files of older versions


def test_a_file_of_format_1(net, image):
    """Written before there were checksums, with weights that are fractions, the same on every machine."""

    @torch.no_grad()
    def fill(tensors, period, unit):
        for tensor in tensors:
            tensor.copy_((torch.arange(tensor.numel()) % period - period // 2).view(tensor.shape) / unit)

    file, plain = Path(__file__).parents[1] / 'data/adapter_format_1.safetensors', dict(SETTINGS, scale='plain')
    model = copy.deepcopy(net)
    fill([*model.parameters(), model.stem[1].running_mean], 17, 16)
    fresh = adapt(copy.deepcopy(model), **plain)
    assert_refused(adapt(copy.deepcopy(model), **SETTINGS), file, "configuration: scale 'plain', here 'relative'")
    fill([p for p in adapt(model, **plain).parameters() if p.requires_grad], 13, 64)
    load_adapter(fresh, file)
    assert_equal(fresh.state_dict(), model.state_dict())
    assert torch.equal(fresh(image), model(image))
    assert_refused(adapt(net, **plain), file, 'other frozen weights')


# The fingerprint


def test_fingerprint_does_not_see_what_trains(model, other):
    assert fingerprint(model) == fingerprint(other)


def test_fingerprint_is_that_of_the_unmerged_weights(model):
    expected = fingerprint(model)
    assert fingerprint(merge(model)) == expected
    assert fingerprint(unmerge(model)) == expected


def test_fingerprint_does_not_depend_on_the_memory_format(model):
    expected = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == expected


def test_linear_and_1x1_forms_have_the_same_fingerprint():
    linear, conv = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Conv2d(6, 4, 1))
    conv.load_state_dict({name: t.reshape(conv.state_dict()[name].shape) for name, t in linear.state_dict().items()})
    assert fingerprint(adapt(linear)) == fingerprint(adapt(conv))


@pytest.mark.parametrize('name', ['stem.0.weight', 'stem.0.bias', 'stages.0.norm.weight', 'stages.1.gamma'])
def test_fingerprint_names_what_changed(net, name):
    adapt(net)
    before = fingerprint(net)
    assert list(before) == [key for key, _ in net.named_parameters() if '.adapter.' not in key]
    with torch.no_grad():
        dict(net.named_parameters())[name].view(-1)[0] += 1
    after = fingerprint(net)
    assert [key for key in before if before[key] != after[key]] == [name]


def test_fingerprint_sees_the_precision(net):
    adapt(net)
    before, after = fingerprint(net), fingerprint(net.double())
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize('trained, used', [
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float64, torch.float32)], ids=str)
def test_own_base_in_another_precision(net, tmp_path, trained, used):
    """Of the precision that has fewer bits, the base is the other one rounded: that is no other base."""
    base = net.half() if torch.float16 in (trained, used) and trained != torch.float32 else net
    first, second = copy.deepcopy(base).to(trained), copy.deepcopy(base).to(used)
    adapt(first, rank=2)
    save_adapter(first, tmp_path / 'a.safetensors')
    load_adapter(adapt(second, rank=2), tmp_path / 'a.safetensors')
    with torch.no_grad():
        second.head.frozen_weight.mul_(2)
    with pytest.raises(ValueError, match='other frozen weights: head.weight of'):
        load_adapter(second, tmp_path / 'a.safetensors')
