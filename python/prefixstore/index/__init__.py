"""The prefix index: a radix tree over token ids; no tensors, no input or output."""

from prefixstore.index.radix import Match, Outline, RadixIndex, Run, Stats

__all__ = ["Match", "Outline", "RadixIndex", "Run", "Stats"]
