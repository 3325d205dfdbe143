"""DeviceRandomSampler draws as MMDetection's RandomSampler does, with other random numbers."""
import torch
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData


def sample(**kwargs):
    sampler = TASK_UTILS.build(dict(type='DeviceRandomSampler', num=8, pos_fraction=.5, neg_pos_ub=-1, **kwargs))
    gt = InstanceData(bboxes=torch.tensor([[0., 0, 10, 10]]), labels=torch.tensor([3]))
    boxes = torch.rand(100, 4)
    assigned = TASK_UTILS.build(dict(type='MaxIoUAssigner', pos_iou_thr=.5, neg_iou_thr=.5)).assign(
        InstanceData(priors=torch.cat([gt.bboxes.repeat(20, 1), boxes])), gt)
    return sampler.sample(assigned, InstanceData(priors=torch.cat([gt.bboxes.repeat(20, 1), boxes])), gt)


def test_number_and_kind():
    result = sample(add_gt_as_proposals=False)
    assert len(result.pos_inds) == len(result.neg_inds) == 4
    assert (result.pos_inds < 20).all() and (result.neg_inds >= 20).all()
    assert len(result.pos_inds.unique()) == len(result.neg_inds.unique()) == 4


def test_every_candidate_can_be_chosen():
    chosen = torch.cat([sample(add_gt_as_proposals=False).pos_inds for _ in range(60)])
    assert chosen.unique().tolist() == list(range(20))


def test_repeats_with_the_seed():
    torch.manual_seed(0)
    first = sample(add_gt_as_proposals=True).priors
    torch.manual_seed(0)
    assert torch.equal(sample(add_gt_as_proposals=True).priors, first)
