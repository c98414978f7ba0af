"""Memory that the launches of one call of attention work in beside its inputs and outputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kvkernels.triton_kernels.counters import zeroed_counters

# The kernel arguments that point into scratch memory.
SCRATCH_NAMES = ("partial_out_ptr", "partial_lse_ptr", "num_splits_ptr", "counters_ptr")


@dataclass(frozen=True)
class Scratch:
    """How much of it there is, known from shapes.

    In one piece but for the counters, since an allocation takes as long as half a launch::

        out  [num_rows, max_splits, value_dim], fp32 | lse  [num_rows, max_splits], fp32
        | num_splits  [num_rows], int32

    Attributes:
        num_rows: Heads of all tokens; 0 where nothing is split.
        max_splits: Splits of a row that there is room for.
        value_dim: Elements of a partial result.
        num_counters: int32 that are zero before and after the launches.
    """

    num_rows: int
    max_splits: int
    value_dim: int
    num_counters: int

    @functools.cached_property
    def _starts(self) -> tuple[int, int]:
        """Where log-sum-exps and counts begin, in elements: at multiples of 16 bytes."""
        num_partials = self.num_rows * self.max_splits
        lse_start = _round_up(num_partials * self.value_dim)
        return lse_start, lse_start + _round_up(num_partials)

    @functools.cached_property
    def _num_elements(self) -> int:
        return self._starts[1] + self.num_rows

    def allocate(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The piece and the counters, on the device of `tensor`."""
        return (
            tensor.new_empty(self._num_elements, dtype=torch.float32),
            zeroed_counters(self.num_counters, tensor),
        )

    def views(
        self, piece: torch.Tensor, counters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `allocate` gave, as the arguments of `SCRATCH_NAMES`."""
        num_partials = self.num_rows * self.max_splits
        lse_start, counts_start = self._starts
        return (
            piece[: num_partials * self.value_dim],
            piece[lse_start : lse_start + num_partials],
            piece[counts_start:].view(torch.int32),
            counters,
        )

    def addresses(self, piece: torch.Tensor, counters: torch.Tensor) -> tuple[int, ...]:
        """Those of `views`, without making them."""
        start = piece.data_ptr()
        lse_start, counts_start = self._starts
        return start, start + 4 * lse_start, start + 4 * counts_start, counters.data_ptr()


def _round_up(num_elements: int) -> int:
    return -(-num_elements // 4) * 4
