"""Focal losses against their formulas in float64."""
import pytest
import torch
from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss
from operators import DEVICES, HALVES, TOLERANCE, check, fallback_only, randn

pytestmark = fallback_only  # compiled ones have no CPU kernels, and cut logarithms off


def reference_sigmoid(x, target, gamma, alpha, weight=None):
    one_hot = torch.stack([target == c for c in range(x.shape[1])], 1)
    p = x.sigmoid()
    loss = torch.where(one_hot, -alpha * (1 - p)**gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log())
    return loss if weight is None else loss * padded(weight)[target][:, None]


def reference_softmax(x, target, gamma, alpha, weight=None):
    valid = (target >= 0) & (target < x.shape[1])
    p = x.softmax(1)[torch.arange(len(x), device=x.device), target.clamp(0, x.shape[1] - 1)]
    loss = -alpha * (1 - p)**gamma * p.log() * valid
    return loss if weight is None else loss * padded(weight)[target]


def padded(weight):
    """With the weight of what is of no class: 1."""
    return torch.cat([weight, weight.new_ones(1)])


LOSSES = [(sigmoid_focal_loss, reference_sigmoid), (softmax_focal_loss, reference_softmax)]


def inputs(device, classes=5):
    """Logits, and targets of every class and of none."""
    target = torch.arange(3 * (classes + 1), device=device) % (classes + 1)
    return 3 * randn(len(target), classes, device=device), target


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('loss, reference', LOSSES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize('gamma, alpha, weighted', [(2., .25, False), (1.5, .6, True), (0., .5, False)])
def test_loss_and_gradient(loss, reference, gamma, alpha, weighted, dtype, device):
    if loss is softmax_focal_loss and dtype in HALVES:
        # mmcv rounds the softmax, whose logarithm is then off by more than a rounding.
        pytest.skip('see test_softmax_of_half_precision')
    x, target = inputs(device)
    weight = torch.linspace(.5, 2, 5, device=device).to(dtype) if weighted else None
    wide_weight = weight.double() if weighted else None
    # mmcv multiplies the softmax's gradients, (N, C), by those of the losses, (N,): it has them for the sum only.
    per_sample = loss is sigmoid_focal_loss
    check(lambda x, t: loss(x, t, gamma, alpha, weight, 'none' if per_sample else 'sum'),
          lambda x, t: (lambda losses: losses if per_sample else losses.sum())(reference(x, t, gamma, alpha, wide_weight)),
          (x, target), dtype)
    torch.testing.assert_close(loss(x.to(dtype), target, gamma, alpha, weight, 'none').double(),
                               reference(x.to(dtype).double(), target, gamma, alpha, wide_weight), **TOLERANCE[dtype])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
def test_softmax_of_half_precision(dtype, device):
    x, target = inputs(device)
    x = x.to(dtype).requires_grad_()
    loss = softmax_focal_loss(x, target, 2., .25, None, 'none')
    p = x.detach().sub(x.detach().max(1, keepdim=True)[0]).exp()
    p = (p / p.sum(1, keepdim=True)).double()
    torch.testing.assert_close(loss.double(), reference_softmax(p.log(), target, 2., .25), **TOLERANCE[dtype])
    softmax_focal_loss(x, target, 2., .25, None, 'sum').backward()
    assert x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad[target < 5].any(1).all()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('loss, reference', LOSSES)
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_reductions(loss, reference, reduction, device):
    check(lambda x, t: loss(x, t, 2., .25, None, reduction),
          lambda x, t: reference(x, t, 2., .25).sum() / (len(x) if reduction == 'mean' else 1), inputs(device))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('loss', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('shape', [(0, 5), (3, 0)])
def test_no_samples_and_no_classes(loss, shape, device):
    if loss is softmax_focal_loss and shape[1] == 0:
        pytest.skip('mmcv takes a maximum over the classes')
    x = torch.empty(shape, device=device, requires_grad=True)
    total = loss(x, torch.zeros(shape[0], dtype=torch.long, device=device), 2., .25, None, 'sum')
    total.backward()
    assert total == 0 and x.grad.shape == shape


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('gamma', [0., .5, 2.])
@pytest.mark.parametrize('dtype', [torch.float32, *HALVES])
def test_extreme_logits(dtype, gamma, device):
    x = torch.tensor([[-300., 300], [300, -300], [30, -30], [0, 0]], device=device, dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 0, 1, 2], device=device)
    sigmoid_focal_loss(x, target, gamma, .25, None, 'sum').backward()
    # Where a logit is wrong by far, the loss is linear; where it is right, flat.
    expected = torch.tensor([[-.25, .75], [0, 0], [.75, -.25]], dtype=dtype, device=device)
    torch.testing.assert_close(x.grad[:3], expected)
    y = x.detach().requires_grad_()
    loss = softmax_focal_loss(y, target, gamma, .25, None, 'sum')
    loss.backward()
    assert loss.isfinite() and y.grad.isfinite().all()


@pytest.mark.parametrize('device', DEVICES)
def test_loss_of_the_head_under_autocast(device):
    from mmdet.models.losses import FocalLoss
    x, target = inputs(device)
    logits = x.to(torch.bfloat16).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        loss = FocalLoss()(logits, target, avg_factor=7.)
    loss.backward()
    expected = reference_sigmoid(logits.detach().double(), target, 2., .25).sum() / 7
    torch.testing.assert_close(loss.double(), expected, rtol=2e-2, atol=0)
    assert logits.grad.any()
