"""Which tokens a forward pass computes and where they lie, as arrays of any or of fixed shapes.

::

    of each token     token, position, slot                   slots: of each layer group
    of each sequence  length, row of the block table          tables: of each layer group
    a decode pass of a fixed shape, here of 4 rows and 2 blocks, with 3 sequences:
        token  position  length  block table  slot
        81     12        13      4  1         1 * block_size + 4
        7      4         5       2  -1        ...
        3      1         2       7  -1        ...
        0      0         0      -1  -1        -1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvkernels.nn.module import PagedBatch

# A decode pass has a power of two of rows up to this many, then a multiple of it.
_ROW_STEP = 8
# The narrowest block table, in blocks, and by how much each next width is wider. A table wider than
# needed costs programs that end at once; every width costs graphs of its own.
_NARROWEST, _WIDENING = 32, 4


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    Attributes:
        tokens: ``[num_new]``, uint32.
        start: Position of the first.
        tables: ``[num_groups, num_blocks]``, int32: the sequence's blocks.
        wants_logits: Whether the token after them is to be chosen.
    """

    tokens: np.ndarray
    start: int
    tables: np.ndarray
    wants_logits: bool

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.tokens)


class DecodeShape(NamedTuple):
    """Of a pass with one new token a sequence.

    Attributes:
        num_seqs: Sequences there is room for.
        num_blocks: Blocks of each that there is room for.
    """

    num_seqs: int
    num_blocks: int

    @classmethod
    def holding(cls, arrays: Sequence[np.ndarray]) -> DecodeShape:
        """The smallest of the fixed shapes for what `lay_out` made of chunks of one token each."""
        num_seqs, num_blocks = arrays[4].shape  # a block table
        if num_seqs <= _ROW_STEP:
            rows = 1 << (num_seqs - 1).bit_length()
        else:
            rows = -(-num_seqs // _ROW_STEP) * _ROW_STEP
        width = _NARROWEST
        while width < num_blocks:
            width *= _WIDENING
        return cls(rows, width)


def lay_out(chunks: Sequence[Chunk], num_groups: int, block_size: int) -> list[np.ndarray]:
    """What a pass over the chunks is given.

    Args:
        chunks: At least one, none empty.
        num_groups: Of layers.
        block_size: Tokens in a block.

    Returns:
        Tokens and positions ``[num_tokens]``, int64; lengths ``[num_seqs]`` and the running sum of
        the numbers of new tokens ``[num_seqs + 1]``, int32; and of each group its block table
        ``[num_seqs, num_blocks]``, int32, and slots ``[num_tokens]``, int64.
    """
    lengths = [len(chunk.tokens) for chunk in chunks]
    tokens = np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int64)
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
    seq_lens = np.array([chunk.stop for chunk in chunks], dtype=np.int32)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    arrays: list[np.ndarray] = [tokens, positions, seq_lens, bounds]
    widths = -(-seq_lens // block_size)
    rows = np.repeat(np.arange(len(chunks)), lengths)
    blocks, offsets = np.divmod(positions, block_size)
    for group in range(num_groups):
        table = np.full((len(chunks), int(widths.max())), -1, dtype=np.int32)
        for row, (chunk, width) in enumerate(zip(chunks, widths.tolist(), strict=True)):
            table[row, :width] = chunk.tables[group, :width]
        arrays += [table, table[rows, blocks].astype(np.int64) * block_size + offsets]
    return arrays


def pad_decode(arrays: Sequence[np.ndarray], shape: DecodeShape) -> list[np.ndarray]:
    """What `lay_out` made of chunks of one token each, without the running sum, in a fixed shape.

    A row that nobody has is a sequence of no tokens, whose new one is stored nowhere: it reads and
    writes nothing of the pool.
    """
    tokens, positions, seq_lens, _, *own = arrays
    rows = (shape.num_seqs,)
    padded = [_grow(tokens, rows, 0), _grow(positions, rows, 0), _grow(seq_lens, rows, 0)]
    for table, slots in zip(own[::2], own[1::2], strict=True):
        padded += [_grow(table, shape, -1), _grow(slots, rows, -1)]
    return padded


def idle_decode(num_groups: int, shape: DecodeShape) -> list[np.ndarray]:
    """`pad_decode` of no chunks at all."""
    tokens, lengths = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    own: list[np.ndarray] = [np.empty((0, 0), dtype=np.int32), tokens]
    return pad_decode([tokens, tokens, lengths, lengths, *own * num_groups], shape)


def _grow(array: np.ndarray, shape: tuple[int, ...], fill: int) -> np.ndarray:
    grown = np.full(shape, fill, dtype=array.dtype)
    grown[tuple(slice(length) for length in array.shape)] = array
    return grown


def make_batches(
    seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None, own: Sequence[torch.Tensor]
) -> list[PagedBatch]:
    """Of each group, from its table and slots in `own`."""
    return [
        PagedBatch(table, seq_lens, cu_seqlens_q, slots)
        for table, slots in zip(own[::2], own[1::2], strict=True)
    ]
