"""Ground-truth masks that go to the device that trains once, without a wait, and stay there."""
import functools
from typing import Any, Callable, Dict, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import roi_align
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor


class DeviceMasks(BitmapMasks):
    """MMDetection's ``BitmapMasks`` on a device: moved once, and never copied to be padded, passed on, cropped or measured.

    Everything else, such as ``rotate``, is done on the host, with the result on the device again.

    Args:
        tensor: The masks, (G, H, W), uint8.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.height, self.width = tensor.shape[1:]

    @property
    def masks(self) -> np.ndarray:
        """The masks on the host: what ``BitmapMasks`` works with."""
        return self.tensor.cpu().numpy()

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> 'DeviceMasks':
        return DeviceMasks(self.tensor[index].reshape(-1, self.height, self.width))

    def __deepcopy__(self, memo: dict) -> 'DeviceMasks':
        return self  # nothing writes to the masks of a batch, and detectors copy their data samples

    def to(self, *args: Any, **kwargs: Any) -> 'DeviceMasks':
        return DeviceMasks(self.tensor.to(*args, **kwargs))

    def pin_memory(self) -> 'DeviceMasks':
        return DeviceMasks(self.tensor.pin_memory())

    def pad(self, out_shape: Tuple[int, int], pad_val: int = 0) -> 'DeviceMasks':
        height, width = out_shape
        assert height >= self.height and width >= self.width, f'{self} cannot be padded to {height} × {width}'
        if (height, width) == (self.height, self.width):
            return self
        return DeviceMasks(F.pad(self.tensor, (0, width - self.width, 0, height - self.height), value=pad_val))

    def crop(self, bbox: np.ndarray) -> 'DeviceMasks':
        x1, x2 = np.clip(bbox[0::2], 0, self.width).tolist()
        y1, y2 = np.clip(bbox[1::2], 0, self.height).tolist()
        return DeviceMasks(self.tensor[:, y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)])

    def crop_and_resize(self,
                        bboxes: Union[np.ndarray, Tensor],
                        out_shape: Tuple[int, int],
                        inds: Union[np.ndarray, Tensor],
                        device: Union[str, torch.device] = 'cpu',
                        interpolation: str = 'bilinear',
                        binarize: bool = True) -> BitmapMasks:
        if len(self) == 0:
            return BitmapMasks(np.empty((0, *out_shape), dtype=np.uint8), *out_shape)
        boxes = torch.as_tensor(bboxes, device=self.tensor.device)
        targets = self.crops(boxes, out_shape, torch.as_tensor(inds, device=boxes.device), binarize)
        return BitmapMasks(targets.cpu().numpy(), *out_shape)

    def crops(self, boxes: Tensor, size: Tuple[int, int], index: Tensor, binarize: bool = True) -> Tensor:
        """What :meth:`crop_and_resize` gives, (K, height, width), as a tensor on the device."""
        rois = torch.cat([index.to(boxes.dtype)[:, None], boxes], 1)
        targets = roi_align(self.tensor[:, None].to(boxes.dtype), rois, size, 1.0, 0, 'avg', True)[:, 0]
        return targets >= .5 if binarize else targets

    @property
    def areas(self) -> np.ndarray:
        return self.tensor.sum((1, 2)).cpu().numpy()

    def to_ndarray(self) -> np.ndarray:
        return self.masks

    def to_tensor(self, dtype: torch.dtype, device: Union[str, torch.device]) -> Tensor:
        return self.tensor.to(device, dtype)

    @classmethod
    def cat(cls, masks: Sequence['DeviceMasks']) -> 'DeviceMasks':
        return cls(torch.cat([each.tensor for each in masks]))

    @classmethod
    def random(cls, *args: Any, **kwargs: Any) -> 'DeviceMasks':
        return cls(torch.from_numpy(BitmapMasks.random(*args, **kwargs).masks))


def _on_host(method: Callable) -> Callable:

    @functools.wraps(method)
    def run(self: DeviceMasks, *args: Any, **kwargs: Any) -> DeviceMasks:
        return DeviceMasks(torch.from_numpy(method(self, *args, **kwargs).masks).to(self.tensor.device))

    return run


for _name in ('rescale', 'resize', 'flip', 'expand', 'translate', 'shear', 'rotate'):
    setattr(DeviceMasks, _name, _on_host(getattr(BitmapMasks, _name)))


class PinnableSample(DetDataSample):
    """A data sample whose masks a dataloader with ``pin_memory`` pins, as it does the images."""

    def pin_memory(self) -> 'PinnableSample':
        self.gt_instances.masks = self.gt_instances.masks.pin_memory()
        return self


@TRANSFORMS.register_module()
class PackDeviceInputs(PackDetInputs):
    """MMDetection's ``PackDetInputs``, with bitmap masks as tensors.

    The workers of a dataloader hand tensors over in shared memory, where arrays go through a pipe; and it can pin them, so
    that the host need not wait while they go to the device.
    """

    def transform(self, results: dict) -> Dict[str, Any]:
        packed = super().transform(results)
        packed['data_samples'] = pinnable(packed['data_samples'])
        return packed


def pinnable(sample: DetDataSample) -> DetDataSample:
    """The sample with its bitmap masks as a tensor; the same sample if it has none."""
    masks = sample.gt_instances.get('masks')
    if type(masks) is not BitmapMasks:
        return sample
    result = PinnableSample(metainfo=sample.metainfo, **dict(sample.items()))
    result.gt_instances.masks = DeviceMasks(torch.from_numpy(masks.masks))
    return result


@MODELS.register_module()
class DeviceMaskPreprocessor(DetDataPreprocessor):
    """MMDetection's ``DetDataPreprocessor`` that moves bitmap masks to the device together with the images.

    Nothing in it has the host wait, if the dataloader has pinned what :class:`PackDeviceInputs` packed.
    """

    def forward(self, data: dict, training: bool = False) -> Union[dict, list]:
        images, reverse = self.cast_data(data['inputs']), self._channel_conversion
        if reverse:  # [[2, 1, 0]], as MMEngine does it, copies an index to the device and waits for it
            images = images.flip(1) if isinstance(images, Tensor) else [image.flip(0) for image in images]
        self._channel_conversion = False
        try:
            return super().forward(dict(data, inputs=images), training)
        finally:
            self._channel_conversion = reverse

    def pad_gt_masks(self, batch_data_samples: Sequence[DetDataSample]) -> None:
        for sample in batch_data_samples:
            masks = sample.gt_instances.get('masks')
            if type(masks) is BitmapMasks:
                sample.gt_instances.masks = DeviceMasks(torch.from_numpy(masks.masks)).to(self.device, non_blocking=True)
        super().pad_gt_masks(batch_data_samples)
