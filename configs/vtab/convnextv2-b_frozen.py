# The backbone frozen, a linear classifier trained: what any adapter has to beat
_base_ = '../_base_/convnextv2-b_vtab.py'

# drop path would only add noise to features that cannot learn from it
model = dict(backbone=dict(drop_path_rate=0.))
