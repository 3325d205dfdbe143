"""Where the time of a training step goes, for tools/benchmark.py: kernels, operators, and waits for the device."""
import statistics
import warnings
from collections import Counter
from typing import Any, Callable, Dict, List, Tuple

from benchmark_variants import Variant, batch

from liera_mm.models import LieRAConvNeXt

# isort: split
import torch
import torchvision
from mmcv.ops import sigmoid_focal_loss
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from torch import Tensor, nn

# Of the kernels of the fast blocks: how often a training step passes a tensor of the block's width through memory, where
# the hidden one counts for four
PASSES = dict(
    _depthwise=5, _depthwise_weight_grad=2, _layer_norm=2, _layer_norm_grad=4, _gelu=16, _gelu_grad=12, _residual=3)


def ceilings() -> Dict[str, float]:
    """What the card can do at best: TB/s of a copy, read and written, and TFLOP/s of a matrix product in half precision."""
    a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.float16) for _ in range(2))
    big = torch.empty(2**31, dtype=torch.uint8, device='cuda')
    other = torch.empty_like(big)
    return {'TB/s': 2 * big.numel() / _seconds(lambda: other.copy_(big)) / 1e12,
            'TFLOP/s': 2 * 8192**3 / _seconds(lambda: a @ b) / 1e12}


def _seconds(call: Callable[[], Any]) -> float:
    """Median over twenty calls, on the card."""
    times = []
    for _ in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times[3:])


def floors(arch: str, images: int, size: int, ceilings: Dict[str, float]) -> Dict[str, float]:
    """Least milliseconds that the kernels of the fast blocks need: their bytes in half precision, or operations.

    The six matrix products of a block and step multiply N·H·W tokens of C and 4·C channels.
    """
    settings = LieRAConvNeXt.arch_settings[arch]
    numbers = operations = 0
    for stage, (depth, channels) in enumerate(zip(settings['depths'], settings['channels'])):
        tokens = images * (size // (4 << stage))**2
        numbers += depth * tokens * channels
        operations += depth * 6 * 2 * tokens * channels * 4 * channels
    result = {name: 1000 * 2 * passes * numbers / (1e12 * ceilings['TB/s']) for name, passes in PASSES.items()}
    return dict(result, **{'matrix products': 1000 * operations / (1e12 * ceilings['TFLOP/s'])})


def kernels(names: List[str], arch: str, rank: int, images: int, size: int) -> Dict[str, Dict[str, List[float]]]:
    """For each variant, by kernel: milliseconds and launches of a step on the card."""
    data, result = batch(images, size), {}
    for name in names:
        variant = Variant(name, arch, rank, size)
        for _ in range(3):
            variant.repeat(data)
        result[name] = on_card(variant, data)
        del variant
    return result


def on_card(variant: Variant, data: Dict[str, Any]) -> Dict[str, List[float]]:
    """By kernel: milliseconds and launches of a step on the card, whatever the host takes; from three steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            variant.repeat(data)
    averages = [event for event in profile.key_averages() if event.self_device_time_total and '#' not in event.key]
    return {event.key: [event.self_device_time_total / 3000, event.count / 3] for event in averages}


def operator_calls(images: int, size: int, dtype: torch.dtype,
                   device: str) -> Dict[str, Tuple[List[Tensor], Callable[..., Tensor], Callable[..., Tensor]]]:
    """Inputs for mmcv's operators, what these are here, and what torch or torchvision has.

    The logits of RetinaNet's anchors, and an encoder layer of Deformable DETR, on images of this size.
    """
    anchors = images * 9 * sum((size // stride)**2 for stride in (8, 16, 32, 64, 128))
    logits = torch.randn(anchors, 80, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 81, (anchors, ), device=device)
    one_hot = nn.functional.one_hot(target, 81)[:, :80].to(dtype)
    shapes = [(size // stride, size // stride) for stride in (8, 16, 32, 64)]
    sizes = torch.tensor(shapes, device=device)
    starts, keys = sizes.prod(1).cumsum(0) - sizes.prod(1), sum(height * width for height, width in shapes)
    attention = [torch.rand(images, keys, 8, *rest, device=device, dtype=dtype, requires_grad=True)
                 for rest in ((32, ), (4, 4, 2), (4, 4))]  # values, where to look, and with what weights
    return {
        'sigmoid_focal_loss': ([logits], lambda x: sigmoid_focal_loss(x, target, 2., .25, None, 'sum'),
                               lambda x: torchvision.ops.sigmoid_focal_loss(x, one_hot, .25, 2., 'sum')),
        'ms_deform_attn': (attention,
                           lambda value, *rest: MultiScaleDeformableAttnFunction.apply(value, sizes, starts, *rest, 64),
                           lambda value, *rest: multi_scale_deformable_attn_pytorch(value, shapes, *rest)),
    }


def operators(images: int, size: int) -> Dict[str, List[float]]:
    """Milliseconds, forward and backward, of mmcv's operators as they are here, and of torch's or torchvision's."""
    result = {}
    for dtype in (torch.float32, torch.float16):
        for name, (inputs, *calls) in operator_calls(images, size, dtype, 'cuda').items():
            result[f'{name}, {str(dtype)[6:]}'] = [1000 * _seconds(
                lambda call=call, inputs=inputs: torch.autograd.grad(call(*inputs).sum(), inputs)) for call in calls]
    return result


def waits(names: List[str], arch: str, rank: int, images: int, size: int) -> Dict[str, Dict[str, int]]:
    """For each variant, how often the host waits for the device in a step, by the line of Python that has it wait."""
    data, result = batch(images, size), {}
    for name in names:
        variant = Variant(name, arch, rank, size)
        for _ in range(2):
            variant.repeat(data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            variant.repeat(data)
            torch.cuda.set_sync_debug_mode('default')
        lines = Counter(f'{each.filename}:{each.lineno}' for each in caught if 'synchronizing' in str(each.message))
        result[name] = dict(lines.most_common())
        del variant
    return result
