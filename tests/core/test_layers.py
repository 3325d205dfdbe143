"""One matrix of promises: every kind of layer x every method x every update x every scale keeps each of them.

A new kind of layer is a line in ``KINDS``. A new method or update joins by itself; the formula that it has to match
goes into ``DELTAS`` or ``MOVES``. What Δ is depends on the form of the weight alone: one kind of layer of each form meets
every setting, the others meet every update, and every pair of method and update between them.
"""
import copy
import io
import itertools
import pickle
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from mmcv.ops import DeformConv2d, ModulatedDeformConv2dPack
from mmcv.ops.saconv import SAConv2d
from mmengine.utils import digit_version
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from liera_mm import adapt, adapter_state_dict, export, load_adapter, merge, merge_and_unload, save_adapter, unmerge
from liera_mm.core.adapt import SCALES
from liera_mm.core.algebra import METHODS
from liera_mm.core.errors import SetupError
from liera_mm.core.group import UPDATES
from liera_mm.core.layers import adapt_layer, adapted_class

RANK, ALPHA = 2, 3
pytestmark = pytest.mark.usefixtures('one_thread')


class PaddedConv2d(nn.Conv2d):
    """A subclass that prepares its input and leaves the rest to torch."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 2, 0, 1)))


def pad(mode):
    return lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 2, 2), mode), w, b)


# id: how to make the layer, the shape of its input, and what it computes from input, weight and bias
KINDS = {
    'linear': (lambda: nn.Linear(6, 5), (2, 3, 6), F.linear),
    'linear_no_bias': (lambda: nn.Linear(6, 5, bias=False), (4, 6), F.linear),
    'conv1d': (lambda: nn.Conv1d(4, 6, 3), (2, 4, 7), F.conv1d),
    'conv2d': (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 6), F.conv2d),
    'conv2d_no_bias': (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 5, 6), F.conv2d),
    'conv3d': (lambda: nn.Conv3d(2, 3, 3), (1, 2, 4, 5, 4), F.conv3d),
    'strided_padded_dilated': (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 7, 8),
                               partial(F.conv2d, stride=2, padding=1, dilation=2)),
    'same_padding': (lambda: nn.Conv2d(4, 6, 3, padding='same'), (2, 4, 5, 5), partial(F.conv2d, padding=1)),
    'grouped': (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), partial(F.conv2d, groups=2)),
    'depthwise7x7': (lambda: nn.Conv2d(4, 4, 7, padding=3, groups=4), (2, 4, 8, 8), partial(F.conv2d, padding=3, groups=4)),
    'depthwise_multiplier': (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 5), partial(F.conv2d, groups=3)),
    'pointwise': (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3), F.conv2d),
    'reflect': (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode='reflect'), (2, 4, 5, 6), pad('reflect')),
    'circular': (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode='circular'), (2, 4, 5, 6), pad('circular')),
    'kernel3x5': (lambda: nn.Conv2d(4, 6, (3, 5)), (2, 4, 5, 7), F.conv2d),
    'transpose1d': (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), partial(F.conv_transpose1d, stride=2)),
    'transpose2d': (lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=3, padding=1, output_padding=(0, 1), groups=2, dilation=2), (2, 4, 3, 4),
                    partial(F.conv_transpose2d, stride=3, padding=1, output_padding=(0, 1), groups=2, dilation=2)),
    'transpose3d': (lambda: nn.ConvTranspose3d(2, 3, 3, bias=False), (1, 2, 3, 3, 2), F.conv_transpose3d),
    'mmcv_conv2d': (lambda: wrappers.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), partial(F.conv2d, padding=1)),
    'mmcv_linear': (lambda: wrappers.Linear(6, 5), (4, 6), F.linear),
    'mmcv_transpose2d': (lambda: wrappers.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 4),
                         partial(F.conv_transpose2d, stride=2)),
    'padded_subclass': (lambda: PaddedConv2d(4, 6, 3), (2, 4, 5, 5),
                        lambda x, w, b: F.conv2d(F.pad(x, (1, 2, 0, 1)), w, b)),
}



def standardised(x, w, b):
    """As ConvWS2d: every output channel of the weight with mean 0 and standard deviation 1."""
    rows = w.flatten(1) - w.flatten(1).mean(1, keepdim=True)
    std = (rows.square().sum(1, keepdim=True) / (rows.shape[1] - 1)).sqrt()
    return F.conv2d(x, (rows / (std + 1e-5)).view_as(w), b)


def switched(x, w, b):
    """As SAConv2d at its start, where its switch is closed and its contexts are zero."""
    mean, variance = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True)
    return F.conv2d(x, (w - mean) / (variance + 1e-5).sqrt(), padding=1)


class Gpt2Conv1D(Conv1D):
    """Of weights as large as those of the other layers; transformers begins with small ones."""

    def __init__(self):
        super().__init__(5, 6)
        nn.init.normal_(self.weight, std=.5)


class Unshifted(DeformConv2d):
    """A deformable convolution by no offset is a convolution."""

    def forward(self, x):
        return super().forward(x, x.new_zeros(len(x), 18, x.shape[2] - 2, x.shape[3] - 2))


# Layers that compute with their weight in a forward pass of their own
OWN_FORWARD = {
    'conv_ws': (lambda: ConvWS2d(4, 6, 3), (2, 4, 5, 6), standardised),
    'adaptive_padding': (lambda: Conv2dAdaptivePadding(4, 6, 3, stride=2), (2, 4, 6, 5),
                         lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 0, 1)), w, b, stride=2)),
    'switchable': (lambda: SAConv2d(4, 6, 3, padding=1), (2, 4, 5, 6), switched),
    'gpt2_conv1d': (Gpt2Conv1D, (2, 3, 6), lambda x, w, b: F.linear(x, w.T, b)),
    'deformable': (lambda: Unshifted(4, 6, 3, groups=2), (2, 4, 5, 6), lambda x, w, b: F.conv2d(x, w, groups=2)),
    'modulated_deformable': (lambda: ModulatedDeformConv2dPack(4, 6, 3), (2, 4, 5, 6),
                             lambda x, w, b: F.conv2d(x, w / 2, b)),
}
KINDS.update(OWN_FORWARD)

# The definitions of Δ, where `old` holds the adapter's tensors at start and `new` the values that its parameters have now
def low_rank(old, new):
    return ALPHA / RANK * (new['B'] @ new['A'] - old['B'] @ old['A'])


def tucker(old, new):
    modes = 'abcde'[:new['G'].dim()]
    pairs = ','.join(f'{mode.upper()}{mode}' for mode in modes)
    factors = [new[f'A{mode}'] for mode in range(1, len(modes) + 1)]
    return ALPHA / RANK * torch.einsum(f'{modes},{pairs}->{modes.upper()}', new['G'], *factors)


DELTAS = {
    'lora': low_rank,
    'pissa': low_rank,
    'milora': low_rank,
    'dora': low_rank,
    'tucker': tucker,
    'atom': lambda old, new: ALPHA / RANK * old['B'] @ new['A'],
    'atom-pissa': low_rank,
    'dense': lambda old, new: new['delta'],
}
# Under additive both scales are the same: test_adapt.py
SETTINGS = [(m, u, s) for m in METHODS for u in UPDATES for s in SCALES if (u, s) != ('additive', 'relative')]
# Each method and each update
FEW_SETTINGS = [(m, u, SCALES[u == 'additive']) for m, u in itertools.zip_longest(METHODS, UPDATES, fillvalue='taylor')]
FORMS = ['linear', 'conv2d', 'conv3d', 'depthwise7x7', 'transpose2d']
NOT_SPATIAL = ['linear', 'linear_no_bias', 'pointwise', 'mmcv_linear', 'gpt2_conv1d']
MOVES = {
    'additive': lambda w, d: w + d,
    'taylor': lambda w, d: w * (1 + d),
    'exp': lambda w, d: w * d.exp(),
}


class Case:
    """One cell of the matrix: a layer, its adapted copy with trained factors, and an input."""

    def __init__(self, kind, method, update, scale='plain', dtype=torch.float32):
        make, shape, self.function = KINDS[kind]
        self.settings = {'rank': RANK, 'alpha': ALPHA, 'method': method, 'update': update, 'scale': scale}
        self.base = make().to(dtype)
        if list(self.base.children()):
            self.settings['targets'] = ['']  # the layer alone
        self.rms = self.base.weight.detach().pow(2).mean().sqrt() if scale == 'relative' else torch.ones(())
        self.x = torch.randn(shape, dtype=dtype)
        self.layer = self.fresh()
        self.old = {name: p.detach().clone() for name, p in self.layer.adapter.state_dict().items()}
        self.layer = train(self.layer)

    @property
    def bias(self):
        return getattr(self.base, 'bias', None)

    def fresh(self):
        """The layer just after adapt()."""
        return adapt(copy.deepcopy(self.base), **self.settings)

    def parameters(self):
        """A leaf copy of every trained tensor, to differentiate the reference by."""
        return {name: p.detach().clone().requires_grad_() for name, p in self.layer.adapter.named_parameters()}

    def reference_weight(self, new):
        """The effective weight by its definition."""
        weight = self.base.weight.detach()
        delta = DELTAS[self.settings['method']](self.old, new).reshape(weight.shape) / self.rms
        moved = MOVES[self.settings['update']](weight, delta)
        if self.settings['method'] != 'dora':
            return moved
        # The output channels of a transposed convolution are in the second dimension, those of a group together
        name = type(self.base).__name__
        groups = self.base.groups if 'Transpose' in name else int(name == 'Gpt2Conv1D')
        moved = moved.unflatten(0, (groups, -1)).unsqueeze(-1).flatten(3) if groups else moved.flatten(1)
        magnitude, = (p for name, p in new.items() if name not in 'AB')
        norm = moved.pow(2).sum((1, 3) if groups else 1, keepdim=True).sqrt()
        magnitude = magnitude * self.old.get('norms', torch.ones(()))
        return (magnitude.reshape(norm.shape) * moved / norm).reshape(weight.shape)

    def reference(self, x, new):
        return self.function(x, self.reference_weight(new), self.bias)


@torch.no_grad()
def train(layer):
    unit = 1 if layer.adapter.rms is None else layer.adapter.rms  # moves as far as in the plain scale
    for parameter in layer.adapter.parameters():
        parameter.add_(.2 * unit * torch.randn_like(parameter))
    return layer


def applies(kind, method):
    return not method.startswith('atom') or kind not in NOT_SPATIAL


def settings_of(kind):
    if kind in FORMS:
        return [setting for setting in SETTINGS if applies(kind, setting[0])]
    methods, number = [method for method in METHODS if applies(kind, method)], list(KINDS).index(kind)
    return [(methods[(3 * number + i) % len(methods)], update, SCALES[update == 'additive' or number // len(METHODS) % 2])
            for i, update in enumerate(UPDATES)]


def parametrize(cases):
    return pytest.mark.parametrize(('kind', 'method', 'update', 'scale'),
                                   [pytest.param(*case, id='-'.join(case)) for case in cases])


all_cases = parametrize([(kind, *setting) for kind in KINDS for setting in settings_of(kind)])


def few_cases(*kinds):
    return parametrize([(kind, *setting) for kind in kinds for setting in FEW_SETTINGS if applies(kind, setting[0])])


def test_the_matrix_leaves_out_none():
    assert {setting for kind in FORMS for setting in settings_of(kind)} == set(SETTINGS)
    others = {setting for kind in KINDS if kind not in FORMS for setting in settings_of(kind)}
    for pair in [lambda method, update, scale: (method, update), lambda method, update, scale: (update, scale)]:
        assert {pair(*setting) for setting in others} == {pair(*setting) for setting in SETTINGS}


@pytest.fixture
def case(seed, kind, method, update, scale):
    return Case(kind, method, update, scale)


@pytest.fixture
def double(seed, kind, method, update, scale):
    return Case(kind, method, update, scale, torch.float64)


def assert_close(actual, expected, relative=1e-6):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def assert_same(state, other):
    """Two state dicts are equal, in their order too."""
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)


def trained(layer):
    return list(layer.adapter.parameters())


# Identity at start


@all_cases
def test_start_changes_nothing(case):
    layer = case.fresh()
    for mode in (True, False):
        case.base.train(mode)
        layer.train(mode)
        assert torch.equal(layer(case.x), case.base(case.x))
    assert torch.equal(layer.effective_weight(), case.base.weight)
    assert torch.equal(copy.deepcopy(layer)(case.x), case.base(case.x))


@all_cases
def test_trained_factors_change_the_output(case):
    """Keeps the tests below honest: without this, a layer that ignores its adapter would pass many of them."""
    assert (case.layer(case.x) - case.base(case.x)).abs().max() > 1e-2


# Values and gradients


@all_cases
def test_output_and_gradients_are_those_of_the_formula(double):
    double.x.requires_grad_()
    output = double.layer(double.x)
    new = double.parameters()
    expected = double.reference(double.x, new)
    assert_close(output, expected, 1e-12)

    direction = torch.randn_like(output)
    gradients = torch.autograd.grad(output, [double.x, *trained(double.layer)], direction)
    expected = torch.autograd.grad(expected, [double.x, *new.values()], direction)
    for gradient, reference in zip(gradients, expected):
        assert_close(gradient, reference, 1e-10)


@all_cases
def test_gradcheck(double):
    names = [f'adapter.{name}' for name, _ in double.layer.adapter.named_parameters()]

    def forward(x, *values):
        return torch.func.functional_call(double.layer, dict(zip(names, values)), (x, ))

    inputs = [t.detach().clone().requires_grad_() for t in (double.x, *trained(double.layer))]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@all_cases
def test_only_the_factors_get_gradients(case):
    case.layer(case.x).square().sum().backward()
    with_gradient = {name for name, p in case.layer.named_parameters() if p.grad is not None}
    assert with_gradient == {f'adapter.{name}' for name in case.parameters()}
    assert all(p.grad.count_nonzero() for p in trained(case.layer))


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('kind', KINDS)
def test_dora_of_any_finite_weight(seed, kind, update):
    """Filters that are dead, whose squares under- or overflow, or whose norm overflows, beside ordinary ones."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        huge = torch.finfo(dtype).max ** .75  # at the maximum itself, the gradients of a multiplicative update overflow
        tiny = torch.finfo(dtype).smallest_normal
        for size in (0., tiny / 64, tiny, tiny ** .8, tiny ** .6, huge ** .8, huge, torch.finfo(dtype).max):
            layer = KINDS[kind][0]().to(dtype)
            outputs = layer.weight.transpose(0, 1) if 'transpose' in kind or kind == 'gpt2_conv1d' else layer.weight
            with torch.no_grad():
                outputs[1:3] = size * torch.randn_like(outputs[1:3]).sign()
            base = layer.weight.detach().clone()
            adapt_layer(layer, 'dora', update, 'plain', RANK, ALPHA)
            effective = layer.effective_weight()
            assert torch.equal(effective, base)
            if size <= huge:
                gradients = torch.autograd.grad(effective, trained(layer), torch.randn_like(effective))
                assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize('size', [1e-30, 1e30])
@pytest.mark.parametrize('update', ['additive', 'taylor'])
@pytest.mark.parametrize('kind', ['linear', 'grouped', 'transpose2d'])
def test_dora_where_squares_leave_single_precision(seed, kind, update, size):
    single = Case(kind, 'dora', update)
    with torch.no_grad():
        for tensor in (single.base.weight, single.old['magnitude'], single.layer.adapter.magnitude,
                       *([single.old['B'], single.layer.adapter.B] if update == 'additive' else [])):
            tensor *= size
    double = copy.deepcopy(single)
    double.base, double.old = double.base.double(), {name: p.double() for name, p in double.old.items()}
    new = {name: p.double().detach().requires_grad_() for name, p in single.parameters().items()}
    single.layer.load_state_dict(single.base.state_dict(), strict=False)
    effective, expected = single.layer.effective_weight(), double.reference_weight(new)
    assert_close(effective, expected, 1e-5)
    direction = torch.randn_like(effective)
    gradients = torch.autograd.grad(effective, trained(single.layer), direction)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, list(new.values()), direction.double())):
        assert_close(gradient, reference, 1e-4)


def test_linear_taylor_formula():
    layer = adapt(nn.Linear(6, 4), rank=2, alpha=5, update='taylor', scale='plain')
    train(layer)
    x, w, a, b = torch.randn(3, 6), layer.frozen_weight, layer.adapter.A, layer.adapter.B
    assert_close(layer(x), x @ w.T + 5 / 2 * x @ (w * (b @ a)).T + layer.bias)


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_additive_convolution_is_that_of_loralib(groups):
    layer = adapt(nn.Conv2d(4, 8, 3, padding=1, groups=groups), rank=2, alpha=5, update='additive')
    train(layer)
    x, w, a, b = torch.randn(2, 4, 5, 5), layer.frozen_weight, layer.adapter.A, layer.adapter.B
    assert a.shape == (2 * 3, 4 * 3)
    assert b.shape == (8 // groups * 3, 2 * 3)
    expected = F.conv2d(x, w + (b @ a).view(w.shape) * 5 / 2, layer.bias, padding=1, groups=groups)
    assert_close(layer(x), expected)


@pytest.mark.parametrize('method', ['lora', 'dense'])
@pytest.mark.parametrize('kind', ['linear', 'conv2d', 'transpose2d'])
def test_exp_formula(kind, method):
    layer = Case(kind, method, 'exp').layer
    assert_close(layer.effective_weight(), layer.frozen_weight * layer.adapter().exp())


@pytest.mark.parametrize('output_size', [(7, 7), (8, 7)])
def test_transposed_convolution_takes_an_output_size(output_size):
    base = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 4, 4)
    output = adapt(copy.deepcopy(base))(x, output_size=output_size)
    assert output.shape[2:] == output_size
    assert torch.equal(output, base(x, output_size=output_size))


# Merging


@all_cases
def test_merged_equals_unmerged(case):
    expected, effective = case.layer(case.x), case.layer.effective_weight()
    weight = case.layer.frozen_weight
    assert merge(case.layer) is case.layer
    assert case.layer.merged
    assert case.layer._parameters['weight'] is weight
    assert torch.equal(weight, effective)
    assert torch.equal(case.layer.effective_weight(), effective)
    assert_close(case.layer(case.x), expected)


@all_cases
def test_unmerge_restores_the_weight_bit_for_bit(case):
    weight = case.layer.frozen_weight
    expected = case.layer(case.x)
    for _ in range(10):
        merge(merge(case.layer))  # merging twice folds in once
        merged = weight.clone()
        assert unmerge(unmerge(case.layer)) is case.layer
        assert not case.layer.merged
        assert case.layer.frozen_weight is weight
        assert torch.equal(weight, case.base.weight)
    merge(case.layer)
    assert torch.equal(weight, merged)
    unmerge(case.layer)
    assert torch.equal(case.layer(case.x), expected)


@all_cases
def test_memory_format_is_kept(case):
    formats = {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}
    if isinstance(case.base, (ConvWS2d, ConvAWS2d)):  # which take no other format, adapted or not
        formats = {}
    for memory_format in formats.get(case.base.weight.dim(), [torch.contiguous_format]):
        layer = copy.deepcopy(case.layer).to(memory_format=memory_format)
        strides = layer.frozen_weight.stride()
        assert layer.effective_weight().stride() == strides
        gradients = torch.autograd.grad(layer(case.x).square().sum(), trained(layer))
        expected = torch.autograd.grad(case.layer(case.x).square().sum(), trained(case.layer))
        for gradient, reference in zip(gradients, expected):
            assert_close(gradient, reference, 1e-5)
        assert merge(layer).weight.stride() == strides
        assert unmerge(layer).frozen_weight.stride() == strides


@all_cases
def test_state_dict_does_not_depend_on_merging(case):
    state = {name: tensor.clone() for name, tensor in case.layer.state_dict().items()}
    assert_same(merge(case.layer).state_dict(), state)
    assert torch.equal(state['weight'], case.base.weight)


@all_cases
def test_loading_into_a_merged_layer_unmerges_it(case):
    state = copy.deepcopy(case.layer.state_dict())
    expected = case.layer(case.x)
    other = merge(train(case.fresh()))
    other.load_state_dict(state)
    assert not other.merged
    assert_same(other.state_dict(), state)
    assert torch.equal(other(case.x), expected)
    assert torch.equal(merge(other)(case.x), merge(case.layer)(case.x))


@all_cases
def test_export_fits_the_original_layer(case):
    expected = case.layer(case.x)
    for layer in (case.layer, merge(copy.deepcopy(case.layer))):
        plain = copy.deepcopy(case.base)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)  # everything has to come from the export
        plain.load_state_dict(export(layer), strict=True)
        assert_close(plain(case.x), expected)


# Saving, copying


@all_cases
def test_round_trips(case, tmp_path):
    expected = case.layer(case.x)

    by_state = train(case.fresh())
    by_state.load_state_dict(case.layer.state_dict())
    assert torch.equal(by_state(case.x), expected)

    by_mapping = load_adapter(train(case.fresh()), adapter_state_dict(case.layer))
    assert torch.equal(by_mapping(case.x), expected)

    save_adapter(case.layer, tmp_path / 'adapter.safetensors')
    by_file = load_adapter(merge(train(case.fresh())), tmp_path / 'adapter.safetensors')
    assert torch.equal(by_file(case.x), expected)
    assert_same(by_file.state_dict(), case.layer.state_dict())


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CLONES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda layer: pickle.loads(pickle.dumps(layer)),
    'torch.save': saved_and_loaded,
}


@all_cases
def test_copies(case):
    for clone, merged in itertools.product(CLONES.values(), (False, True)):
        if merged:
            merge(case.layer)
        expected = case.layer(case.x)
        twin = clone(case.layer)
        assert type(twin) is type(case.layer)
        assert isinstance(twin, type(case.base))
        assert twin.extra_repr() == case.base.extra_repr()
        assert twin.merged == merged
        assert_same(twin.state_dict(), case.layer.state_dict())
        assert torch.equal(twin(case.x), expected)
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in case.layer.parameters()]

        # Nothing is shared: training the copy leaves the layer alone
        train(unmerge(twin))
        nn.init.normal_(twin.frozen_weight)
        assert not torch.equal(twin(case.x), expected)
        assert torch.equal(case.layer(case.x), expected)
        assert torch.equal(unmerge(case.layer).frozen_weight, case.base.weight)


# Precision and devices


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64], ids=str)
@all_cases
def test_other_precisions(case, kind, dtype):
    reflects = kind in ('reflect', 'switchable')
    if reflects and dtype == torch.float16 and digit_version(torch.__version__) < digit_version('2.6'):
        pytest.skip('before torch 2.6, reflection_pad2d knows no half precision on the CPU')
    layer, x = case.layer.to(dtype), case.x.to(dtype)
    case.base.to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    with torch.no_grad():
        plain = copy.deepcopy(case.base)
        plain.weight.copy_(layer.effective_weight())
    assert torch.equal(output, plain(x))

    # The arithmetic is in float32 at least, so that the result is that of the formula up to one rounding
    wide = torch.promote_types(dtype, torch.float32)
    case.base.to(wide)
    case.old = {name: p.to(dtype).to(wide) for name, p in case.old.items()}
    case.rms = case.rms.to(wide)
    exact = case.reference_weight({name: p.to(wide) for name, p in case.parameters().items()})
    effective = layer.effective_weight()
    assert effective.dtype == dtype
    assert ((effective.to(wide) - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()

    output.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in trained(layer))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('method', METHODS)
def test_starts_as_it_was_in_half_precision(method, update, dtype):
    layer = nn.Conv2d(64, 64, 3, dtype=dtype)
    adapt_layer(layer, method, update, 'relative', rank=4, alpha=8)
    assert torch.equal(layer.effective_weight(), layer.frozen_weight)


@pytest.mark.parametrize('dtypes', [(torch.float16, ), (torch.bfloat16, torch.float32), (torch.float64, )], ids=str)
@pytest.mark.parametrize('size', [1, 1e-6, 1e-9])  # which half precision has few digits of, and takes for zero
@few_cases(*FORMS)
def test_starts_as_it_was_after_a_conversion(case, dtypes, size):
    case.base.weight.data *= size
    layer = case.fresh()
    for dtype in dtypes:
        layer.to(dtype)
        case.base.to(dtype)
    assert torch.equal(layer.effective_weight(), case.base.weight)
    nn.init.normal_(case.base.weight)
    layer.load_state_dict(case.base.state_dict(), strict=False)
    assert torch.equal(layer.effective_weight(), case.base.weight)


@pytest.mark.parametrize('update', UPDATES)
def test_dora_starts_anew_where_norms_are_summed_in_another_order(update):
    """As on a GPU: a magnitude that is off by its last digit is no trained one."""
    layer, other = nn.Linear(6, 5), nn.Linear(6, 5)
    adapt_layer(layer, 'dora', update, 'relative', RANK, ALPHA)
    with torch.no_grad():
        layer.adapter.magnitude.mul_(1 + torch.finfo(torch.float32).eps)
    layer.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(layer.effective_weight(), other.weight)


@pytest.mark.parametrize('value', [0., torch.nan, torch.inf])
@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('method', METHODS)
def test_starts_from_the_last_of_the_weights_that_arrive(seed, method, update, value):
    expected = nn.Conv2d(4, 6, 3)
    layer = nn.Conv2d(4, 6, 3)
    fresh = copy.deepcopy(expected)
    adapt_layer(fresh, method, update, 'relative', RANK, ALPHA)
    adapt_layer(layer, method, update, 'relative', RANK, ALPHA)
    state = expected.state_dict()
    layer.load_state_dict({**state, 'weight': torch.full_like(expected.weight, value)}, strict=False)
    layer.load_state_dict(state, strict=False)
    assert torch.equal(layer.effective_weight(), expected.weight)
    computed = {**dict(fresh.adapter.named_buffers()), 'magnitude': getattr(fresh.adapter, 'magnitude', None)}
    for name, tensor in computed.items():
        assert tensor is None or torch.equal(getattr(layer.adapter, name), tensor)


@all_cases
def test_autocast_leaves_the_effective_weight_in_float32(case):
    expected = case.layer.effective_weight()
    with torch.autocast('cpu', torch.bfloat16):
        effective = case.layer.effective_weight()
        output = case.layer(case.x)
    assert effective.dtype == torch.float32
    assert torch.equal(effective, expected)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        case.base.weight.copy_(expected)
        assert torch.equal(output, case.base(case.x))
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained(case.layer))


@all_cases
def test_double_and_back_keeps_the_layer(case):
    expected = case.layer(case.x)
    parameters = list(map(id, case.layer.parameters()))
    layer = case.layer.to(torch.float64)
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert_close(layer(case.x.double()), expected.double(), 1e-5)
    layer.to(torch.float32)
    assert torch.equal(layer(case.x), expected)
    assert list(map(id, layer.parameters())) == parameters


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
@pytest.mark.parametrize('kind', KINDS)
def test_cuda(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    for method, update, prepare in itertools.product(METHODS, UPDATES, (merge, unmerge)):
        if not applies(kind, method):
            continue
        case = Case(kind, method, update)
        expected = case.layer(case.x)
        layer = prepare(case.layer).cuda()
        assert {p.device.type for p in layer.parameters()} == {'cuda'}
        assert_close(layer(case.x.cuda()).cpu(), expected, 1e-5)
        assert_close(unmerge(layer)(case.x.cuda()).cpu(), expected, 1e-5)
        assert torch.equal(layer.frozen_weight.cpu(), case.base.weight)
        assert torch.equal(layer.cpu()(case.x), expected)


# With the rest of torch


@all_cases
@pytest.mark.parametrize('use_reentrant', [True, False], ids=['reentrant', 'not_reentrant'])
def test_checkpointing(case, use_reentrant):
    x = case.x.requires_grad_()
    expected = torch.autograd.grad(case.layer(x).square().sum(), [x, *trained(case.layer)])
    checkpoint(case.layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip([x, *trained(case.layer)], expected):
        assert_close(tensor.grad, gradient)


def can_compile():
    if digit_version(torch.__version__) < digit_version('2.5'):
        pytest.skip('torch before 2.5 cannot compile adapted layers')
    torch._dynamo.reset()


@few_cases('linear', 'depthwise7x7', 'transpose2d')
def test_compile(case):
    can_compile()
    expected = case.layer(case.x)
    expected_gradients = torch.autograd.grad(expected.square().sum(), trained(case.layer))
    output = torch.compile(case.layer, backend='aot_eager', fullgraph=True)(case.x)
    assert_close(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), trained(case.layer))
    for gradient, reference in zip(gradients, expected_gradients):
        assert_close(gradient, reference, 1e-5)


@pytest.mark.skipif(not shutil.which('g++') or sys.platform == 'win32', reason='inductor needs a C++ compiler')
def test_compile_with_inductor():
    can_compile()
    case = Case('conv2d', 'lora', 'taylor')
    assert_close(torch.compile(case.layer, fullgraph=True)(case.x), case.layer(case.x), 1e-5)


@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
@few_cases('linear', 'conv2d')
def test_training_flag_is_kept(case, mode):
    layer = adapt(case.base.train(mode), **case.settings)
    assert [module.training for module in layer.modules()] == [mode] * len(list(layer.modules()))
    for flag in (not mode, mode):
        assert all(module.training == flag for module in layer.train(flag).modules())
        merge(layer)
        assert unmerge(layer).training == flag


@few_cases('linear', 'conv2d', 'transpose2d', 'mmcv_conv2d')
def test_hooks_and_references_stay_valid(case):
    calls = []
    case.base.register_forward_pre_hook(lambda *_: calls.append('before'))
    case.base.register_forward_hook(lambda *_: calls.append('after'))
    holder = nn.Sequential(case.base)
    weight, bias = case.base.weight, case.base.bias
    adapt(holder, **case.settings)
    assert holder[0] is case.base
    assert case.base.frozen_weight is weight
    assert case.base.bias is bias
    holder(case.x)
    assert calls == ['before', 'after']


@pytest.mark.parametrize('kind', KINDS)
def test_adapted_class_is_made_once(kind):
    cls = type(KINDS[kind][0]())
    assert adapted_class(cls) is adapted_class(cls)
    assert issubclass(adapted_class(cls), cls)
    assert adapted_class(cls).original_class is cls
    assert adapted_class(cls).__name__ == f'Adapted{cls.__name__}'


# torch.func, torch.fx, torch.jit


@few_cases('linear', 'grouped', 'gpt2_conv1d')
def test_gradients_of_each_sample(double):
    parameters = {name: p.detach() for name, p in double.layer.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(double.layer, parameters, (x[None], )).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, double.x)
    for i, x in enumerate(double.x):
        expected = torch.autograd.grad(double.layer(x[None]).square().sum(), trained(double.layer))
        for name, reference in zip(parameters, expected):
            assert_close(gradients[name][i], reference, 1e-10)


@pytest.mark.parametrize('make', [lambda layer: layer, nn.Sequential], ids=['root', 'child'])
@few_cases('linear', 'grouped')
def test_symbolic_trace(case, make):
    model = make(case.layer)
    traced = torch.fx.symbolic_trace(model)
    train(case.layer)  # the graph has the layer, not the values of its weight
    assert_close(traced(case.x), model(case.x))
    expected = torch.autograd.grad(model(case.x).sum(), trained(case.layer))
    traced(case.x).sum().backward()
    for parameter, reference in zip(trained(case.layer), expected):
        assert_close(parameter.grad, reference, 1e-5)


@pytest.mark.parametrize('fold', [merge, unmerge], ids=['merged', 'unmerged'])
@few_cases('linear', 'grouped')
def test_deploying_without_unloading(case, fold):
    """torch.jit.script would have to compile the adapter, and says what to do instead."""
    train(case.layer)
    model = fold(nn.Sequential(case.layer))
    assert_close(torch.jit.trace(model, case.x)(case.x), model(case.x))
    if digit_version(torch.__version__) >= digit_version('2.6'):
        assert_close(torch.export.export(model, (case.x, )).module()(case.x), model(case.x))
    with pytest.raises(SetupError, match=r'jit.script cannot compile .*\n.*merge_and_unload\(model\).*jit.trace'):
        torch.jit.script(model)
    assert_close(torch.jit.script(merge_and_unload(model))(case.x), model(case.x))


@pytest.mark.parametrize('method', METHODS)
def test_what_is_made_under_inference_mode_can_train(seed, method):
    model = nn.Conv2d(4, 6, 3)
    with torch.inference_mode():
        adapt(model, RANK, ALPHA, method)
        load_adapter(model, adapter_state_dict(model), name='other')
        merge(model)
    unmerge(model)(torch.randn(2, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in trained(model))
