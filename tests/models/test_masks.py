"""Masks on a device are those of MMDetection, for everything that these can do."""
import copy

import numpy as np
import pytest
import torch
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, mask_target
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from liera_mm.models.masks import DeviceMaskPreprocessor, DeviceMasks, PackDeviceInputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=needs_cuda)]


@pytest.fixture
def masks():
    return BitmapMasks(np.random.RandomState(0).randint(0, 2, (5, 40, 50), dtype=np.uint8), 40, 50)


@pytest.fixture(params=DEVICES)
def ours(request, masks):
    return DeviceMasks(torch.from_numpy(masks.masks).to(request.param))


def test_size_and_contents(ours, masks):
    assert (len(ours), ours.height, ours.width) == (5, 40, 50)
    assert np.array_equal(ours.to_ndarray(), masks.masks)
    assert torch.equal(ours.to_tensor(torch.float32, 'cpu'), masks.to_tensor(torch.float32, 'cpu'))


@pytest.mark.parametrize('index', [2, [0, 3], slice(1, 4), np.array([True, False, True, False, False])], ids=str)
def test_index(ours, masks, index):
    assert np.array_equal(ours[index].to_ndarray(), masks[index].masks)


@pytest.mark.parametrize('value', [0, 1])
def test_pad(ours, masks, value):
    padded = ours.pad((64, 50), value)
    assert (padded.height, padded.width) == (64, 50)
    assert np.array_equal(padded.to_ndarray(), masks.pad((64, 50), value).masks)
    assert ours.pad((40, 50)) is ours


def test_copies_share_the_masks(ours):
    assert copy.deepcopy(InstanceData(masks=ours)).masks.tensor is ours.tensor


@pytest.mark.parametrize('box', [[3, 4, 20, 31], [-5, -2, 9, 12], [40, 30, 70, 60], [7, 7, 7, 7], [9, 9, 4, 20]], ids=str)
def test_crop_and_areas(ours, masks, box):
    box = np.int32(box)
    theirs, cropped = masks.crop(box), ours.crop(box)
    assert type(cropped) is DeviceMasks and (cropped.height, cropped.width) == (theirs.height, theirs.width)
    assert np.array_equal(cropped.to_ndarray(), theirs.masks)
    assert np.array_equal(cropped.areas, theirs.areas) and isinstance(cropped.areas, np.ndarray)
    assert np.array_equal(cropped[[2, 0]].areas, theirs[[2, 0]].areas)  # an index into what is not contiguous


def test_crop_of_a_box_outside(ours):
    assert not ours.crop(np.int32([60, 60, 70, 70])).areas.any()  # where BitmapMasks fails


@pytest.mark.parametrize('name, args', [
    ('translate', ((40, 50), 7)), ('translate', ((64, 50), -3, 'vertical')), ('rescale', (.5, )), ('resize', ((20, 30), )),
    ('flip', ()), ('flip', ('diagonal', )), ('expand', (80, 90, 5, 7)), ('shear', ((40, 50), .3)),
    ('rotate', ((40, 50), 30)),
])
def test_geometry(ours, masks, name, args):
    theirs, moved = getattr(masks, name)(*args), getattr(ours, name)(*args)
    assert type(moved) is DeviceMasks and moved.tensor.device == ours.tensor.device
    assert (moved.height, moved.width) == (theirs.height, theirs.width)
    assert np.array_equal(moved.to_ndarray(), theirs.masks) and moved.tensor.dtype == torch.uint8


@pytest.mark.parametrize('name, args', [
    ('translate', ((64, 50), 7)), ('crop', (np.int32([1, 2, 9, 9]), )), ('flip', ()), ('rotate', ((40, 50), 30))])
def test_geometry_without_masks(name, args):
    none = BitmapMasks(np.empty((0, 40, 50), np.uint8), 40, 50)
    theirs = getattr(none, name)(*args)
    ours = getattr(DeviceMasks(torch.from_numpy(none.masks)), name)(*args)
    assert ours.to_ndarray().shape == theirs.masks.shape and ours.areas.shape == (0, )


def test_boxes_and_iteration(ours, masks):
    assert torch.equal(ours.get_bboxes('hbox').tensor, masks.get_bboxes('hbox').tensor)
    assert all(np.array_equal(a, b) for a, b in zip(ours, masks)) and repr(ours) == f'Device{masks!r}'.replace('Bitmap', '')


def test_concatenation(ours, masks):
    together = DeviceMasks.cat([ours[:2], ours[2:]])
    assert together.tensor.device == ours.tensor.device and np.array_equal(together.to_ndarray(), masks.masks)
    assert np.array_equal(BitmapMasks.cat([ours, masks]).masks, np.concatenate([masks.masks] * 2))
    assert len(DeviceMasks.random(4, 8, 8)) == 4


@pytest.mark.parametrize('soft', [False, True])
def test_targets_of_the_mask_head(ours, masks, soft):
    device = ours.tensor.device
    corners = torch.rand(12, 2, 2, device=device) * torch.tensor([50, 40], device=device)
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 1], 1)
    inds = torch.randint(0, 5, (12, ), device=device)
    cfg = ConfigDict(mask_size=14, soft_mask_target=soft)
    expected, actual = (mask_target([boxes], [inds], [m], cfg) for m in (masks, ours))
    assert actual.device == device
    torch.testing.assert_close(actual, expected)


def test_targets_without_masks():
    none = DeviceMasks(torch.empty(0, 40, 50, dtype=torch.uint8))
    assert len(none.crop_and_resize(np.empty((0, 4)), (14, 14), np.empty(0, dtype=int))) == 0


@pytest.mark.parametrize('augments', [None, [dict(type='mmdet.BatchFixedSizePad', size=(96, 128), pad_mask=True)]], ids=str)
def test_preprocessor(augments):
    settings = dict(mean=[1., 2., 3.], std=[2.] * 3, bgr_to_rgb=True, pad_size_divisor=32, pad_mask=True,
                    batch_augments=augments)
    random = np.random.RandomState(0)
    data = dict(inputs=[], data_samples=[])
    for instances, height, width in ((2, 40, 50), (0, 64, 33)):
        data['inputs'].append(torch.from_numpy(random.randint(0, 256, (3, height, width), dtype=np.uint8)))
        bitmap = BitmapMasks(random.randint(0, 2, (instances, height, width), dtype=np.uint8), height, width)
        data['data_samples'].append(DetDataSample(gt_instances=InstanceData(masks=bitmap, labels=torch.zeros(instances))))
    results = [preprocessor(**settings)(copy.deepcopy(data), training=True)
               for preprocessor in (DetDataPreprocessor, DeviceMaskPreprocessor)]
    assert torch.equal(results[0]['inputs'], results[1]['inputs'])
    assert results[1]['inputs'].shape[2:] == ((96, 128) if augments else (64, 64))
    for theirs, ours in zip(*(result['data_samples'] for result in results)):
        assert type(ours.gt_instances.masks) is DeviceMasks
        assert np.array_equal(ours.gt_instances.masks.to_ndarray(), theirs.gt_instances.masks.masks)
        assert ours.metainfo == theirs.metainfo
    images = torch.stack([image[:, :40, :33] for image in data['inputs']])
    stacked = [preprocessor(**settings)(dict(inputs=images, data_samples=None))['inputs']
               for preprocessor in (DetDataPreprocessor, DeviceMaskPreprocessor)]
    assert torch.equal(*stacked)


def packed(transform, masks):
    """A batch of two images from the transform, which is the last of a pipeline."""
    results = dict(img=np.zeros((40, 50, 3), np.uint8), img_shape=(40, 50), gt_bboxes_labels=np.arange(5),
                   gt_ignore_flags=np.array([0, 0, 1, 0, 0], bool))
    if masks is not None:
        results['gt_masks'] = masks
    return [transform(dict(results)), transform(dict(results))]


def test_packed_masks_are_shared_and_pinned(masks, monkeypatch):
    """By workers, and by the thread of a dataloader that pins; here, where nothing can be pinned, a stand-in marks it."""
    theirs, ours = packed(PackDetInputs(), masks), packed(PackDeviceInputs(), masks)
    for batch in (next(iter(DataLoader(ours, 2, num_workers=1, collate_fn=pseudo_collate))), pseudo_collate(ours)):
        for expected, sample in zip(theirs, batch['data_samples']):
            assert np.array_equal(sample.gt_instances.masks.masks, expected['data_samples'].gt_instances.masks.masks)
            assert torch.equal(sample.gt_instances.labels, expected['data_samples'].gt_instances.labels)
            assert sample.metainfo == expected['data_samples'].metainfo
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor, *device: pinned.append(tensor.shape) or tensor)
    batch = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert sorted(pinned) == 2 * [(3, 40, 50)] + 2 * [(4, 40, 50)]
    result = DeviceMaskPreprocessor(pad_size_divisor=32, pad_mask=True)(batch, training=True)
    for sample in result['data_samples']:
        assert np.array_equal(sample.gt_instances.masks.masks, masks[[0, 1, 3, 4]].pad((64, 64)).masks)


def test_packed_without_masks():
    theirs, ours = packed(PackDetInputs(), None), packed(PackDeviceInputs(), None)
    assert [type(each['data_samples']) for each in ours] == 2 * [DetDataSample]
    assert torch.equal(theirs[0]['inputs'], ours[0]['inputs'])
