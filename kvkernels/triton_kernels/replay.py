"""Launches that are remembered: the second call of a kind costs a fraction of the first.

At each launch Triton looks at every argument of a kernel to find which compiled kernel is meant,
and before that the launch must have been planned. Both follow from a call's signature alone, so
they are kept by it, and a call like one before only fills in addresses::

    signature   layouts and alignments of the call's tensors, and its numbers
        |
    Replay      compiled kernels, grids, and arguments with places for addresses
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from kvkernels.signatures import MAX_SIGNATURES, Signature, layouts
from kvkernels.triton_kernels.launch import Launch, current_device_of, run
from kvkernels.triton_kernels.scratch import SCRATCH_NAMES

# Besides the dtype, Triton compiles for whether an address is a multiple of this.
_ALIGNMENT = 16


def addresses(tensors: Sequence[torch.Tensor | None]) -> tuple[int, ...]:
    """Where each tensor begins; 0 for one that is not there."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def signature(
    tensors: Sequence[torch.Tensor | None], pointers: Sequence[int], numbers: Signature
) -> Signature:
    """All that the plan and the compiled kernel of a call depend on, as a key.

    More than Triton specialises on: it asks whether a size or a stride is 1 or a multiple of 16,
    and this holds each number itself. What a call allocates, its outputs among it, is left out: its
    layout follows from the call's, and allocators of CUDA memory align it.

    Args:
        tensors: Of the call, in a fixed order; None for one that is not there.
        pointers: Their `addresses`.
        numbers: All else that the plan is made from.
    """
    return (numbers, layouts(tensors), tuple([pointer % _ALIGNMENT for pointer in pointers]))


class _Repeat:
    """One launch that has run, to run again with other addresses."""

    def __init__(self, launch: Launch, compiled: CompiledKernel, names: Sequence[str]) -> None:
        self._launch = compiled[(*launch.grid, 1, 1)[:3]]
        # Tensors are replaced by addresses: keeping them would keep their memory.
        self._arguments: list[Any] = []
        # For each argument that is one address: the argument's index, and the address's.
        self._places: list[tuple[int, int]] = []
        # For each argument that is a tuple: its index, the addresses' indices, and the rest of the
        # tuple.
        self._tuples: list[tuple[int, slice, tuple[Any, ...]]] = []
        for index, name in enumerate(launch.kernel.arg_names):
            value = launch.arguments[name]
            if count := _num_tensors(value):
                first = names.index(name)
                if isinstance(value, tuple):
                    self._tuples.append((index, slice(first, first + count), value[count:]))
                else:
                    self._places.append((index, first))
                value = None
            self._arguments.append(value)

    def run(self, pointers: tuple[int, ...]) -> None:
        arguments = self._arguments.copy()
        for index, place in self._places:
            arguments[index] = pointers[place]
        for index, places, rest in self._tuples:
            arguments[index] = (*pointers[places], *rest)
        self._launch(*arguments)


def _num_tensors(argument: Any) -> int:
    """How many tensors a kernel's argument begins with."""
    parts = argument if isinstance(argument, tuple) else (argument,)
    return sum(isinstance(part, torch.Tensor) for part in parts)


class Replay:
    """The launches of a call, to run again on other tensors of the same signature."""

    def __init__(
        self, launches: Sequence[Launch], kernels: Sequence[CompiledKernel], names: Sequence[str]
    ) -> None:
        self._scratch = launches[0].scratch
        names = (*names, *SCRATCH_NAMES)
        self._repeats = [
            _Repeat(launch, kernel, names) for launch, kernel in zip(launches, kernels, strict=True)
        ]

    def run(self, pointers: tuple[int, ...], tensor: torch.Tensor) -> None:
        """Queue the launches on the current stream of the device that holds `tensor`.

        Args:
            pointers: Addresses of the call's tensors and outputs, in the order of their names.
            tensor: One of them.
        """
        with current_device_of(tensor):
            if self._scratch is not None:
                # Bound to a name so that it lives until all launches are queued
                memory = self._scratch.allocate(tensor)
                pointers += self._scratch.addresses(*memory)
            for repeat in self._repeats:
                repeat.run(pointers)


class Replays:
    """The launches of one op, by signature.

    Attributes:
        names: Which argument of the kernels each of the call's tensors is, then each output; of a
            tuple, once for each tensor that it begins with.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._replays: dict[Signature, Replay] = {}

    def clear(self) -> None:
        """Forget all, where what plans are made from has changed: a table, in tuning."""
        self._replays.clear()

    def find(self, signature: Signature) -> Replay | None:
        """The launches of a call like this one; None if they must be planned."""
        return None if _is_watched() else self._replays.get(signature)

    def run(self, signature: Signature, launches: Sequence[Launch], tensor: torch.Tensor) -> None:
        """Queue launches on the device that holds `tensor`, and remember them."""
        kernels = run(launches, tensor)
        # `run` returns something else where kernels are interpreted or compiled in the background.
        if not _is_watched() and all(isinstance(kernel, CompiledKernel) for kernel in kernels):
            if len(self._replays) >= MAX_SIGNATURES:
                self._replays.clear()
            self._replays[signature] = Replay(launches, kernels, self.names)


def _is_watched() -> bool:
    """Whether Triton is told to compile other kernels than usual: it then looks at each launch."""
    knobs = triton.knobs
    return bool(
        knobs.runtime.debug
        or getattr(knobs.compilation, "instrumentation_mode", "")  # since Triton 3.6
        or getattr(knobs.runtime, "add_stages_inspection_hook", None)
    )
