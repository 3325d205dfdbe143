"""The rules that apply Δ to a weight, against their definitions."""
import math

import pytest
import torch

from liera_mm.core.group import INVERSES, MULTIPLICATIVE, UPDATES

# The definitions, on Python's floats. A new rule needs a line here.
DEFINITIONS = {
    'additive': lambda w, d: w + d,
    'taylor': lambda w, d: w * (1 + d),
    'exp': lambda w, d: w * math.exp(d),
}
every_update = pytest.mark.parametrize('update', UPDATES)


@every_update
@pytest.mark.parametrize('w', [1.5, -2., 0., 1e-30])
@pytest.mark.parametrize('d', [0., .3, -.3, -1., -2.5, 4.])
def test_definition(update, w, d):
    result = UPDATES[update](torch.tensor(w, dtype=torch.float64), torch.tensor(d, dtype=torch.float64))
    assert result.item() == pytest.approx(DEFINITIONS[update](w, d), rel=1e-15, abs=0)


@every_update
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_zero_gives_the_weight_bit_for_bit(update, dtype):
    info = torch.finfo(dtype)
    weight = torch.cat([torch.randn(100, dtype=dtype),
                        torch.tensor([0., info.max, info.min, info.tiny, info.tiny / 4, math.inf], dtype=dtype)])
    assert torch.equal(UPDATES[update](weight, torch.zeros_like(weight)), weight)


@pytest.mark.parametrize('update', MULTIPLICATIVE)
def test_multiplicative_updates_cannot_move_a_zero(update):
    assert UPDATES[update](torch.zeros(50), torch.randn(50)).count_nonzero() == 0


def test_additive_update_moves_a_zero():
    assert 'additive' not in MULTIPLICATIVE
    assert UPDATES['additive'](torch.zeros(50), torch.ones(50)).count_nonzero() == 50


def test_exp_never_changes_a_sign_and_taylor_does_from_minus_one_on():
    weight, delta = torch.randn(1000), 3 * torch.randn(1000)
    assert torch.equal(UPDATES['exp'](weight, delta).sign(), weight.sign())
    kept = UPDATES['taylor'](weight, delta).sign() == weight.sign()
    assert torch.equal(kept, delta > -1)


def test_exp_is_a_homomorphism():
    weight, a, b = torch.randn(3, 1000, dtype=torch.float64)
    torch.testing.assert_close(UPDATES['exp'](UPDATES['exp'](weight, a), b), UPDATES['exp'](weight, a + b))
    torch.testing.assert_close(UPDATES['exp'](UPDATES['exp'](weight, a), -a), weight)


def test_taylor_is_the_first_order_of_exp():
    weight, direction = torch.randn(2, 1000, dtype=torch.float64)
    ratios = []
    for step in (1e-2, 5e-3):
        error = UPDATES['exp'](weight, step * direction) - UPDATES['taylor'](weight, step * direction)
        ratios.append(error.norm().item())
    assert ratios[0] / ratios[1] == pytest.approx(4, rel=.05)  # an error of second order


@every_update
def test_gradients(update):
    weight, delta = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(UPDATES[update], (weight, delta))


# The inverses


@every_update
def test_inverse(update):
    weight, delta = torch.randn(2, 100, dtype=torch.float64)
    back = INVERSES[update](weight, UPDATES[update](weight, delta))
    torch.testing.assert_close(back, delta)
    assert INVERSES[update](weight, weight).count_nonzero() == 0


@every_update
def test_inverse_where_there_is_none(update):
    """Always finite, and as near to the other weight as the rule gets."""
    weight = torch.tensor([0., 0., 1., -2., 3.])
    other = torch.tensor([1., 0., -1., 2., 0.])
    delta = INVERSES[update](weight, other)
    assert delta.isfinite().all()
    nearest = dict(additive=other, taylor=torch.tensor([0., 0., -1., 2., 0.]), exp=torch.zeros(5))[update]
    torch.testing.assert_close(UPDATES[update](weight, delta), nearest, rtol=0, atol=1e-6)
