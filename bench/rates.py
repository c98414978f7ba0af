"""The machine's best rates, measured among the runs of a case with as many threads."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from kvkernels import native

READ_BUFFER_BYTES = 256 << 20
# Several buffers: on some machines the rate depends on a buffer's memory, or changes over time.
NUM_READ_BUFFERS = 3
MATMUL_SIZE = 2048


@dataclass(frozen=True)
class Rates:
    """Bytes read and operations done per second.

    Each as the median of all runs and as the best: of the fastest buffer, of the fastest product.
    """

    read: float
    best_read: float
    matmul: float | None = None
    best_matmul: float | None = None


@cache
def _read_buffers(num_bytes: int) -> list[torch.Tensor]:
    # In large pages, like the pools: with small ones some machines read a tenth slower.
    buffers = [
        native.empty_pool((num_bytes // 4,), torch.float32, "cpu") for _ in range(NUM_READ_BUFFERS)
    ]
    return [buffer.fill_(1.0) for buffer in buffers]


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to measure the machine's product rate in, for cases of this dtype.

    PyTorch takes a hundred times as long for 16-bit floats that it has no kernels for: float16 on
    most processors, bfloat16 on those without AVX-512.
    """
    has_kernels = dtype == torch.bfloat16 and "avx512" in native.available_isas()
    return dtype if has_kernels or dtype.itemsize > 2 else torch.float32


@cache
def _matrices(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(size, size).to(dtype) for _ in range(3)]


def make_probes(dtype: torch.dtype | None = None) -> dict[str, Callable[[], Any]]:
    """Probes of the machine, which take turns with the providers of a case.

    `torch.sum` over float32 does nothing but read. With `dtype`, `torch.matmul` of square
    matrices is among them, in that dtype or the one that `matmul_dtype` gives for it.
    """
    probes = {}
    for number, buffer in enumerate(_read_buffers(READ_BUFFER_BYTES)):
        probes[f"read_{number}"] = buffer.sum
    if dtype is not None:
        a, b, out = _matrices(MATMUL_SIZE, matmul_dtype(dtype))
        probes["matmul"] = partial(torch.matmul, a, b, out=out)
    return probes


def rates_of(seconds: Mapping[str, Sequence[float]]) -> Rates:
    """The rates that the runs of the probes among `seconds` showed."""
    buffers = [runs for name, runs in seconds.items() if name.startswith("read_")]
    read_s = statistics.median(second for runs in buffers for second in runs)
    best_read_s = min(statistics.median(runs) for runs in buffers)
    read, best_read = READ_BUFFER_BYTES / read_s, READ_BUFFER_BYTES / best_read_s
    if "matmul" not in seconds:
        return Rates(read, best_read)
    num_flops, products = 2 * MATMUL_SIZE**3, seconds["matmul"]
    return Rates(
        read, best_read, num_flops / statistics.median(products), num_flops / min(products)
    )
