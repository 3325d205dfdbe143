"""A small classifier of three classes on a backbone of the digits configs, and images for it."""
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn

IMAGES = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@DATASETS.register_module()
class Pictures(torch.utils.data.Dataset):
    """The first of the images."""
    metainfo = {}

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        return dict(images=IMAGES[index], labels=torch.tensor(index % 3))


@MODELS.register_module()
class PictureClassifier(BaseModel):
    """Whose loss is a mean over images, such that two halves of a batch have that of the batch as their mean."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = MODELS.build(backbone), nn.Linear(192, 3)

    def forward(self, images, labels, mode):
        return dict(loss=F.cross_entropy(self.head(self.backbone(images)[-1].mean((2, 3))), labels))
