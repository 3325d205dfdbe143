"""The parameterisations of Δ: shapes, counts, and their values at start."""
import copy
import math

import pytest
import torch
from mmpretrain.models.backbones import ConvNeXt
from torch import nn

from liera_mm import adapt, summary
from liera_mm.core.algebra import (
    METHODS,
    at_least_float32,
    factor_shapes,
    leading_factors,
    low_rank,
    minor_factors,
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
every_method = pytest.mark.parametrize('method', METHODS)


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


# Values


@every_method
@every_layer
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_delta_is_zero_at_start(method, layer, dtype):
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
