# The backbone frozen: what any adapter has to beat
_base_ = '../_base_/mask-rcnn_convnextv2-mini_digits.py'
