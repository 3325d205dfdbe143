"""The method itself: pure torch, for any ``nn.Module``. Nothing here imports OpenMMLab or the packages above."""
