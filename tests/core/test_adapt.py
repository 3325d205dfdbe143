"""Which layers are adapted, what trains, what is refused, and the reports."""
import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from torch import nn

from liera_mm import adapt, export, load_adapter, merge, summary, unmerge
from liera_mm.core.adapted import adapted_layers, adapter_names, intended_parameters, without_adapters
from liera_mm.core.algebra import METHODS
from liera_mm.core.checkpoint import adapter_state_dict, fingerprint
from liera_mm.core.group import MULTIPLICATIVE, UPDATES
from liera_mm.core.layers import AdaptedLayer
from liera_mm.core.targets import KINDS, layer_kind, match_layers

pytestmark = pytest.mark.usefixtures('one_thread')

CONV = ['stem.0']
DEPTHWISE = ['stages.0.depthwise_conv', 'stages.1.depthwise_conv']
POINTWISE = [f'stages.{i}.pointwise_conv{j}' for i in (0, 1) for j in (1, 2)]
LINEAR = ['head']
every_setting = pytest.mark.parametrize(('method', 'update'), [(m, u) for m in METHODS for u in UPDATES])


def names(model):
    return [name for name, _ in adapted_layers(model)]


def snapshot(model):
    """All that adapt() changes on a model."""
    return ([(name, type(m), sorted(vars(m)), m.training) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
            list(model.state_dict()))


def assert_refused(model, error, match, **settings):
    """adapt() raises an error that names the problem, and the model is as it was."""
    next(model.parameters()).requires_grad_(False)  # flags that are not all the same
    before = snapshot(model)
    with pytest.raises(error, match=match):
        adapt(model, **settings)
    assert snapshot(model) == before


# Which layers


@pytest.mark.parametrize(('layer', 'kind'), [
    (nn.Linear(4, 4), 'linear'),
    (nn.Conv2d(4, 6, 1), 'pointwise'),
    (nn.Conv1d(4, 6, 1, stride=2), 'pointwise'),
    (nn.Conv2d(4, 4, 1, groups=4), 'pointwise'),
    (nn.Conv3d(4, 6, (1, 1, 2)), 'conv'),
    (nn.Conv2d(4, 4, 3, groups=4), 'depthwise'),
    (nn.Conv2d(4, 8, 3, groups=4), 'depthwise'),
    (nn.ConvTranspose2d(4, 4, 3, groups=4), 'depthwise'),
    (nn.Conv2d(4, 4, 3, groups=2), 'conv'),
    (nn.Conv2d(1, 4, 3), 'conv'),
    (nn.ConvTranspose1d(4, 4, 3), 'conv'),
    (nn.BatchNorm2d(4), None),
    (nn.Embedding(4, 4), None),
    (nn.Sequential(nn.Linear(4, 4)), None),
], ids=repr)
def test_layer_kind(layer, kind):
    assert layer_kind(layer) == kind


@pytest.mark.parametrize(('targets', 'expected'), [
    (KINDS, [*CONV, *DEPTHWISE, *POINTWISE, *LINEAR]),
    (['conv'], CONV),
    (['depthwise'], DEPTHWISE),
    (['pointwise'], POINTWISE),
    (['linear'], LINEAR),
    (['depthwise', 'linear'], [*DEPTHWISE, *LINEAR]),
    (['*'], [*CONV, *DEPTHWISE, *POINTWISE, *LINEAR]),
    (['head'], LINEAR),
    (['stages.1.*'], [DEPTHWISE[1], *POINTWISE[2:]]),
    (['*.pointwise_conv?'], POINTWISE),
    (['stages.[!0].depthwise_conv'], DEPTHWISE[1:]),
    ([r're:stages\.\d\.depthwise_conv'], DEPTHWISE),
    ([r're:.*conv[12]'], POINTWISE),
    (['re:stem.0|head'], [*CONV, *LINEAR]),
    (['head', 'stages.0.*', 'depthwise'], [*DEPTHWISE, *POINTWISE[:2], *LINEAR]),
    (('linear', 'head'), LINEAR),
], ids=str)
def test_targets(net, targets, expected):
    layers = dict(net.named_modules())
    # In the model's order, so that a seed gives the same factors in every process
    assert match_layers(layers, targets) == [name for name in layers if name in expected]
    adapt(net, targets=targets)
    assert sorted(names(net)) == sorted(expected)


def test_default_targets_do_not_need_every_kind():
    assert names(adapt(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))) == ['1']
    assert names(adapt(nn.Linear(4, 4))) == ['']


@pytest.mark.parametrize(('overrides', 'expected'), [
    ([], ('lora', 'taylor', 4, 2.)),
    ([{'targets': ['depthwise'], 'rank': 2}], ('lora', 'taylor', 2, 4.)),
    ([{'targets': ['depthwise'], 'alpha': 2}], ('lora', 'taylor', 4, .5)),
    ([{'targets': ['depthwise'], 'update': 'exp', 'rank': 1}], ('lora', 'exp', 1, 8.)),
    ([{'targets': ['depthwise'], 'method': 'dense'}], ('dense', 'taylor', None, 1)),
    ([{'targets': ['depthwise'], 'scale': 'plain'}], ('lora', 'taylor', 4, 2.)),
    ([{'targets': ['depthwise'], 'rank': 2}, {'targets': ['stages.*'], 'rank': 3}], ('lora', 'taylor', 3, 8 / 3)),
    ([{'targets': ['stages.*'], 'rank': 3}, {'targets': ['depthwise'], 'rank': 2}], ('lora', 'taylor', 2, 4.)),
    ([{'targets': ['depthwise'], 'rank': 2}, {'targets': ['stages.*'], 'alpha': 6}], ('lora', 'taylor', 2, 3.)),
    ([{'targets': ['head'], 'rank': 2}], ('lora', 'taylor', 4, 2.)),
], ids=str)
def test_overrides(net, overrides, expected):
    given = copy.deepcopy(overrides)
    adapt(net, rank=4, alpha=8, overrides=overrides)
    layer = net.stages[1].depthwise_conv
    assert (layer.method, layer.update, layer.adapter.rank, layer.adapter.scale) == expected
    assert (net.stem[0].method, net.stem[0].update, net.stem[0].adapter.rank) == ('lora', 'taylor', 4)
    assert (layer.adapter.rms is None) == any(override.get('scale') == 'plain' for override in overrides)
    assert overrides == given
    assert len(names(net)) == 8


@pytest.mark.parametrize(('override', 'alpha'), [
    ({}, 16), ({'rank': 5}, 16), ({'rank': 5, 'alpha': 1}, 1), ({'alpha': 1}, 1)])
def test_one_alpha_for_all_ranks(net, override, alpha):
    """Unless it is given."""
    adapt(net, rank=3, overrides=[{'targets': ['head'], **override}])
    assert net.head.adapter.scale == alpha / override.get('rank', 3) and net.stem[0].adapter.scale == 16 / 3
    assert net.liera['alpha'] == 16


def test_numbers_of_numpy(net):
    """As of a search over np.arange or np.logspace; files and cards have plain ones."""
    model = adapt(net, rank=np.int64(3), alpha=np.float32(.5), method='tucker', kernel_rank=np.uint8(1),
                  overrides=[dict(targets=['head'], rank=np.int32(2), alpha=np.float64(4))])
    assert repr([model.liera[key] for key in ('rank', 'alpha', 'kernel_rank', 'overrides')]) == (
        "[3, 0.5, 1, [{'targets': ['head'], 'rank': 2, 'alpha': 4.0}]]")
    assert summary(model)[0].rank == (3, 3, 1, 1) and net.head.adapter.rank == 2
    assert {type(layer.adapter.scale) for _, layer in adapted_layers(model)} == {float}


# What is refused


def test_out_of_memory(net):
    """Nothing is left of the layers that were adapted before."""
    assert_refused(net, RuntimeError, 'memory', overrides=[dict(targets=['head'], rank=10**14)])


@pytest.mark.parametrize(('settings', 'match'), [
    ({'rank': 0}, 'rank .* 0'),
    ({'rank': -1}, 'rank .* -1'),
    ({'rank': 1.5}, r'rank .* 1\.5'),
    ({'rank': True}, 'rank .* True'),
    ({'rank': '16'}, "rank .* '16'"),
    ({'rank': None}, 'rank .* None'),
    ({'alpha': 0}, 'alpha .* 0'),
    ({'alpha': -1}, 'alpha .* -1'),
    ({'alpha': math.nan}, 'alpha .* nan'),
    ({'alpha': math.inf}, 'alpha .* inf'),
    ({'alpha': '32'}, "alpha .* '32'"),
    ({'alpha': 10**400}, 'alpha .* 1000'),
    ({'alpha': 1e-320}, 'alpha .* 1e-320'),
    ({'method': 'lara'}, "method 'lara'.*did you mean 'lora'"),
    ({'method': None}, 'method None'),
    ({'method': 'DoRA'}, "'DoRA'.*did you mean 'dora'"),
    ({'scale': 'RELATIVE'}, "'RELATIVE'.*did you mean 'relative'"),
    ({'method': ['lora']}, r"method \['lora'\]"),
    ({'update': 'tailor'}, "update 'tailor'.*did you mean 'taylor'"),
    ({'method': 'tucker', 'kernel_rank': 0}, 'kernel_rank must be a whole number of at least 1, not 0'),
    ({'overrides': [{'targets': ['conv'], 'kernel_rank': 1.5}]}, 'kernel_rank must .* 1.5'),
    ({'scale': 'absolute'}, "scale 'absolute'.*known: relative, plain"),
    ({'overrides': [{'targets': ['linear'], 'scale': 'relativ'}]}, "'relativ'.*did you mean 'relative'"),
    ({'update': 'Additive'}, "update 'Additive'.*did you mean 'additive'"),
    ({'targets': 'linear'}, r"list.*\['linear'\]"),
    ({'targets': None}, 'targets must be a list .*not None'),
    ({'targets': 5}, 'targets must be a list .*not 5'),
    ({'targets': []}, 'no targets'),
    ({'targets': ()}, 'no targets'),
    ({'targets': [], 'train_bias': True}, 'no targets'),  # of which layers?
    ({'targets': '', 'train_norm': True}, 'list'),
    ({'targets': [], 'train_norm': True, 'overrides': [{'targets': ['linear'], 'rank': 4}]}, "target 'linear'"),
    ({'train_bias': 'alle'}, "train_bias .* 'alle'"),
    ({'train_norm': 'no'}, "train_norm must be True or False, not 'no'"),
    ({'targets': [3]}, 'target.*3'),
    ({'targets': ['depthwize']}, "target 'depthwize'.*did you mean 'depthwise'"),
    ({'targets': ['heed']}, "target 'heed'.*did you mean 'head'"),
    ({'targets': ['linear', 'stages.2.depthwise_conv']}, "'stages.2.depthwise_conv'.*mean 'stages.[01].dep"),
    ({'targets': ['stages']}, "target 'stages'"),
    ({'targets': ['stem.1']}, r"target 'stem\.1'"),  # a norm
    ({'targets': [r're:stages\.\d']}, r'target .re:stages'),  # has to match the whole name
    ({'targets': ['re:stages[']}, r'target .re:stages\['),
    ({'overrides': [{'targets': ['linear'], 'rnak': 4}]}, "'rnak'.*did you mean 'rank'"),
    ({'overrides': [{'target': ['linear'], 'rank': 4}]}, "'target'.*did you mean 'targets'"),
    ({'overrides': [{'targets': ['linear'], 'train_norm': True}]}, "'train_norm'"),
    ({'overrides': [{'targets': ['linear'], 'rank': 0}]}, 'rank .* 0'),
    ({'overrides': [{'targets': ['linear'], 'alpha': math.nan}]}, 'alpha .* nan'),
    ({'overrides': [{'targets': ['linear'], 'method': 'dens'}]}, "'dens'.*did you mean 'dense'"),
    ({'overrides': [{'targets': ['linear'], 'update': 'exb'}]}, "'exb'.*did you mean 'exp'"),
    ({'overrides': [{'targets': ['heads.*'], 'rank': 4}]}, "target 'heads.*'.*did you mean 'head'"),
    ({'overrides': [{'targets': ['linear']}, {'targets': ['linaer'], 'rank': 4}]}, "'linaer'.*did you mean 'linear'"),
    ({'overrides': [{'targets': 'linear', 'rank': 4}]}, r"list.*\['linear'\]"),
    ({'overrides': [{'rank': 4}]}, 'no targets'),
    ({'overrides': [{'targets': [], 'rank': 4}]}, 'no targets'),
    ({'overrides': {'targets': ['linear'], 'rank': 4}}, 'overrides'),
    ({'overrides': ['linear']}, 'overrides'),
    ({'overrides': None}, 'overrides must be a list of dicts, not None'),
    ({'targets': ['conv'], 'overrides': [{'targets': ['linear'], 'rank': 4}]}, "target 'linear'"),
], ids=str)
def test_bad_settings(net, settings, match):
    assert_refused(net, ValueError, match, **settings)


def test_a_kind_that_the_model_lacks():
    assert_refused(nn.Sequential(nn.Linear(4, 4)), ValueError, "target 'depthwise'", targets=['linear', 'depthwise'])


def test_adapting_twice(net):
    adapt(net, targets=['linear'])
    assert_refused(net, ValueError, 'adapted already', targets=['conv'])
    assert_refused(nn.Sequential(nn.Conv2d(3, 3, 3), net), ValueError, 'adapted already')


def test_a_model_without_layers():
    assert_refused(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), ValueError, 'no convolution and no linear layer')


def test_nearest_target(net):
    assert_refused(net, ValueError, r"'stage\.\*' matches no layer; did you mean 'stages\.\*'", targets=['stage.*'])


@every_setting
def test_weights_that_are_not_finite(net, method, update):
    net.stages[1].pointwise_conv1.weight.data[0, 0] = torch.nan
    assert_refused(net, ValueError, '^stages.1.pointwise_conv1: .*not finite', method=method, update=update)


def test_a_name_that_is_no_glob_of_itself():
    model = nn.ModuleDict({name: nn.Conv2d(3, 4, 3) for name in ('a[0]', 'a[1]', 'b', 'c[0]')})
    adapt(model, targets=['a*', 'b'], overrides=[dict(targets=['a[0]'], method='dense')], train=['c[0]'], exclude=['a[1]'])
    assert [(name, layer.method) for name, layer in adapted_layers(model)] == [('a[0]', 'dense'), ('b', 'lora')]
    assert trains(model) == {'c[0].weight', 'c[0].bias'}


class Deformable(nn.Module):
    """As mmcv.ops.DeformConv2d: a convolution that is no nn.Conv2d."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x, offset):
        return F.conv2d(x + offset, self.weight)


class HelpedConv2d(nn.Conv2d):
    """Computes with its weight in another method."""

    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return F.conv2d(x, self.weight)


class DirectConv2d(nn.Conv2d):
    """Calls torch's forward by its name, so that no subclass can come between."""

    def forward(self, x):
        return nn.Conv2d.forward(self, x)


class NestedConv2d(nn.Conv2d):
    """Names its weight in an inner function."""

    def forward(self, x):
        run = lambda: F.conv2d(x, self.weight)  # noqa: E731
        return run() + 0 * super().forward(x)


def no_op(function):

    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class DecoratedConv2d(nn.Conv2d):

    @no_op
    def forward(self, x):
        return F.conv2d(x, self.weight)


class HeirOfConvWS2d(ConvWS2d):
    """Inherits the forward that computes with the weight."""


def replaced_forward():
    """A layer whose forward was replaced on the instance, as wrappers for precision or off-loading do."""
    layer = nn.Conv2d(3, 4, 3)
    forward = layer.forward
    layer.forward = lambda x: forward(x)
    return layer


def sparse():
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


def packed():
    """As layers of bitsandbytes keep their weights."""
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    return layer


@pytest.mark.parametrize('make', [
    Deformable,
    lambda: ConvAWS2d(3, 4, 3),
    lambda: HeirOfConvWS2d(3, 4, 3),
    lambda: HelpedConv2d(3, 4, 3),
    lambda: DirectConv2d(3, 4, 3),
    lambda: NestedConv2d(3, 4, 3),
    lambda: DecoratedConv2d(3, 4, 3),
    replaced_forward,
], ids=['deformable', 'ConvAWS2d', 'heir', 'helped', 'direct', 'nested', 'decorated', 'replaced'])
def test_layers_with_a_forward_of_their_own(make, perturb):
    plain, image = nn.Sequential(make()), torch.randn(1, 3, 6, 6)
    args = (image, 0.) if isinstance(plain[0], Deformable) else (image, )
    model = perturb(adapt(nn.Sequential(make()), rank=2, targets=['0']))
    plain.load_state_dict(export(model), strict=True)
    output = model[0](*args)
    torch.testing.assert_close(output, plain[0](*args))
    output.sum().backward()
    assert all(p.grad.count_nonzero() for p in model[0].adapter.parameters())


@pytest.mark.parametrize('make', [
    lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    packed,
    lambda: nn.Linear(2, 3).to(torch.float8_e4m3fn),
    sparse,
    lambda: nn.Linear(0, 3),
    lambda: nn.Conv2d(4, 0, 3),
], ids=['weight_norm', 'spectral_norm', 'old_spectral_norm', 'packed', 'float8', 'sparse', 'no inputs', 'no outputs'])
def test_layers_that_cannot_be_adapted(make, caplog):
    """Those that a target names are refused; of a kind, they are left out with a line in the log."""
    assert_refused(nn.Sequential(nn.Linear(2, 2), make()), TypeError, '^1: ', targets=['1'])
    assert_refused(nn.Sequential(nn.Linear(2, 2), make()), TypeError, '^1: ', targets=['linear', '*'])
    assert names(adapt(nn.Sequential(nn.Linear(2, 2), make()), targets=['0'])) == ['0']
    assert not caplog.messages
    model = adapt(nn.Sequential(nn.Linear(2, 2), make()))
    assert names(model) == ['0'] and not any(p.requires_grad for p in model[1].parameters())
    message, = caplog.messages
    assert re.match(r'LieRA  1 \w+ layers cannot be adapted and stay as they are: 1 and what is like it, for ', message)
    with pytest.raises(TypeError, match='^0: '):  # nothing is left
        adapt(nn.Sequential(make()))


@pytest.mark.parametrize('targets', [KINDS, ['0']], ids=['all', 'others'])
@pytest.mark.parametrize('make', [lambda: nn.LazyLinear(4), lambda: nn.LazyConv2d(4, 3), nn.LazyBatchNorm1d],
                         ids=['LazyLinear', 'LazyConv2d', 'LazyBatchNorm1d'])
def test_lazy_layers(make, targets):
    """They cannot be frozen either, so targets that leave them out do not help."""
    assert_refused(nn.Sequential(nn.Linear(2, 2), make()), TypeError, '^1: .*first forward pass', targets=targets)


def test_weights_of_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(2, 2))
    assert_refused(model, TypeError, '0.bias was made under torch.inference_mode')


def test_kinds_leave_out_what_is_no_kind():
    assert names(adapt(nn.Sequential(nn.Linear(2, 2), Deformable(), nn.Embedding(2, 2)))) == ['0']


def test_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    for targets in (KINDS, ['0'], ['2']):
        assert_refused(model, ValueError, r'\b0\b.*\b2\b', targets=targets)
    assert names(adapt(nn.Sequential(model, nn.Linear(4, 4)))) == ['1']
    embedding = nn.ModuleDict({'embed': nn.Embedding(4, 4), 'out': nn.Linear(4, 4)})
    embedding['out'].weight = embedding['embed'].weight
    assert_refused(embedding, ValueError, '^out: .*embed')


# What is left out, and what trains whole


def trains(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and '.adapter.' not in f'.{name}'}


NORMS = {f'stages.{i}.{norm}' for i in (0, 1) for norm in ('norm.weight', 'norm.bias', 'grn.gamma', 'grn.beta')}


@pytest.mark.parametrize(('exclude', 'left', 'in_place'), [
    (['stem'], {*DEPTHWISE, *POINTWISE, *LINEAR}, NORMS),
    (['stem.0'], {*DEPTHWISE, *POINTWISE, *LINEAR}, {*NORMS, 'stem.1.weight', 'stem.1.bias'}),
    (['stem.1', '*.grn'], None, {name for name in NORMS if 'grn' not in name}),
    (['*.norm.bias', 'stem*'], {*DEPTHWISE, *POINTWISE, *LINEAR}, {name for name in NORMS if 'norm.bias' not in name}),
    (['depthwise', 'linear', 'stem.1'], {*CONV, *POINTWISE}, NORMS),
    (['re:stages\\.1', 'stem'], {DEPTHWISE[0], *POINTWISE[:2], *LINEAR}, {n for n in NORMS if 'stages.0' in n}),
], ids=str)
def test_exclude(net, exclude, left, in_place):
    adapt(net, train_norm=True, exclude=exclude)
    assert set(names(net)) == (left or {*CONV, *DEPTHWISE, *POINTWISE, *LINEAR})
    assert trains(net) == in_place


def test_exclude_reaches_biases_and_what_trains_whole(net):
    adapt(net, train_bias=True, train=['stem', 'stages.[01].gamma'],
          exclude=['head', 'stages.0', 'stem.0.bias', '*.pointwise_conv1'])
    assert trains(net) == {'stem.0.weight', 'stem.1.weight', 'stem.1.bias', 'stages.1.gamma', 'stages.1.depthwise_conv.bias'}
    assert names(net) == ['stages.1.depthwise_conv', 'stages.1.pointwise_conv2']


@pytest.mark.parametrize(('train', 'in_place', 'left'), [
    (['stem'], {'stem.0.weight', 'stem.0.bias', 'stem.1.weight', 'stem.1.bias'}, {*DEPTHWISE, *POINTWISE, *LINEAR}),
    (['head'], {'head.weight', 'head.bias'}, {*CONV, *DEPTHWISE, *POINTWISE}),
    (['linear'], {'head.weight', 'head.bias'}, {*CONV, *DEPTHWISE, *POINTWISE}),
    (['*.gamma'], {f'stages.{i}.{name}' for i in (0, 1) for name in ('gamma', 'grn.gamma')}, None),
    (['*.pointwise_conv1.bias'], {f'stages.{i}.pointwise_conv1.bias' for i in (0, 1)}, None),
    (['stages.[1]'], None, {*CONV, DEPTHWISE[0], *POINTWISE[:2], *LINEAR}),
], ids=str)
def test_train_whole(net, image, perturb, train, in_place, left):
    base = copy.deepcopy(net)
    adapt(net, rank=2, train=train)
    assert set(names(net)) == (left or {*CONV, *DEPTHWISE, *POINTWISE, *LINEAR})
    expected = in_place or {name for name, _ in base.named_parameters() if name.startswith('stages.1.')}
    assert trains(net) == expected == {*intended_parameters(net)} - {n for n in net.state_dict() if '.adapter.' in n}
    fresh, same = adapt(copy.deepcopy(base), rank=2, train=train), net(image)
    assert torch.equal(same, base(image))
    perturb(net)
    assert expected <= adapter_state_dict(net).keys()
    assert torch.equal(load_adapter(fresh, adapter_state_dict(net))(image), net(image))
    base.load_state_dict(export(net), strict=True)
    torch.testing.assert_close(base(image), net(image), rtol=1e-5, atol=1e-6)
    assert not expected & fingerprint(net).keys()


@pytest.mark.parametrize('option', ['exclude', 'train'])
@pytest.mark.parametrize(('patterns', 'match'), [
    ('stem', r"must be a list, for instance \['stem'\]"),
    (['stom'], "'stom' matches nothing in the model; did you mean 'stem'"),
    (['stages.2'], "'stages.2' matches nothing"),
    ([3], 'target 3 is no layer kind'),
    (None, 'must be a list .*not None'),
    (True, 'must be a list .*not True'),
], ids=str)
def test_bad_patterns(net, option, patterns, match):
    assert_refused(net, ValueError, match, **{option: patterns})


def test_nothing_left(net):
    assert_refused(net, ValueError, 'nothing would train', exclude=['stem', 'stages', 'head'])
    assert_refused(net, ValueError, 'nothing would train', exclude=['*'], train=['stem'], train_norm=True)
    adapt(net, train=['*'])
    assert not names(net) and all(p.requires_grad for p in net.parameters())


def test_settings_that_are_not_given_are_not_recorded(net):
    """Or no file from before these settings existed would load."""
    assert adapt(copy.deepcopy(net)).liera.keys() & {'exclude', 'train'} == set()
    model = adapt(net, exclude=['stem'], train=('head', ))
    assert (model.liera['exclude'], model.liera['train']) == (['stem'], ['head'])


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('update', UPDATES)
def test_layers_of_zeros_train_whole(method, update, caplog):
    """As the offsets of a deformable convolution: a multiplicative update, PiSSA and DoRA would leave them at zero."""
    caplog.set_level('INFO')
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    for parameter in model[1].parameters():
        parameter.data.zero_()
    adapt(model, rank=2, method=method, update=update)
    assert names(model) == ['0', '2'] and trains(model) == {'1.weight', '1.bias'}
    assert caplog.messages == ['LieRA  1 conv layers have nothing but zeros for a weight, and train whole: 1']


@pytest.mark.parametrize('settings, message', [
    (dict(train_bias=True), 'train_bias=True changes nothing: no adapted layer has a bias'),
    (dict(train_bias='all'), "train_bias='all' changes nothing: no layer has a bias"),
    (dict(train_norm=True), 'train_norm=True changes nothing: there is no norm with parameters'),
    (dict(kernel_rank=3), 'kernel_rank changes nothing: no adapted layer has method=\'tucker\''),
    (dict(overrides=[dict(targets=['0'], kernel_rank=2)]), 'kernel_rank changes nothing: no adapted layer has '),
    (dict(overrides=[dict(targets=['0'])]), "overrides of \\['0'\\] set nothing"),
], ids=str)
def test_settings_that_change_nothing(settings, message, caplog):
    """They do no harm, and configs for several backbones may have some: the log says so."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False))
    adapt(model, rank=2, **settings)
    assert re.match(f'LieRA  {message}', '\n'.join(caplog.messages)) and len(caplog.messages) == 1
    assert names(model) == ['0'] and not trains(model)


def test_settings_that_change_something(net, caplog):
    adapt(net, rank=2, train_norm=True, train_bias=True, kernel_rank=3,
          overrides=[dict(targets=['stem.0'], method='tucker'), dict(targets=['conv'], rank=3)])
    assert not caplog.messages


def test_layers_of_zeros_that_are_named_or_excluded():

    def zeros():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight.data.zero_()
        return model

    assert names(adapt(zeros(), targets=['1'], update='additive')) == ['1']
    model = adapt(zeros(), exclude=['1'])
    assert names(model) == ['0'] and not trains(model)
    additive = [dict(targets=['1'], update='additive')]
    with pytest.raises(ValueError, match='overrides: 1 have nothing but zeros .* name them in targets too'):
        adapt(zeros(), overrides=additive)
    assert names(adapt(zeros(), targets=['linear', '1'], overrides=additive)) == ['0', '1']


def test_an_override_of_a_layer_that_cannot_be_adapted_says_why():
    model = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match='1: .*remove that first'):
        adapt(model, overrides=[dict(targets=['1'], rank=1)])


class WithAdapter(nn.Linear):
    """A layer with a child of the name that we give to ours."""

    def __init__(self):
        super().__init__(2, 2)
        self.adapter = nn.Linear(2, 2)


def test_modules_that_are_called_adapter(perturb):
    """They are no adapters of ours, whatever their name."""
    base = nn.ModuleDict(dict(adapter=nn.Linear(2, 2), block=nn.ModuleDict(dict(adapter=nn.Linear(2, 2)))))
    model = adapt(copy.deepcopy(base), targets=['block.*'], rank=1)
    assert {name.rpartition('.')[0] for name in adapter_names(model)} == {'block.adapter.adapter'}
    assert set(fingerprint(model)) == {'adapter.weight', 'adapter.bias', 'block.adapter.weight', 'block.adapter.bias'}
    perturb(model)
    assert export(model).keys() == base.state_dict().keys()
    assert_refused(nn.Sequential(nn.Linear(2, 2), WithAdapter()), TypeError, '^1: .*adapter', targets=['1'])
    assert names(adapt(nn.Sequential(nn.Linear(2, 2), WithAdapter()))) == ['0', '1.adapter']


@pytest.mark.parametrize('name, value', [('method', 'bilinear'), ('update', 0), ('merged', False), ('merge', print)])
def test_attributes_of_names_that_ours_have(name, value):
    """They would be overwritten, or hide ours."""
    layer = nn.Linear(2, 2)
    setattr(layer, name, value)
    match = f'^1: it has an attribute called {name} already'
    assert_refused(nn.Sequential(nn.Linear(2, 2), layer), TypeError, match, targets=['1'])
    assert getattr(layer, name) == value


@pytest.mark.parametrize('method', ['atom', 'atom-pissa'])
def test_atoms_need_spatial_extent(net, method, caplog):
    """Layers without are refused if a target or an override names them, and left out with a line in the log otherwise."""
    match = '^stages.0.pointwise_conv1: it has no spatial extent'
    assert_refused(net, TypeError, match, method=method, targets=['stages.0.pointwise_conv1'])
    assert_refused(net, TypeError, match, method=method, targets=['conv', 'stages.*.pointwise_conv1'])
    assert_refused(net, TypeError, match, overrides=[dict(targets=['stages.0.*'], method=method)])
    assert_refused(net, TypeError, match, method=method, targets=['pointwise'])  # there is nothing else to adapt
    assert not caplog.messages
    assert names(adapt(copy.deepcopy(net), method=method, overrides=[dict(targets=['linear'], method='lora')])) == [
        name for name in names(adapt(copy.deepcopy(net))) if name not in POINTWISE]
    kinds = adapt(copy.deepcopy(net), overrides=[dict(targets=['conv', 'linear'], method=method)])
    assert [row.method for row in summary(kinds)] == [method, *['lora'] * 6]
    caplog.clear()
    net.head.weight.data.zero_()  # stays too: a layer that the method is not about does not train whole
    adapt(net, method=method)
    assert names(net) == [*CONV, *DEPTHWISE] and not trains(net)
    assert caplog.messages == [
        'LieRA  4 pointwise, 1 linear layers cannot be adapted and stay as they are: stages.0.pointwise_conv1 and what is '
        'like it, for it has no spatial extent, and atoms are filters in space']


def test_the_rank_of_kernels_is_recorded_where_it_is_used(net):
    """Files of other methods, which had no such setting before, have none."""
    assert 'kernel_rank' not in adapt(copy.deepcopy(net), kernel_rank=3).liera
    for settings in (dict(method='tucker'), dict(overrides=[dict(targets=['depthwise'], method='tucker')])):
        model = adapt(copy.deepcopy(net), rank=2, kernel_rank=1, **settings)
        assert model.liera['kernel_rank'] == 1
        assert summary(model)[1].rank == (2, 1, 1, 1) and ' 2 x 1 x 1 x 1 ' in str(summary(model))
    model = adapt(net, rank=2, method='tucker', overrides=[dict(targets=['depthwise'], kernel_rank=3)])
    assert model.liera['kernel_rank'] == 2
    assert [row.rank for row in summary(model)][:3] == [(2, 2, 2, 2), (2, 1, 3, 3), (2, 2, 1, 1)]


# What trains, and what stays


@pytest.mark.parametrize('train_bias', [False, True], ids=['', 'bias'])
@pytest.mark.parametrize('train_norm', [False, True], ids=['', 'norm'])
@pytest.mark.parametrize('targets', [KINDS, ['depthwise', 'pointwise']], ids=['all', 'some'])
@every_setting
def test_what_trains(net, method, update, targets, train_norm, train_bias):
    base = {name for name, _ in net.named_parameters()}
    adapt(net, rank=2, method=method, update=update, targets=targets, train_norm=train_norm, train_bias=train_bias)
    expected = {name for name, _ in net.named_parameters()} - base
    if train_norm:
        expected |= {'stem.1.weight', 'stem.1.bias'}
        for block in ('stages.0', 'stages.1'):
            expected |= {f'{block}.norm.weight', f'{block}.norm.bias', f'{block}.grn.gamma', f'{block}.grn.beta'}
    if train_bias:
        # pointwise_conv2 has none
        expected |= {f'{name}.bias' for name in [*DEPTHWISE, POINTWISE[0], POINTWISE[2]] if name in names(net)}
        if targets is KINDS:
            expected |= {f'{name}.bias' for name in [*CONV, *LINEAR] if name in names(net)}
    assert names(net) == [name for name in match_layers(dict(net.named_modules()), targets)
                          if not method.startswith('atom') or name in [*CONV, *DEPTHWISE]]
    assert {name for name, p in net.named_parameters() if p.requires_grad} == expected
    assert intended_parameters(net) == expected


@pytest.mark.parametrize('train_norm', [False, True], ids=['', 'norm'])
@pytest.mark.parametrize('targets', [[], ['linear']], ids=str)
def test_every_bias(net, targets, train_norm):
    """That of norms as well, and of layers that are not adapted."""
    biases = {name for name, _ in net.named_parameters() if name.endswith('bias')}
    adapt(net, rank=2, targets=targets, train_norm=train_norm, train_bias='all')
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained >= biases and 'stem.1.bias' in biases
    assert all('.adapter.' in name for name in trained - biases) or train_norm
    assert ('stem.1.weight' in trained) == train_norm
    assert len(summary(net)) == len(targets)


def test_norms_without_targets(net, image, perturb):
    """Nothing is adapted, and the rest goes on: what trains, saving, exporting."""
    keys = list(net.state_dict())
    adapt(net, targets=[], train_norm=True)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.rpartition('.')[0] for name in trained} == {'stem.1', *(
        f'stages.{i}.{norm}' for i in (0, 1) for norm in ('norm', 'grn'))}
    expected = perturb(net)(image)
    assert list(net.state_dict()) == list(export(net)) == keys
    torch.testing.assert_close(merge(net)(image), expected)
    assert str(summary(net)).startswith('layer')


def test_nothing_to_train(image):
    assert_refused(nn.Sequential(nn.Conv2d(3, 3, 1)), ValueError, 'nothing would train', targets=[], train_norm=True)


@every_setting
def test_keys_names_and_objects_stay(net, method, update):
    keys, modules = list(net.state_dict()), dict(net.named_modules())
    parameters = dict(net.named_parameters())
    assert adapt(net, rank=2, method=method, update=update) is net
    assert [key for key in net.state_dict() if '.adapter.' not in key] == keys
    for name in names(net):
        assert any(key.startswith(f'{name}.adapter.') for key in net.state_dict())
    now = dict(net.named_modules())
    assert [name for name in now if '.adapter' not in f'.{name}'] == list(modules)
    assert all(now[name] is module for name, module in modules.items())
    now = dict(net.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert {key.rpartition('.adapter.')[0] for key in net.state_dict() if '.adapter.' in key} == set(names(net))


@every_setting
def test_a_published_checkpoint_loads_without_mapping(net, image, method, update):
    published = copy.deepcopy(net.state_dict())
    adapt(net, rank=2, method=method, update=update)
    result = net.load_state_dict(published, strict=False)
    assert result.unexpected_keys == []
    assert all('.adapter.' in key for key in result.missing_keys)


@every_setting
def test_the_life_of_a_network(net, image, perturb, method, update):
    """Adapted, trained, merged, exported: the whole network gives the output that it should."""
    base = copy.deepcopy(net)
    adapt(net, rank=2, method=method, update=update, train_norm=True, train_bias=True)
    assert torch.equal(net(image), base(image))
    perturb(net)
    expected = net(image)
    assert not torch.equal(expected, base(image))
    state = copy.deepcopy(net.state_dict())

    assert merge(net) is net
    assert all(layer.merged for _, layer in adapted_layers(net))
    torch.testing.assert_close(net(image), expected, rtol=1e-6, atol=1e-6)
    merged_export = export(net)
    assert unmerge(net) is net
    assert torch.equal(net(image), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())

    plain = export(net)
    assert list(plain) == list(merged_export) == list(base.state_dict())
    assert all(torch.equal(plain[name], merged_export[name]) for name in plain)
    assert not any(tensor.requires_grad for tensor in plain.values())
    base.load_state_dict(plain, strict=True)
    assert not any(isinstance(module, AdaptedLayer) for module in base.modules())
    torch.testing.assert_close(base(image), expected, rtol=1e-6, atol=1e-6)


def test_a_training_step_moves_only_what_trains(net, image):
    adapt(net, rank=2, train_norm=True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=.1, weight_decay=.1)  # all of them, as MMEngine does
    for _ in range(2):  # in the first step, B is zero and A has no gradient
        optimizer.zero_grad()
        net(image).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == intended_parameters(net)


class Versioned(nn.Linear):
    """Reads old checkpoints, as layers of mmcv and mmdet do: those without a version have another layout."""
    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get('version') != 2:
            state_dict[f'{prefix}weight'] = state_dict[f'{prefix}weight'].flip(0)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_export_keeps_the_versions_of_modules():
    model = nn.Sequential(nn.Linear(4, 4), Versioned(4, 4))
    plain = copy.deepcopy(model)
    plain.load_state_dict(export(adapt(model)))
    assert torch.equal(plain[1].weight, model[1].weight)


class Twice(nn.Module):
    """One layer under two names, as the shared convolutions of RTMDet's heads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_a_layer_under_two_names(perturb):
    base, x = Twice(), torch.randn(3, 4)
    model = adapt(copy.deepcopy(base), rank=2, train_norm=True, train_bias=True)
    fresh = copy.deepcopy(model)
    perturb(model)
    assert len(summary(model)) == 1
    assert not any('weight' in name and 'norm' not in name for name in adapter_state_dict(model))
    assert set(fingerprint(model)) == {'first.weight', 'second.weight'}

    assert torch.equal(load_adapter(fresh, adapter_state_dict(model))(x), model(x))
    assert list(export(model)) == list(base.state_dict())
    base.load_state_dict(export(model), strict=True)
    torch.testing.assert_close(base(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', ['first', 'second'])
@pytest.mark.parametrize(('settings', 'adapted', 'in_place'), [
    (lambda name: dict(targets=[name]), {'first': 16}, set()),
    (lambda name: dict(overrides=[dict(targets=[name], rank=2)]), {'first': 2, 'third': 16}, set()),
    (lambda name: dict(exclude=[name]), {'third': 16}, set()),
    (lambda name: dict(train=[name]), {'third': 16}, {'first.weight', 'first.bias'}),
    (lambda name: dict(exclude=[f'{name}.bias'], train_bias=True), {'first': 16, 'third': 16}, set()),
    (lambda name: dict(targets=['third'], train_bias=True), {'third': 16}, {'first.bias'}),  # third's
    (lambda name: dict(targets=['third'], train=[f'{name}.bias']), {'third': 16}, {'first.bias'}),
    (lambda name: dict(targets=['third'], exclude=[f'{name}.bias'], train_bias=True), {'third': 16}, set()),
], ids=['targets', 'overrides', 'exclude', 'train', 'exclude bias', 'tied bias', 'train tied bias', 'exclude tied bias'])
def test_each_name_is_as_good_as_the_first(name, settings, adapted, in_place):
    """Of layers and of parameters that have two."""
    model = Twice()
    model.third = nn.Linear(4, 4)
    model.third.bias = model.first.bias
    adapt(model, **settings(name))
    assert {name: layer.adapter.rank for name, layer in adapted_layers(model)} == adapted
    assert trains(model) == in_place


# Reports


def test_summary(net):
    rows = summary(adapt(net, rank=2, alpha=4, overrides=[{'targets': ['depthwise'], 'method': 'dense'},
                                                          {'targets': ['head'], 'update': 'additive'}]))
    assert tuple(rows[0]) == ('stem.0', 'conv', (4, 3, 3, 3), 'lora', 'taylor', 'relative', 2, 6 * 9 + 12 * 6, 4 * 27 + 4)
    assert tuple(rows[1]) == ('stages.0.depthwise_conv', 'depthwise', (4, 1, 3, 3), 'dense', 'taylor', 'relative', None, 36,
                              36 + 4)
    assert tuple(rows[3]) == ('stages.0.pointwise_conv2', 'pointwise', (4, 8, 1, 1), 'lora', 'taylor', 'relative', 2, 24, 32)
    assert tuple(rows[-1]) == ('head', 'linear', (2, 4), 'lora', 'additive', '-', 2, 12, 8 + 2)
    assert [row.layer for row in rows] == names(net)
    assert rows.trainable == sum(row.trainable for row in rows) == 126 + 2 * (36 + 24 + 24) + 12
    assert rows.total == sum(p.numel() for p in net.parameters())


def test_summary_as_text(net):
    rows = summary(adapt(net, rank=2, train_norm=True, overrides=[{'targets': ['depthwise'], 'method': 'dense'}]))
    header, *body, total = str(rows).splitlines()
    assert header.split() == ['layer', 'kind', 'shape', 'method', 'update', 'scale', 'rank', 'trainable', 'frozen']
    assert len(body) == len(rows) == 8
    assert re.split(r'\s{2,}', body[0]) == ['stem.0', 'conv', '4 x 3 x 3 x 3', 'lora', 'taylor', 'relative', '2', '126',
                                            '112']
    assert re.split(r'\s{2,}', body[1])[3:7] == ['dense', 'taylor', 'relative', '-']
    assert total.startswith('8 adapted layers with 306 parameters')
    assert f'{rows.trainable:,} of {rows.total:,}' in total
    assert rows.trainable == 306 + 8 + 2 * (8 + 16)  # the batch norm, two norms, two GRN


def test_summary_counts_only_what_is_frozen(net):
    adapt(net, rank=2, train_bias=True)
    assert summary(net)[-1].frozen == 8
    assert summary(net)[-1].trainable == 12  # the adapter's


@every_setting
def test_without_adapters(net, image, perturb, method, update):
    base = copy.deepcopy(net)
    perturb(adapt(net, rank=2, method=method, update=update))
    keys, modules, expected = list(net.state_dict()), [n for n, _ in net.named_modules()], net(image)
    with without_adapters(net) as inside:
        assert inside is net
        assert list(net.state_dict()) == list(base.state_dict())
        assert [name for name, _ in net.named_parameters()] == [name for name, _ in base.named_parameters()]
        net.load_state_dict(base.state_dict(), strict=True)
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_modules()] == modules
    assert torch.equal(net(image), expected)


def test_without_adapters_restores_after_an_exception(net, image):
    expected, keys = adapt(net)(image), list(net.state_dict())
    with pytest.raises(RuntimeError, match='from inside'), without_adapters(net):
        raise RuntimeError('from inside')
    assert list(net.state_dict()) == keys
    assert torch.equal(net(image), expected)


def test_loading_other_base_weights_inside_without_adapters(net, image, perturb):
    base = copy.deepcopy(net)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    perturb(adapt(net, rank=2))
    factors = copy.deepcopy(adapter_state_dict(net))
    merge(net)
    with without_adapters(net):
        net.load_state_dict(base.state_dict(), strict=True)
    assert not any(layer.merged for _, layer in adapted_layers(net))
    reference = load_adapter(adapt(base, rank=2), factors)
    assert torch.equal(net(image), reference(image))


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('method', METHODS)
def test_a_perturbation_starts_from_the_weights_that_arrive_after_it(net, image, method, update, perturb):
    pretrained = copy.deepcopy(net.state_dict())
    expected = net(image)
    for tensor in net.parameters():
        tensor.data.normal_()
    resumed = adapt(copy.deepcopy(net), rank=2, method=method, update=update)
    adapt(net, rank=2, method=method, update=update)
    net.load_state_dict(pretrained, strict=False)
    assert torch.equal(net(image), expected)

    perturb(net)
    resumed.load_state_dict(pretrained, strict=False)
    resumed.load_state_dict(net.state_dict())
    assert torch.equal(resumed(image), net(image))
    # Trained perturbations are never started anew
    net.load_state_dict(pretrained, strict=False)
    assert torch.equal(resumed(image), net(image))


@pytest.mark.parametrize('method', METHODS)
def test_weights_that_take_the_place_of_others(net, image, perturb, method):
    """load_state_dict(assign=True), into a model without values too."""
    state = perturb(adapt(copy.deepcopy(net), rank=2, method=method)).state_dict()
    whole = adapt(copy.deepcopy(net), rank=2, method=method)
    for tensor in net.parameters():
        tensor.data.normal_()
    empty = adapt(copy.deepcopy(net).to('meta'), rank=2, method=method)
    adapt(net, rank=2, method=method)
    whole.load_state_dict(state)
    for model in (net, empty):
        base = {name: tensor for name, tensor in state.items() if '.adapter.' not in name}
        model.load_state_dict(base, strict=False, assign=True)
        model.load_state_dict(state, assign=True)
        assert torch.equal(model(image), whole(image))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == intended_parameters(model)


@pytest.mark.parametrize('assign', [True, False])
@pytest.mark.parametrize('method', METHODS)
def test_a_model_without_values_gets_pretrained_weights(net, image, method, assign):
    empty = adapt(copy.deepcopy(net).to('meta'), rank=2, method=method, kernel_rank=3)
    assert empty(image.to('meta')).shape == net(image).shape
    if not assign:
        torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory with NaN
        try:
            empty.to_empty(device='cpu')
        finally:
            torch.use_deterministic_algorithms(False)
    empty.load_state_dict(net.state_dict(), strict=False, assign=assign)
    assert torch.equal(empty.eval()(image), net.eval()(image))
    whole = adapt(net, rank=2, method=method, kernel_rank=3)
    assert {name: (p.shape, p.requires_grad) for name, p in whole.named_parameters()} == {
        name: (p.shape, p.requires_grad) for name, p in empty.named_parameters()}
    for name, layer in adapted_layers(whole):
        assert torch.equal(layer.adapter.rms, empty.get_submodule(name).adapter.rms)
    empty(image).sum().backward()


def test_a_weight_of_lower_rank_that_arrives_later():
    """Of the triplets that the weight before it had, none is left."""
    layer = nn.Linear(6, 5)
    adapt(layer, rank=4, method='pissa', update='additive')
    layer.load_state_dict({'weight': torch.randn(5, 1) @ torch.randn(1, 6)}, strict=False)
    torch.testing.assert_close(layer.adapter.B @ layer.adapter.A, layer.frozen_weight)


# Units of Δ


LAYERS = {
    'linear': lambda: nn.Linear(64, 64),
    'conv': lambda: nn.Conv2d(64, 64, 3),
    'depthwise': lambda: nn.Conv2d(256, 256, 7, groups=256),
    'transposed': lambda: nn.ConvTranspose2d(64, 32, 2),
}


@pytest.mark.parametrize(('layer', 'method', 'rank', 'rms'), [
    *(('linear', 'lora', 8, rms) for rms in (.03, .1, .3)), *((layer, 'lora', 2, .1) for layer in LAYERS),
    *((layer, 'dense', 2, .1) for layer in LAYERS), ('linear', 'dora', 2, .1), ('conv', 'dora', 2, .1),
    ('linear', 'milora', 2, .1), ('conv', 'pissa', 2, .1), ('depthwise', 'atom', 8, .1)])
@pytest.mark.parametrize('update', MULTIPLICATIVE)
def test_relative_steps_move_a_weight_as_far_as_additive_ones(update, layer, method, rank, rms):
    """After 20 steps of AdamW on one objective, at one alpha and learning rate."""

    def moved(update, scale):
        torch.manual_seed(0)
        net = nn.Sequential(LAYERS[layer]())
        nn.init.normal_(net[0].weight, std=rms)
        goal = net[0].weight + torch.randn_like(net[0].weight)
        adapt(net, rank=rank, alpha=4 * rank, method=method, update=update, scale=scale)
        optimizer = torch.optim.AdamW(net[0].adapter.parameters(), lr=1e-4)
        for _ in range(20):
            optimizer.zero_grad()
            (net[0].effective_weight() - goal).square().sum().backward()
            optimizer.step()
        return (net[0].effective_weight() - net[0].frozen_weight).norm().item()

    assert moved(update, 'relative') == pytest.approx(moved('additive', 'plain'), rel=.1)
    if method != 'dora':  # whose magnitude moves by itself
        assert moved(update, 'plain') < .5 * moved(update, 'relative')


def test_scales_are_the_same_under_additive(net):
    twin = adapt(copy.deepcopy(net), update='additive', scale='plain')
    adapt(net, update='additive', scale='relative')
    assert list(net.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize('method', METHODS)
def test_the_unit_is_that_of_the_weight_that_was_frozen_and_is_never_computed_again(net, perturb, method):
    adapt(net, rank=2, method=method)
    layer = net.stem[0]
    base = {name: 3 * tensor for name, tensor in net.state_dict().items() if '.adapter.' not in name}
    net.load_state_dict(base, strict=False)
    unit = layer.weight.square().mean().sqrt()
    assert torch.allclose(layer.adapter.rms, unit)
    perturb(net)
    net.load_state_dict({name: 2 * tensor for name, tensor in base.items()}, strict=False)
    assert torch.allclose(layer.adapter.rms, unit)
    assert torch.equal(adapter_state_dict(net)['stem.0.adapter.rms'], layer.adapter.rms)


@pytest.mark.parametrize('value', [0., 1e-30])
@pytest.mark.parametrize('method', METHODS)
def test_a_weight_without_a_unit(method, value):
    layer = nn.Sequential(nn.Conv2d(4, 4, 3))
    nn.init.constant_(layer[0].weight, value)
    adapt(layer, rank=2, method=method, targets=['0'])
    assert torch.equal(layer[0].effective_weight(), layer[0].frozen_weight)
    layer[0].effective_weight().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer[0].adapter.parameters())


@pytest.mark.parametrize('target', ['linear', 'pointwise', 'norm', 'stem'])
def test_nearest_target_is_one_that_matches(target):
    model = nn.ModuleDict({'stem': nn.Sequential(nn.Conv2d(3, 4, 3)), 'norm': nn.BatchNorm2d(4)})
    with pytest.raises(ValueError, match='matches no layer') as error:
        adapt(model, targets=[target])
    for suggested in re.findall("did you mean '(.*)'", str(error.value)):
        assert suggested != target
        adapt(copy.deepcopy(model), targets=[suggested])
