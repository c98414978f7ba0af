"""The device's best rates: copies within its memory, and matrix products."""

from functools import cache, partial
from typing import Any

import torch

from bench.gpu.events import time_calls

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


@cache
def _copy_bytes_per_us() -> float:
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device="cuda")
    copy = partial(torch.empty_like(source).copy_, source)
    copy()
    return 2 * COPY_BYTES / time_calls([copy])


@cache
def _matmul_flops_per_us(dtype: torch.dtype) -> float:
    # Random numbers, since products of zeros take less power and so run at a higher clock.
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype) for _ in "ab")
    multiply = partial(torch.matmul, a, b, out=torch.empty_like(a))
    for _ in range(10):
        multiply()
    return 2 * MATMUL_SIZE**3 / time_calls([multiply])


def copy_rate() -> dict[str, float]:
    """Gigabytes a second of a copy within device memory, read and written; measured once."""
    return {"gbytes_per_s": _copy_bytes_per_us() / 1e3}


@torch.inference_mode()
def matmul_rate(dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """10^12 operations a second of a product of square matrices; measured once for a dtype."""
    return {"tflops": _matmul_flops_per_us(dtype) / 1e6}


def find_floor(num_bytes: int, num_flops: int, dtype: torch.dtype) -> dict[str, Any]:
    """The least time of a kernel at the measured rates, and which of them bounds it."""
    with torch.inference_mode():
        floors = {
            "copy": num_bytes / _copy_bytes_per_us(),
            "matmul": num_flops / _matmul_flops_per_us(dtype),
        }
    bound = max(floors, key=floors.__getitem__)
    return {"floor_us": floors[bound], "floor_by": bound}
