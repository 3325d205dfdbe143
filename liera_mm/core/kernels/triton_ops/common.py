"""What the kernels of several operators share."""
import functools

import torch
import triton
import triton.language as tl

# Triton's own cdiv() and next_power_of_2() take longer on the host than a kernel on the device


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 4


@triton.jit
def sum_parts(at, stride, parts, mask, BJ: tl.constexpr):
    total = tl.zeros((BJ, ), tl.float32)
    for _ in range(parts):
        total += tl.load(at, mask, other=0.)
        at += stride
    return total
