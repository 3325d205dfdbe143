"""Ground-truth masks that stay on the device that trains."""
from typing import Any, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import roi_align
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import MODELS
from torch import Tensor


class DeviceMasks(BitmapMasks):
    """MMDetection's ``BitmapMasks`` on a device: moved once, and never copied to be padded, passed on or cropped.

    Args:
        masks: The masks, (G, H, W), uint8.
    """

    def __init__(self, masks: Tensor):
        self.masks = masks
        self.height, self.width = masks.shape[1:]

    def __getitem__(self, index: Any) -> 'DeviceMasks':
        return DeviceMasks(self.masks[index].view(-1, self.height, self.width))

    def __deepcopy__(self, memo: dict) -> 'DeviceMasks':
        return self  # nothing writes to the masks of a batch, and detectors copy their data samples

    def pad(self, out_shape: Tuple[int, int], pad_val: int = 0) -> 'DeviceMasks':
        height, width = out_shape
        if (height, width) == (self.height, self.width):
            return self
        return DeviceMasks(F.pad(self.masks, (0, width - self.width, 0, height - self.height), value=pad_val))

    def crop_and_resize(self,
                        bboxes: Union[np.ndarray, Tensor],
                        out_shape: Tuple[int, int],
                        inds: Union[np.ndarray, Tensor],
                        device: Union[str, torch.device] = 'cpu',
                        interpolation: str = 'bilinear',
                        binarize: bool = True) -> BitmapMasks:
        if len(self) == 0:
            return BitmapMasks(np.empty((0, *out_shape), dtype=np.uint8), *out_shape)
        boxes = torch.as_tensor(bboxes, device=self.masks.device)
        rois = torch.cat([torch.as_tensor(inds, device=boxes.device).to(boxes.dtype)[:, None], boxes], 1)
        targets = roi_align(self.masks[:, None].to(boxes.dtype), rois, out_shape, 1.0, 0, 'avg', True)[:, 0]
        return BitmapMasks((targets >= .5 if binarize else targets).cpu().numpy(), *out_shape)

    def to_ndarray(self) -> np.ndarray:
        return self.masks.cpu().numpy()

    def to_tensor(self, dtype: torch.dtype, device: Union[str, torch.device]) -> Tensor:
        return self.masks.to(device, dtype)


@MODELS.register_module()
class DeviceMaskPreprocessor(DetDataPreprocessor):
    """MMDetection's ``DetDataPreprocessor`` that moves bitmap masks to the device together with the images."""

    def pad_gt_masks(self, batch_data_samples: Sequence[DetDataSample]) -> None:
        for sample in batch_data_samples:
            masks = sample.gt_instances.get('masks')
            if type(masks) is BitmapMasks:
                masks = torch.from_numpy(masks.masks).to(self.device, non_blocking=True)
                sample.gt_instances.masks = DeviceMasks(masks)
        super().pad_gt_masks(batch_data_samples)
