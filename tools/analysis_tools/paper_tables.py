#!/usr/bin/env python
"""Print the parameter counts of the COCO configs and of the models in the paper's Tables 1 to 4, beside the paper's own.

Models are built from their configurations, without weights and without memory for them. A figure in M is the trainable
parameters; one in % is their share of all parameters, factors included. Counts of detectors are those of the backbone, as in
the paper: neck and heads train as well. LoRA and LieRA have the same count, for it does not depend on the update; PISSA and
MiLoRA too, for it does not depend on where factors start. Left out are the 100 % of full fine-tuning in Table 4, and the
methods of others in Table 3 (Series, Parallel).
"""
import argparse
import contextlib
import functools
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence
from unittest import mock

import torch
from torch import nn

import liera_mm  # before MMDetection, which may need the operators that liera_mm stands in for

# isort: split
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from liera_mm.core.targets import KINDS

CONFIGS = Path(__file__).parents[2] / 'configs'
COCO_PREFIX = 'mask-rcnn_convnextv2-b_'
VTAB_CLASSES = 100  # Table 1 has one count for 19 tasks; CIFAR-100's head comes closest
Q_K_V_UP_DOWN = tuple(f'*.{name}_proj' for name in ('q', 'k', 'v', 'up', 'down'))  # Table 9


class Row(NamedTuple):
    """A count of the paper or of a config.

    Attributes:
        table: Number of the paper's table or figure; ``ours`` for what the paper does not have.
        row: Name of the row there.
        model: Config, or model, that is counted.
        trainable: Its trainable parameters, None if its package is not installed.
        total: All its parameters, factors included, or None.
        paper: The paper's figure, in ``unit``; None if it has none.
        unit: ``M`` for millions, ``%`` for a share of all parameters.
        note: Why ours and the paper's differ, and what else there is to know.
    """
    table: str
    row: str
    model: str
    trainable: Optional[int]
    total: Optional[int]
    paper: Optional[float]
    unit: str
    note: str = ''

    @property
    def ours(self) -> Optional[float]:
        """Our count in ``unit``, rounded as the paper's."""
        if self.trainable is None:
            return None
        return round(self.trainable / 1e6 if self.unit == 'M' else 100 * self.trainable / self.total, 2)

    @property
    def difference(self) -> Optional[float]:
        """Ours minus the paper's, in ``unit``; None if one of the two is missing."""
        return None if None in (self.ours, self.paper) else round(self.ours - self.paper, 2)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """A context in which modules get parameters of the meta device: shapes alone."""
    # ConvNeXt reads values of this one while it is built
    linspace = functools.partial(torch.linspace, device='cpu')
    with mock.patch.object(torch, 'linspace', linspace), torch.device('meta'):
        yield


def size(model: nn.Module) -> int:
    return liera_mm.summary(model).total


# Table 1


def convnext_classifier(**backbone) -> nn.Module:
    """ConvNeXt-B with a linear head, for the classes of CIFAR-100; by default version 2, which has GRN, not layer scale."""
    backbone = {**dict(use_grn=True, layer_scale_init_value=0.), **backbone}
    with DefaultScope.overwrite_default_scope('mmpretrain'), without_memory():
        return MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='ConvNeXt', arch='base', **backbone),
                head=dict(type='LinearClsHead', in_channels=1024, num_classes=VTAB_CLASSES)))


def classification_rows() -> List[Row]:
    """ConvNeXt-V2-B on VTAB-1k: stem, downsampling and depthwise convolutions are adapted, pointwise ones are not."""
    name = f'ConvNeXt-V2-B, {VTAB_CLASSES} classes'
    rows = []
    for rank, paper in ((2, 1.90), (4, 3.70), (8, 7.30), (16, 14.48)):
        model = convnext_classifier()
        liera_mm.adapt(model.backbone, rank=rank, targets=['conv', 'depthwise'])
        counts, factors, head = liera_mm.summary(model), liera_mm.summary(model.backbone).trainable, size(model.head)
        note = f'factors {factors:,} + head {head:,}'
        if rank >= 8:
            note += '; no size of the head gives both 7.30 at r=8 and 14.48 at r=16'
        rows.append(Row('1', f'LoRA, LieRA r={rank}', name, counts.trainable, counts.total, paper, 'M', note))
    full, without_grn = size(convnext_classifier()), convnext_classifier(use_grn=False, layer_scale_init_value=1e-6)
    backbone = size(without_grn.backbone)
    note = (f'{(backbone + factors + head) / 1e6:.2f} = ConvNeXt-B with layer scale instead of GRN {backbone:,} '
            f'+ r=16 factors {factors:,} + head {head:,}: a sum that fits, the paper gives none')
    return [Row('1', 'Fully FT', name, full, full, 102.05, 'M', note), *rows]


# Tables 2, 6 and 7

# What follows the prefix in the name of a config: table and row in the paper, and its count
DETECTION = {
    'full': ('2', 'Fully FT', 104.97),
    'lora_r16': ('2', 'LoRA r=16', 17.27),
    'lora_r32': ('2', 'LoRA r=32', 34.54),
    'liera_r16': ('2', 'LieRA r=16', 17.27),
    'liera_r32': ('2', 'LieRA r=32', 34.54),
    'liera-exp_r16': ('6', 'without TA', None),
    'pissa_r16': ('7', 'PISSA r=16', None),
    'pissa-liera_r16': ('7', 'PISSA+Ours', None),
    'dora_r16': ('7', 'DoRA r=16', None),
    'dora-liera_r16': ('7', 'DoRA+Ours', None),
}


def config_backbone(path: Path) -> nn.Module:
    """The backbone of a config's detector."""
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), without_memory():
        return MODELS.build(cfg.model.backbone)


def detection_rows(configs: Path = CONFIGS) -> List[Row]:
    """A row for every config in a folder, in the paper or not."""
    counts = {path.stem: liera_mm.summary(config_backbone(path)) for path in sorted(configs.glob('*.py'))}
    rows = []
    for name, count in counts.items():
        table, row, paper = DETECTION.get(name.replace(COCO_PREFIX, ''), ('ours', '', None))
        note = ''
        if row == 'Fully FT':
            factors = counts[COCO_PREFIX + 'liera_r16'].trainable
            note = (f'{(count.total + factors) / 1e6:.2f} = backbone {count.total:,} + r=16 factors {factors:,}, '
                    'which full fine-tuning does not have')
        rows.append(Row(table, row, name, count.trainable, count.total, paper, 'M', note))
    return rows


# Tables 3 and 4, Figure 2


def deberta_v3(hidden_size: int, layers: int) -> nn.Module:
    """DeBERTa-v3 without a head for classification, which the paper does not count."""
    from transformers import DebertaV2Config, DebertaV2Model
    config = DebertaV2Config(
        vocab_size=128100,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=512,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd='layer_norm',
        share_att_key=True,
        pos_att_type=['p2c', 'c2p'],
        position_biased_input=False)
    with without_memory():
        return DebertaV2Model(config)


def llama(vocab_size: int, intermediate_size: int, key_value_heads: int) -> nn.Module:
    """A language model of 32 layers of width 4096."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=intermediate_size,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=False)
    with without_memory():
        return LlamaForCausalLM(config)


def sdxl_unet() -> nn.Module:
    """The denoising network of Stable Diffusion XL."""
    from diffusers import UNet2DConditionModel
    with without_memory():
        return UNet2DConditionModel(
            sample_size=128,
            down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'),
            up_block_types=('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type='text_time',
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)


class Network(NamedTuple):
    """A network of another package: how to build it, and the targets that the paper names."""
    build: Callable[[], nn.Module]
    targets: Sequence[str]


NETWORKS: Dict[str, Network] = {
    'LLaMA-7B': Network(functools.partial(llama, 32000, 11008, 32), Q_K_V_UP_DOWN),
    'LLaMA3-8B': Network(functools.partial(llama, 128256, 14336, 8), Q_K_V_UP_DOWN),
    'DeBERTaV3-base': Network(functools.partial(deberta_v3, 768, 12), ('linear', )),
    'DeBERTaV3-large': Network(functools.partial(deberta_v3, 1024, 24), ('linear', )),
    'SDXL UNet': Network(sdxl_unet, KINDS),
}
# Table, row, network, rank, the paper's figure, note; {frozen} stands for the factors as % of the frozen parameters
SHARES = [
    ('3', 'LoRA, LieRA r=16', 'LLaMA-7B', 16, .42,
     '{frozen:.2f} % of the frozen parameters; no one definition of the share gives all of Table 3'),
    ('3', 'LoRA, LieRA r=32', 'LLaMA-7B', 32, .83, ''),
    ('3', 'LoRA, LieRA r=16', 'LLaMA3-8B', 16, .35, ''),
    ('3', 'LoRA, LieRA, PISSA, MiLoRA r=32', 'LLaMA3-8B', 32, .70, '{frozen:.2f} % of the frozen parameters'),
    ('4', 'LoRA, LieRA r=2', 'DeBERTaV3-base', 2, .18, ''),
    ('4', 'LoRA, LieRA r=8', 'DeBERTaV3-base', 8, .72, ''),
    ('4', 'LoRA, LieRA r=2', 'DeBERTaV3-large', 2, .20, ''),
    ('4', 'LoRA, LieRA r=8', 'DeBERTaV3-large', 8, .80,
     '{frozen:.2f} % of the frozen parameters; the paper has four times the rounded 0.20 % of r=2'),
    ('Fig. 2', 'LieRA', 'SDXL UNet', 16, None, 'the paper gives neither rank nor count; here r=16'),
]


def share_rows() -> List[Row]:
    """The networks of transformers and diffusers, with empty counts where these packages are not installed."""
    rows = []
    for table, row, name, rank, paper, note in SHARES:
        network = NETWORKS[name]
        try:
            model = network.build()
        except ModuleNotFoundError as error:
            rows.append(Row(table, row, name, None, None, paper, '%', f'{error.name} is not installed'))
            continue
        counts = liera_mm.summary(liera_mm.adapt(model, rank=rank, targets=network.targets))
        note = note.format(frozen=100 * counts.trainable / (counts.total - counts.trainable))
        rows.append(Row(table, row, name, counts.trainable, counts.total, paper, '%', note))
    return rows


def all_rows() -> List[Row]:
    """Every row, in the order of the paper's tables."""
    return sorted(classification_rows() + detection_rows() + share_rows(), key=lambda row: row.table)


def as_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with a line that counts how many agree."""
    cells = [('table', 'row', 'config or model', 'trainable', 'total', 'ours', 'paper', 'difference', 'note')]
    for row in rows:
        counts = ['-' if count is None else f'{count:,}' for count in (row.trainable, row.total)]
        figures = ['-' if figure is None else f'{figure:.2f} {row.unit}' for figure in (row.ours, row.paper)]
        difference = '-' if row.difference is None else f'{row.difference:+.2f}' if row.difference else '0'
        cells.append((row.table, row.row, row.model, *counts, *figures, difference, row.note))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join(cell.rjust(width) if 3 <= i <= 7 else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in cells]
    compared = [row for row in rows if row.difference is not None]
    agreeing = sum(row.difference == 0 for row in compared)
    lines.append(f'{agreeing} of the {len(compared)} figures that were compared agree to the last digit printed')
    return '\n'.join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(as_table(all_rows()))


if __name__ == '__main__':
    main()
