# The backbone frozen, neck and heads trained: what any adapter has to beat
_base_ = '_base_/mask-rcnn_convnextv2-b_coco.py'

# drop path would only add noise to features that cannot learn from it
model = dict(backbone=dict(drop_path_rate=0.))
