# LieRA in the paper's literal form: Δ is not in units of the weight, and moves it a fifth as far as LoRA's at one alpha
_base_ = 'mask-rcnn_convnextv2-b_liera_r16.py'

# alpha = 2 · rank, the ratio of the paper's Tables 9 and 10; its detection settings give none
model = dict(backbone=dict(liera=dict(scale='plain', alpha=32)))
