"""A kernel launch as a value: what to run, on which grid, with which arguments and options.

Planning a launch needs only shapes, so `aot.py` plans on tensors without storage and compiles
exactly what a GPU would be given.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvkernels.triton_kernels.scratch import Scratch


@dataclass(frozen=True)
class Device:
    """What launch configurations depend on.

    Attributes:
        arch: Major compute capability: 8 Ampere, 9 Hopper, 10 Blackwell.
        num_multiprocessors: Programs are spread over these.
    """

    arch: int
    num_multiprocessors: int


# What kernels are tuned for in the interpreter: Hopper's tiles, but few multiprocessors, since
# programs run one after another.
_INTERPRETED_DEVICE = Device(arch=9, num_multiprocessors=4)


@dataclass(frozen=True)
class Launch:
    """One kernel on one grid.

    Attributes:
        kernel: A function decorated with `triton.jit`.
        grid: Number of programs along each axis.
        arguments: By name, compile-time constants included.
        num_warps: Warps of 32 threads in a program.
        num_stages: Tiles in flight in a pipelined loop.
        max_registers: Of a thread; None leaves the number to the assembler, which now and then
            spills a few bytes to stay at a round one.
        fp_fusion: Whether a product and a sum may be rounded once, together; not where every
            processor must find the same bits.
        scratch: What of the arguments is memory to work in; all launches of a call share it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None
    fp_fusion: bool = True
    scratch: Scratch | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; fusion too, whose default changes in Triton 3.10."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            "maxnreg": self.max_registers,
        }


@functools.cache
def _device_of_index(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.major, properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The device that holds `tensor`; for a CPU tensor a small Hopper, which is interpreted."""
    if tensor.is_cuda:
        return _device_of_index(tensor.get_device())
    return _INTERPRETED_DEVICE


def current_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the device that holds `tensor` the current one, where it is not already."""
    # Asking for the current device takes a tenth of the time that the guard takes.
    if not tensor.is_cuda or torch.cuda.current_device() == tensor.get_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def run(launches: Sequence[Launch], tensor: torch.Tensor) -> list[Any]:
    """Queue the launches, in order, on the current stream of the device that holds `tensor`.

    Returns:
        The compiled kernels; nothing useful where kernels are interpreted.
    """
    with current_device_of(tensor):
        return [
            launch.kernel[launch.grid](**launch.arguments, **launch.options) for launch in launches
        ]


def largest_power_of_2(value: int) -> int:
    """The largest power of two that is at most `value`, which is positive."""
    return 1 << (value.bit_length() - 1)


def cut_row(
    width: int, in_halves: bool, least: int = 16, most: int | None = None
) -> tuple[tuple[int, int, int], ...]:
    """Parts of a row of `width` channels: the first channel, a power of two that is at least
    `least`, and the channel after the last.

    Tiles must be powers of two: 80 = 64 + 16, 96 = 64 + 32 and 192 = 128 + 64 waste nothing, where
    one tile would be 128 or 256 wide. In halves, as bytes of two 4-bit codes have it, a part of the
    first is followed by the same part of the second; there, four narrow products take more
    registers than two with some channels of zeros. Of `most`, a power of two, none is wider.
    """
    half = width // 2 if in_halves else width
    main = max(least, largest_power_of_2(half))
    if half == main:
        cuts = [(0, main)]
    elif half < least or (in_halves and half <= 128):
        cuts = [(0, max(least, triton.next_power_of_2(half)))]
    else:
        cuts = [(0, main), (main, max(least, triton.next_power_of_2(half - main)))]
    if most is not None:
        cuts = [(first + i, min(size, most)) for first, size in cuts for i in range(0, size, most)]
    starts = (0, half) if in_halves else (0,)
    return tuple((start + first, size, start + half) for first, size in cuts for start in starts)
