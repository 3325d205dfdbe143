"""The parameterisations of Δ: shapes, counts, and their values at start."""
import copy
import math

import pytest
import torch
from mmpretrain.models.backbones import ConvNeXt
from torch import nn

from liera_mm import adapt, summary
from liera_mm.core.algebra import METHODS
from liera_mm.core.factors import (
    at_least_float32,
    atom_shapes,
    factor_shapes,
    leading_factors,
    low_rank,
    minor_factors,
    mode_product,
    side_by_side,
    tucker_factors,
)

LAYERS = [
    nn.Linear(6, 10),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 1),
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv2d(8, 8, 7, groups=8),
    nn.Conv2d(4, 8, 3, groups=4),
    nn.Conv2d(4, 6, (3, 5)),
    nn.Conv2d(4, 6, (5, 3), groups=2),
    nn.Conv2d(4, 6, (1, 3)),
    nn.Conv3d(4, 6, 3),
    nn.Conv3d(4, 6, (1, 2, 3), groups=2),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose3d(4, 6, (3, 2, 1), groups=2),
]
every_layer = pytest.mark.parametrize('layer', LAYERS, ids=repr)


# Shapes


@pytest.mark.parametrize(
    ('weight', 'groups', 'a', 'b'),
    [
        # out, in / groups, kernel            r * min(p, q), in * q    out / groups * p, r * min(p, q)
        ((10, 6), 1, (2, 6), (10, 2)),
        ((10, 6, 1, 1), 1, (2, 6), (10, 2)),
        ((10, 6, 3), 1, (2, 18), (10, 2)),
        ((10, 6, 3, 3), 1, (6, 18), (30, 6)),
        ((10, 6, 3, 3, 3), 1, (6, 18), (90, 6)),
        ((10, 3, 3, 3), 2, (6, 18), (15, 6)),
        ((10, 1, 7, 7), 10, (14, 70), (7, 14)),
        ((10, 6, 3, 5), 1, (6, 30), (30, 6)),
        ((10, 6, 5, 3), 1, (6, 18), (50, 6)),
    ],
    ids=str)
def test_factor_shapes(weight, groups, a, b):
    assert factor_shapes(torch.Size(weight), groups, rank=2) == (a, b)


@every_layer
@pytest.mark.parametrize('rank', [1, 3, 16])
def test_the_product_of_the_factors_fills_the_weight(layer, rank):
    (inner, columns), (rows, same_inner) = factor_shapes(layer.weight.shape, getattr(layer, 'groups', 1), rank)
    assert rows * columns == layer.weight.numel()
    assert inner == same_inner
    assert inner % rank == 0


@pytest.mark.parametrize('groups', [1, 2, 4, 8])
@pytest.mark.parametrize('kernel', [1, 3, 5, 7])
def test_square_kernels_have_the_papers_factors(groups, kernel):
    inputs, outputs, rank = 8, 16, 4
    weight = nn.Conv2d(inputs, outputs, kernel, groups=groups).weight
    a, b = factor_shapes(weight.shape, groups, rank)
    assert a == (rank * kernel, inputs * kernel)
    assert b == (outputs // groups * kernel, rank * kernel)


def test_low_rank_is_the_scaled_product_in_the_shape_of_the_weight():
    a, b = torch.randn(6, 12), torch.randn(18, 6)
    product = torch.tensor([[sum(b[i, k] * a[k, j] for k in range(6)) for j in range(12)] for i in range(18)])
    delta = low_rank(a, b, 1.5, torch.Size((6, 4, 3, 3)))
    torch.testing.assert_close(delta, 1.5 * product.reshape(6, 4, 3, 3))


# ConvNeXt-V2-B: the numbers of the paper


@pytest.fixture(scope='module', params=[True, False], ids=['linear', 'conv1x1'])
def convnextv2_b(request):
    """Built on the CPU, since mmpretrain's ConvNeXt cannot be on the meta device, and moved there for speed."""
    return ConvNeXt(
        'base',
        out_indices=[0, 1, 2, 3],
        drop_path_rate=.4,
        layer_scale_init_value=0.,
        use_grn=True,
        linear_pw_conv=request.param).to('meta')


@pytest.fixture
def fresh_convnextv2_b(convnextv2_b):
    """A model to adapt: the meta device makes copies cheap."""
    return copy.deepcopy(convnextv2_b)


@pytest.mark.parametrize(('rank', 'trainable'), [(2, 2_158_888), (4, 4_317_776), (8, 8_635_552), (16, 17_271_104),
                                                 (32, 34_542_208)])
@pytest.mark.parametrize('update', ['additive', 'taylor'])
def test_convnextv2_b_low_rank(fresh_convnextv2_b, rank, trainable, update):
    rows = summary(adapt(fresh_convnextv2_b, rank=rank, update=update))
    assert rows.trainable == trainable
    assert rows.total - rows.trainable == 87_694_592


def test_convnextv2_b_depthwise_share(fresh_convnextv2_b):
    rows = [row for row in summary(adapt(fresh_convnextv2_b, rank=16)) if row.kind == 'depthwise']
    assert len(rows) == 36
    assert round(sum(row.trainable for row in rows) / 1e6, 2) == 14.18
    assert round(sum(math.prod(row.shape) for row in rows) / 1e6, 2) == .88


def test_convnextv2_b_compact(fresh_convnextv2_b):
    adapt(fresh_convnextv2_b, rank=16, overrides=[{'targets': ['depthwise'], 'method': 'dense'}])
    assert summary(fresh_convnextv2_b).trainable == 3_977_600


def test_convnextv2_b_tucker(fresh_convnextv2_b):
    """Of the depthwise kernels, C x 16 and per layer a core of 16 x 1 x 2 x 2, and factors of 1 x 1 and twice 7 x 2."""
    rows = summary(adapt(fresh_convnextv2_b, method='tucker'))
    depthwise = [row for row in rows if row.kind == 'depthwise']
    assert {row.rank for row in depthwise} == {(16, 1, 2, 2)}
    assert sum(row.trainable for row in depthwise) == 16 * 18_048 + 36 * 93 == 292_116
    assert sum(math.prod(row.shape) for row in depthwise) == 884_352


@pytest.mark.parametrize(('method', 'trainable'), [
    ('atom', 36 * 16 * 49 + 16 * 16 + 3 * 4 * 4),
    ('atom-pissa', 36 * 16 * 49 + 16 * 16 + 3 * 4 * 4 + 16 * (18_048 + 3 * 128) + 4 * (128 * 256 + 256 * 512 + 512 * 1024)),
])
def test_convnextv2_b_atoms(fresh_convnextv2_b, method, trainable):
    rows = summary(adapt(fresh_convnextv2_b, method=method))
    assert {row.kind for row in rows} == {'conv', 'depthwise'}
    assert rows.trainable == trainable


# Values


@pytest.mark.parametrize('method', METHODS)
@every_layer
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_delta_is_zero_at_start(method, layer, dtype):
    if method.startswith('atom') and math.prod(layer.weight.shape[2:]) == 1:
        pytest.skip('has no spatial extent')
    layer = adapt(copy.deepcopy(layer).to(dtype), rank=2, method=method)
    delta = layer.adapter()
    assert delta.shape == layer.weight.shape
    assert delta.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert delta.count_nonzero() == 0


@every_layer
def test_lora_starts_with_a_kaiming_uniform_and_b_zero(layer):
    adapter = METHODS['lora'](layer.weight.detach(), getattr(layer, 'groups', 1), 16, 32.)
    bound = 1 / math.sqrt(adapter.A.shape[1])  # of kaiming_uniform_ with a = sqrt(5), as in nn.Linear
    assert .8 * bound < adapter.A.abs().max() <= bound
    assert adapter.A.mean().abs() < .25 * bound
    assert adapter.B.count_nonzero() == 0


@pytest.mark.parametrize(('rank', 'alpha'), [(1, 1), (4, 32), (16, 32), (3, .5)])
def test_lora_scales_by_alpha_over_rank(rank, alpha):
    adapter = METHODS['lora'](torch.zeros(5, 7), 1, rank, alpha)
    nn.init.normal_(adapter.B)
    torch.testing.assert_close(adapter(), alpha / rank * adapter.B @ adapter.A)


def test_dense_is_its_parameter_whatever_rank_and_alpha():
    adapter = METHODS['dense'](torch.zeros(4, 1, 3, 3), 4, 16, 32.)
    nn.init.normal_(adapter.delta)
    assert torch.equal(adapter(), adapter.delta)
    assert adapter.rank is None


@pytest.mark.parametrize(('dtype', 'expected'), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                                 (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_at_least_float32(dtype, expected):
    tensor = torch.randn(5).to(dtype)
    assert at_least_float32(tensor).dtype == expected
    assert torch.equal(at_least_float32(tensor), tensor.to(expected))


@pytest.mark.parametrize('rank', [1, 3, 8])
@pytest.mark.parametrize('shape', [(6, 10), (10, 6), (6, 6), (1, 9)])
def test_leading_factors_are_the_best_approximation(shape, rank):
    matrix = torch.randn(shape)
    a, b = leading_factors(matrix, rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    r = min(rank, *shape)
    assert a.shape == (r, shape[1]) and b.shape == (shape[0], r)
    torch.testing.assert_close(b @ a, u[:, :r] * s[:r] @ v[:r])
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


@pytest.mark.parametrize('rank', [1, 3, 8])
@pytest.mark.parametrize('shape', [(6, 10), (10, 6)])
def test_minor_factors_are_the_last_triplets(shape, rank):
    matrix = torch.randn(shape)
    a, b = minor_factors(matrix, rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    r = min(rank, *shape)
    torch.testing.assert_close(b @ a, u[:, -r:] * s[-r:] @ v[-r:])
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_minor_factors_are_no_rounding_errors():
    """A pair of A and B that are both zero would never train."""
    matrix = torch.randn(7, 3) @ torch.randn(3, 5)
    a, b = minor_factors(matrix, 2)
    u, s, v = torch.linalg.svd(matrix.double())
    torch.testing.assert_close(b @ a, u[:, 1:3] * s[1:3] @ v[1:3], rtol=1e-5, atol=1e-6)
    assert len(minor_factors(torch.zeros(3, 4), 2)[0]) == 0


@pytest.mark.parametrize('factors', [leading_factors, minor_factors])
@pytest.mark.parametrize('shape', [(6, 10), (10, 6)])
def test_signs_of_singular_vectors_are_settled(shape, factors):
    a, b = factors(torch.randn(shape), 4)
    vectors = a if shape[0] > shape[1] else b.T
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()


def test_leading_factors_leave_out_what_the_matrix_does_not_have():
    matrix = torch.randn(7, 2) @ torch.randn(2, 5)
    a, b = leading_factors(matrix, 4)
    assert len(a) == 2
    torch.testing.assert_close((b @ a).float(), matrix)
    assert len(leading_factors(torch.zeros(3, 4), 2)[0]) == 0


@pytest.mark.parametrize(('method', 'triplets'), [('pissa', slice(6)), ('milora', slice(-6, None))])
def test_pissa_starts_at_the_leading_triplets_and_milora_at_the_last_and_they_keep_them(method, triplets):
    layer = nn.Conv2d(6, 8, 3)
    adapter = METHODS[method](layer.weight, 1, 2, 2.)
    u, s, v = torch.linalg.svd(layer.weight.detach().reshape(24, 18), full_matrices=False)
    torch.testing.assert_close(adapter.B0 @ adapter.A0, u[:, triplets] * s[triplets] @ v[triplets])
    assert torch.equal(adapter.A, adapter.A0) and torch.equal(adapter.B, adapter.B0)


# Tucker's core


@every_layer
@pytest.mark.parametrize(('rank', 'kernel_rank'), [(2, 1), (3, 2), (16, 16)])
def test_tucker_has_a_core_and_a_factor_for_each_dimension(layer, rank, kernel_rank):
    adapter = METHODS['tucker'](layer.weight.detach(), 1, rank, 6., kernel_rank=kernel_rank)
    shape = layer.weight.shape
    core = [*(min(rank, size) for size in shape[:2]), *(min(kernel_rank, size) for size in shape[2:])]
    shapes = {name: list(p.shape) for name, p in adapter.named_parameters()}
    assert shapes == {'G': core, **{f'A{i}': list(pair) for i, pair in enumerate(zip(shape, core), 1)}}
    assert adapter.core == tuple(core) and adapter.scale == 6 / rank
    for name, (size, mode_rank) in list(shapes.items())[1:]:
        if size == mode_rank:
            assert torch.equal(getattr(adapter, name), torch.eye(size))
    assert adapter.G.count_nonzero() == 0


def test_factors_of_tucker_begin_as_in_the_code_of_its_authors():
    """Kaiming-normal with a = sqrt(3): a deviation of sqrt(2 / (1 + 3) / rank)."""
    adapter = METHODS['tucker'](torch.zeros(1000, 800), 1, 8, 8.)
    for factor in (adapter.A1, adapter.A2):
        assert factor.std().item() == pytest.approx(.25, rel=.05)


def test_tucker_on_a_linear_layer_is_a_product_of_three():
    adapter = METHODS['tucker'](torch.zeros(5, 7), 1, 2, 6.)
    nn.init.normal_(adapter.G)
    torch.testing.assert_close(adapter(), 3 * adapter.A1 @ adapter.G @ adapter.A2.T)


@pytest.mark.parametrize('shape', [(6, 5), (6, 5, 3), (6, 1, 7, 7), (3, 4, 2, 3, 4)])
def test_tucker_factors(shape):
    """Exact for a tensor of these ranks; otherwise no worse than all that each mode loses, and orthonormal."""
    tensor = torch.randn(shape, dtype=torch.float64)
    ranks = [min(2, size) for size in shape]
    core, factors = tucker_factors(tensor, ranks)
    near = core
    lost = 0
    for mode, factor in enumerate(factors):
        torch.testing.assert_close(factor.T @ factor, torch.eye(ranks[mode], dtype=torch.float64))
        near = mode_product(near, factor, mode)
        lost += torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1))[ranks[mode]:].square().sum()
    assert (tensor - near).square().sum() <= lost * (1 + 1e-9)
    again, factors = tucker_factors(near, ranks)
    for mode, factor in enumerate(factors):
        again = mode_product(again, factor, mode)
    torch.testing.assert_close(again, near)


# Atoms


@pytest.mark.parametrize(
    ('weight', 'rank', 'a', 'b'),
    [
        # out, in / groups, kernel     m, positions    out * in / groups, m
        ((10, 6, 3, 3), 2, (2, 9), (60, 2)),
        ((10, 6, 3, 3), 16, (9, 9), (60, 9)),
        ((4, 1, 7, 7), 16, (4, 49), (4, 4)),
        ((10, 6, 3), 2, (2, 3), (60, 2)),
        ((2, 3, 1, 2, 3), 2, (2, 6), (6, 2)),
    ],
    ids=str)
def test_atom_shapes(weight, rank, a, b):
    assert atom_shapes(torch.Size(weight), 1, rank) == (a, b)


@pytest.mark.parametrize('shape', [(10, 6), (10, 6, 1), (10, 6, 1, 1)])
@pytest.mark.parametrize('method', ['atom', 'atom-pissa'])
def test_there_are_no_atoms_without_spatial_extent(method, shape):
    with pytest.raises(TypeError, match='no spatial extent'):
        METHODS[method].check(torch.Size(shape))
    with pytest.raises(TypeError, match='no spatial extent'):
        METHODS[method](torch.randn(shape), 1, 2, 2.)


@pytest.mark.parametrize('shape', [(8, 6, 3, 3), (8, 1, 7, 7)])
def test_coefficients_are_of_the_weight(shape):
    """By them, and atoms of the same scale, it is approximated as well as by any of as many."""
    weight = torch.randn(shape)
    adapter = METHODS['atom'](weight, 1, 4, 4.)
    u, s, v = torch.linalg.svd(weight.reshape(shape[0] * shape[1], -1).double(), full_matrices=False)
    torch.testing.assert_close(adapter.B @ adapter.B.T, (u[:, :4] * s[:4] @ u[:, :4].T).float(), rtol=1e-4, atol=1e-5)
    again = METHODS['atom'](weight, 1, 4, 4.)
    assert torch.equal(adapter.B, again.B)
    again.reset(2 * weight)
    torch.testing.assert_close(again.B, math.sqrt(2) * adapter.B)


@pytest.mark.parametrize('shape', [(3, 8), (8, 3), (8, 9)])
def test_factors_side_by_side_are_no_more_than_the_dimensions(shape):
    rows, columns = shape
    terms = [(w, torch.randn(r, columns), torch.randn(rows, r)) for w, r in ((.5, 2), (-1., 3))]
    inner = min(5, *shape)
    a, b = side_by_side(terms, inner)
    assert a.shape == (inner, columns) and b.shape == (rows, inner)
    torch.testing.assert_close(b @ a, sum(w * right @ left for w, left, right in terms))
