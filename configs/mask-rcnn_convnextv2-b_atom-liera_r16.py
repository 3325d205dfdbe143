# Filter subspace in the Lie algebra, W ⊙ (1 + Δ), with the same atoms
_base_ = 'mask-rcnn_convnextv2-b_atom_r16.py'

model = dict(backbone=dict(liera=dict(update='taylor')))
