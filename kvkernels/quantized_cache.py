"""Quantised blocks beside the pool: 8- or 4-bit codes with their scales.

A full block never changes, so it can be quantised while the tail of its sequence, and the newest
blocks, stay as they are. One block table names blocks of all kinds: the two bits above an id tell
the kind::

    bit   31   30   29 28   27 .. 0
           0    0   kind    block id within the pool of that kind      kind 0 float, 1 int8, 2 int4
"""

from __future__ import annotations

from typing import NamedTuple

import torch

KIND_SHIFT = 28
KINDS = {"float": 0, "int8": 1, "int4": 2}
MAX_BLOCKS_OF_A_KIND = 1 << KIND_SHIFT


class QuantizedCache(NamedTuple):
    """One layer's quantised blocks. An element is ``minimum + scale * code``.

    Codes are unsigned: int8 has one a byte, 0 to 255; int4 has two, 0 to 15, channel j in the low
    half of byte j and channel ``j + head_dim / 2`` in the high half. Keys share a scale along
    tokens, channel by channel (a channel of a key may lie far from zero, in all tokens alike);
    values along channels, token by token.

    Attributes:
        key_codes: ``[num_blocks, num_kv_heads, block_size, head_dim]``, uint8; half as wide for
            int4.
        key_scales: ``[num_blocks, num_kv_heads, key_groups, head_dim, 2]``, float16: scale and
            minimum of each channel of ``block_size / key_groups`` neighbouring tokens.
        value_codes: Like ``key_codes``.
        value_scales: ``[num_blocks, num_kv_heads, block_size, value_groups, 2]``, float16: scale
            and minimum of each ``head_dim / value_groups`` neighbouring channels of a token.

    All but the first two dimensions are dense.
    """

    key_codes: torch.Tensor
    key_scales: torch.Tensor
    value_codes: torch.Tensor
    value_scales: torch.Tensor


def tag_blocks(block_ids: torch.Tensor, kind: str) -> torch.Tensor:
    """Block-table entries for blocks of a kind.

    Args:
        block_ids: int32, ids within the pool of that kind, 0 to 2**28 - 1.
        kind: "float", "int8" or "int4".

    Raises:
        ValueError: If the kind is unknown or the ids are not int32.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {tuple(KINDS)}, got {kind!r}")
    if block_ids.dtype != torch.int32:
        raise ValueError(f"block_ids: expected dtype torch.int32, got {block_ids.dtype}")
    return block_ids | (KINDS[kind] << KIND_SHIFT)
