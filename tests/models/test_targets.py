"""Targets of a batch at once are those of MMDetection's assigners, samplers and coders, one image after another."""
import pytest
import torch
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.models.task_modules.samplers import RandomSampler
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from liera_mm.models.targets import assign, decode, encode, image_sizes, pad_boxes, sample

pytestmark = pytest.mark.usefixtures('one_thread')

RPN = dict(pos_iou_thr=.7, neg_iou_thr=.3, min_pos_iou=.3)
ASSIGNERS = dict(
    rpn=RPN,
    rcnn=dict(pos_iou_thr=.5, neg_iou_thr=.5, min_pos_iou=.5, match_low_quality=False),
    mask_rcnn=dict(pos_iou_thr=.5, neg_iou_thr=.5, min_pos_iou=.5),
    one_each=dict(RPN, gt_max_assign_all=False),
    any_quality=dict(RPN, min_pos_iou=0.),
    between=dict(RPN, neg_iou_thr=(.1, .3)),
    ignoring=dict(RPN, ignore_iof_thr=.5),
    ignoring_regions=dict(RPN, ignore_iof_thr=.3, ignore_wrt_candidates=False))
ANCHORS = torch.cat(AnchorGenerator([4, 8, 16, 32], [.5, 1., 2.], [8]).grid_priors(
    [(12, 16), (6, 8), (3, 4), (2, 2)], device='cpu'))


@pytest.fixture(autouse=True)
def mmdets_scope():
    """In which assigners find what calculates overlaps, whatever ran before."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def some_boxes(count, whole):
    """Random boxes; with whole coordinates, IoUs are often equal."""
    centre, size = torch.rand(count, 2) * torch.tensor([64., 48.]), 4 + 40 * torch.rand(count, 2)**2
    boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
    return (boxes / 4).round() * 4 if whole else boxes


def instances(count, whole=False, labels=True):
    data = InstanceData(bboxes=some_boxes(count, whole))
    if labels:
        data.labels = torch.randint(0, 5, (count, ))
    return data


def images(seed, number=4):
    """Instances and ignored regions of some images: none, few, more than fit one chunk; some twice the same box."""
    torch.manual_seed(seed)
    gts, ignored = [], []
    for _ in range(number):
        gt = instances([0, 1, 3, 8, 9, 21][int(torch.randint(6, ()))], whole=seed % 2 == 0)
        if len(gt) > 2 and seed % 3 == 0:
            gt.bboxes[1] = gt.bboxes[2]
        gts.append(gt)
        ignored.append([None, instances(0, labels=False), instances(2, labels=False)][int(torch.randint(3, ()))])
    return gts, ignored


@pytest.mark.parametrize('name', ASSIGNERS)
def test_assignments_of_random_images(name):
    """1000 images over all assigners."""
    assigner, priors = MaxIoUAssigner(**ASSIGNERS[name]), ANCHORS
    for seed in range(32):
        gts, ignored = images(seed)
        if seed % 4 == 1:
            priors = some_boxes(300, seed % 8 == 1)
        ours = assign(assigner, priors, pad_boxes(gts, priors), pad_boxes(ignored, priors))
        for image, gt, regions in zip(ours, gts, ignored):
            theirs = assigner.assign(InstanceData(priors=priors), gt, regions)
            assert torch.equal(image, theirs.gt_inds)


@pytest.mark.parametrize('name', ['rpn', 'mask_rcnn', 'ignoring', 'any_quality'])
def test_assignments_of_priors_that_only_some_images_have(name):
    assigner = MaxIoUAssigner(**ASSIGNERS[name])
    for seed in range(20):
        gts, ignored = images(seed)
        priors, usable = torch.stack([some_boxes(40, True) for _ in gts]), torch.rand(len(gts), 40) < .7
        usable[0] = seed % 5 > 0
        ours = assign(assigner, priors, pad_boxes(gts, priors), pad_boxes(ignored, priors), usable)
        for image, prior, use, gt, regions in zip(ours, priors, usable, gts, ignored):
            theirs = assigner.assign(InstanceData(priors=prior[use]), gt, regions)
            assert torch.equal(image[use], theirs.gt_inds) and (image[~use] == -1).all()


def assigned(*counts):
    """Of images with so many positive, negative and other priors each, in random order."""
    length = max(map(sum, counts))
    rows = []
    for positive, negative, other in counts:
        row = torch.tensor([3] * positive + [0] * negative + [-1] * (other + length - positive - negative - other))
        rows.append(row[torch.randperm(length)])
    return torch.stack(rows)


@pytest.mark.parametrize('settings', [
    dict(num=16, pos_fraction=.25), dict(num=16, pos_fraction=.5, neg_pos_ub=2),
    dict(num=16, pos_fraction=.5, neg_pos_ub=1.5), dict(num=16, pos_fraction=.5, neg_pos_ub=0),
    dict(num=200, pos_fraction=.5), dict(num=16, pos_fraction=1.)])
def test_as_many_samples_as_the_random_sampler_takes(settings):
    sampler = RandomSampler(add_gt_as_proposals=False, **settings)
    rows = assigned((0, 50, 10), (3, 50, 0), (40, 20, 0), (2, 5, 0), (0, 0, 30), (60, 0, 0), (7, 1, 0))
    ours = sample(sampler, rows)
    assert ours.index.shape == ours.positive.shape == ours.negative.shape == (7, min(sampler.num, rows.shape[1]))
    for row, index, positive, negative in zip(rows, ours.index, ours.positive, ours.negative):
        theirs = sampler.sample(
            AssignResult(3, row, torch.zeros(len(row)), torch.zeros_like(row)),
            InstanceData(priors=torch.zeros(len(row), 4)),
            InstanceData(bboxes=torch.zeros(3, 4), labels=torch.zeros(3, dtype=torch.long)))
        assert positive.sum() == len(theirs.pos_inds) and negative.sum() == len(theirs.neg_inds)
        assert (row[index[positive]] > 0).all() and (row[index[negative]] == 0).all()
        assert len(index[positive | negative].unique()) == (positive | negative).sum()
        assert not positive[ours.slots:].any() and positive[:positive.sum()].all()  # they come first


def test_every_subset_is_as_likely():
    """Of 5 positive and 7 negative priors, 2 and 3 are taken: 10 and 35 subsets, each near its share in 20000 draws."""
    sampler = RandomSampler(num=5, pos_fraction=.4, add_gt_as_proposals=False)
    row = torch.tensor([1, 0, 0, 1, -1, 2, 0, 0, 0, 4, 0, 1, -1, 0])
    draws = sample(sampler, row.expand(20000, -1))
    for chosen, subsets in [(draws.positive, 10), (draws.negative, 35)]:
        codes = (chosen * 2**draws.index).sum(1)
        counts = codes.unique(return_counts=True)[1].double()
        expected = 20000 / subsets
        assert len(counts) == subsets
        assert ((counts - expected)**2 / expected).sum() < subsets + 5 * (2 * subsets)**.5  # chi-square


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('stds', [(1., 1., 1., 1.), (.1, .1, .2, .2)])
@pytest.mark.parametrize('clip', [True, False])
def test_deltas_and_boxes(stds, clip, dtype):
    coder = DeltaXYWHBBoxCoder((0., .1, 0., -.1), stds, clip_border=clip)
    boxes, gts, deltas = some_boxes(50, False), some_boxes(50, False), torch.randn(2, 50, 4)
    assert torch.equal(encode(coder, boxes.view(2, 25, 4), gts.view(2, 25, 4)).view(50, 4), coder.encode(boxes, gts))
    metas = [dict(img_shape=(48, 64)), dict(img_shape=(40, 50, 3))]
    boxes, deltas, rtol = boxes.to(dtype), 3 * deltas.to(dtype), dict(rtol=0, atol=0 if dtype == torch.float32 else .1)
    ours = decode(coder, boxes.expand(2, -1, -1), deltas, image_sizes(metas, boxes.device))
    for our, delta, meta in zip(ours, deltas, metas):
        torch.testing.assert_close(our, coder.decode(boxes, delta, max_shape=meta['img_shape']), **rtol)


def test_padding():
    gts = [instances(2), instances(0), None, instances(5)]
    boxes, valid, labels = pad_boxes(gts, torch.zeros(1))
    assert boxes.shape == (4, 5, 4) and valid.sum(1).tolist() == [2, 0, 0, 5]
    assert torch.equal(boxes[valid], torch.cat([gts[0].bboxes, gts[3].bboxes]))
    assert torch.equal(labels[valid], torch.cat([gts[0].labels, gts[3].labels]))
    assert pad_boxes([None], torch.zeros(1)).boxes.shape == (1, 1, 4)
