"""Attention for one query a sequence: the cached tokens are split over programs, then combined.

::

    sequence   [ tile 0 | tile 1 | ... | tile n - 1 ]      one key-value head of one sequence
    splits     [ split 0      ][ split 1      ][ .. ]      one program each
    partials     out, log-sum  , out, log-sum , ...        fp32, joined in split order

The grid has room for `max_splits` splits and is made from shapes alone, so a captured graph stays
right when lengths change. How many are used is decided on the device, from all lengths; the
programs of the rest exit at once. A sequence with one split is written directly; of several, the
program that ends last joins the partials, in the order of the splits whoever is last. Where they
are too many for one program, as of latent attention or for one warp, a second kernel joins them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.calls import CHANGING, INDEX_TENSORS, Call
from kvkernels.triton_kernels.configs import TileConfig, decode_config
from kvkernels.triton_kernels.launch import Device, Launch
from kvkernels.triton_kernels.parts import load_parts, store_parts, zeros
from kvkernels.triton_kernels.runs import attend_cache
from kvkernels.triton_kernels.splits import (
    MAX_SPLITS,
    Partials,
    arrive,
    count_splits,
    count_tiles,
    join_splits,
    plan_join,
    shortest_split,
    tile_of_join,
)
from kvkernels.triton_kernels.tiles import finish, start_rows

# With `batch_invariant`, splits have this fixed length in tokens instead of one that fits the
# batch.
_INVARIANT_SPLIT_TOKENS = 2048
# Programs in the grid, as a multiple of those that run at once. More balance very unequal lengths
# better, but each superfluous one still has to start and exit.
_GRID_FACTOR = 8
# A split's result may have this many elements for the last program to join all of them; above it a
# second kernel does.
_MAX_JOIN_ELEMENTS = 2048


@triton.jit(
    do_not_specialize=["max_splits", "num_programs_at_once", *CHANGING],
    do_not_specialize_on_alignment=INDEX_TENSORS,
)
def _decode_kernel(
    query_ptr,  # [num_seqs, num_heads, head_dim]
    float_cache,  # pointers and strides; see `Call`
    int8_cache,  # or None
    int4_cache,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, VALUE_DIM], contiguous
    lse_ptr,  # [num_seqs, num_heads], contiguous
    partial_out_ptr,  # [num_seqs, num_heads, max_splits, VALUE_DIM], fp32
    partial_lse_ptr,  # [num_seqs, num_heads, max_splits], natural logarithm
    counters_ptr,  # [num_seqs, programs of a sequence's split]: splits that have ended; zero
    num_splits_ptr,  # [num_seqs, num_heads], is written for the kernel that joins
    sinks_ptr,  # [num_heads], or None
    slopes_ptr,  # [num_heads], or None
    tree_mask_ptr,  # [num_seqs], or None
    num_seqs,
    max_splits,
    num_programs_at_once,
    sm_scale,
    soft_cap,
    window,
    stride_query_token,
    stride_query_head,
    stride_table,
    GROUP: tl.constexpr,  # query heads to a key-value head
    BLOCK_SIZE: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    IS_LATENT: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    INT8_LAYOUT: tl.constexpr,  # see `CodesLayout`
    INT4_LAYOUT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    FLOAT_TILE_N: tl.constexpr,  # of floats among codes; divides TILE_N
    MIN_SPLIT_TILES: tl.constexpr,
    SPLIT_TILES: tl.constexpr,  # length of a split, or 0 to find it from all lengths
    JOIN_SPLITS: tl.constexpr,  # splits and rows that are joined in one step
    JOIN_ROWS: tl.constexpr,  # 0: another kernel joins
    RULES: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    # One program: one split of the cache for up to TILE_M query heads of one key-value head.
    HEAD_TILES: tl.constexpr = (GROUP + TILE_M - 1) // TILE_M
    kv_head = tl.program_id(1) // HEAD_TILES
    head_tile = tl.program_id(1) % HEAD_TILES
    # int64: a sequence or block times a stride overflows int32 on large batches and caches.
    seq = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)

    seq_len = tl.load(seq_lens_ptr + seq)
    first_tile, num_tiles = count_tiles(seq_len, window, TILE_N, HAS_WINDOW)
    num_splits = 1
    last_tile = first_tile + num_tiles
    if IS_SPLIT:
        # The cheap test first: most programs of a short sequence end here.
        if split > 0 and split * MIN_SPLIT_TILES >= num_tiles:
            return
        num_splits, tiles_per_split = count_splits(
            seq_lens_ptr,
            num_seqs,
            num_tiles,
            tl.num_programs(1),
            num_programs_at_once,
            max_splits,
            window,
            TILE_N,
            HAS_WINDOW,
            MIN_SPLIT_TILES,
            SPLIT_TILES,
        )
        if split >= num_splits:
            return
        first_tile += split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, last_tile)

    rows = head_tile * TILE_M + tl.arange(0, TILE_M)
    is_head = rows < GROUP
    heads = kv_head * GROUP + rows
    query_rows = seq * stride_query_token + heads.to(tl.int64) * stride_query_head
    q = load_parts(query_ptr, query_rows, is_head, KEY_PARTS, True, "")
    acc = zeros(TILE_M, VALUE_PARTS)
    row_max, row_sum = start_rows(sinks_ptr, heads, is_head, split, TILE_M)

    lo = 0
    if HAS_WINDOW:
        lo = tl.maximum(seq_len - window, 0)
    hi = seq_len
    if tree_mask_ptr is not None:
        # Bit 0 of its mask: whether the token sees itself
        hi -= 1 - (tl.load(tree_mask_ptr + seq) & 1)
    every_row = tl.zeros([TILE_M], tl.int32)
    slopes = 0
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=is_head, other=0.0) * 1.4426950408889634
    acc, row_max, row_sum = attend_cache(
        q,
        acc,
        row_max,
        row_sum,
        first_tile,
        last_tile,
        (every_row + lo, every_row + hi, every_row + (seq_len - 1), slopes, 0),
        lo,
        hi,
        sm_scale * 1.4426950408889634,
        (soft_cap, 0, 0, 0),
        float_cache,
        int8_cache,
        int4_cache,
        kv_head.to(tl.int64),
        block_table_ptr + seq * stride_table,
        BLOCK_SIZE,
        KEY_PARTS,
        VALUE_PARTS,
        IS_LATENT,
        HAS_FLOAT8,
        INT8_LAYOUT,
        INT4_LAYOUT,
        TILE_N,
        FLOAT_TILE_N,
        True,
        RULES,
        # Read once: leave the L2 to what is read again.
        "evict_first",
    )

    norm, lse = finish(row_max, row_sum)
    first_row = seq * (GROUP * (tl.num_programs(1) // HEAD_TILES)) + kv_head * GROUP
    out_rows = first_row + rows
    if num_splits == 1:
        store_parts(out_ptr, out_rows * VALUE_DIM, is_head, acc, norm, VALUE_PARTS)
        if HAS_LSE:
            tl.store(lse_ptr + out_rows, lse, mask=is_head)
    else:
        partial = out_rows * max_splits + split
        store_parts(partial_out_ptr, partial * VALUE_DIM, is_head, acc, norm, VALUE_PARTS)
        tl.store(partial_lse_ptr + partial, lse, mask=is_head)
        if JOIN_ROWS > 0:
            counter_ptr = counters_ptr + seq * tl.num_programs(1) + tl.program_id(1)
            if arrive(counter_ptr, num_splits):
                for first in range(0, tl.minimum(GROUP - head_tile * TILE_M, TILE_M), JOIN_ROWS):
                    joined = head_tile * TILE_M + first + tl.arange(0, JOIN_ROWS)
                    join_splits(
                        partial_out_ptr,
                        partial_lse_ptr,
                        out_ptr,
                        lse_ptr,
                        first_row + joined,
                        joined < tl.minimum(GROUP, (head_tile + 1) * TILE_M),
                        num_splits,
                        num_splits,
                        max_splits,
                        VALUE_DIM,
                        JOIN_SPLITS,
                        JOIN_ROWS,
                        HAS_LSE,
                    )
    if IS_SPLIT and JOIN_ROWS == 0 and split == 0:
        tl.store(num_splits_ptr + out_rows, num_splits, mask=is_head)


def _limit_splits(
    config: TileConfig,
    device: Device,
    num_seqs: int,
    num_groups: int,
    max_tokens: int,
    min_split_tiles: int,
) -> tuple[int, int]:
    """Splits that the grid has room for, and programs that run at once."""
    at_once = device.num_multiprocessors * config.programs_per_multiprocessor
    max_splits = min(
        MAX_SPLITS,
        triton.cdiv(max_tokens, config.tile_n * min_split_tiles),
        triton.cdiv(at_once, num_groups),  # even one sequence alone cannot use more
        triton.cdiv(_GRID_FACTOR * at_once, num_seqs * num_groups),
    )
    return max(1, max_splits), at_once


def plan_decode(call: Call, out: torch.Tensor, lse: torch.Tensor, device: Device) -> list[Launch]:
    """The launches for one query a sequence; `lse` of no elements is not written."""
    query, scoring = call.query, call.scoring
    num_seqs = query.shape[0]
    group, value_dim = call.group, call.value_dim
    config = call.fit_tile(
        decode_config(
            device.arch, query.dtype, call.width, group, call.is_quantized, call.is_float8
        )
    )
    num_groups = call.num_kv_heads * triton.cdiv(group, config.tile_m)
    max_tokens = call.block_table.shape[1] * call.block_size
    if scoring.window:
        max_tokens = min(max_tokens, scoring.window + config.tile_n)
    num_rows = min(group, config.tile_m)
    split_tiles = 0
    min_split_tiles = shortest_split(num_rows, config.tile_n, call)
    max_splits, at_once = _limit_splits(
        config, device, num_seqs, num_groups, max_tokens, min_split_tiles
    )
    if call.batch_invariant:
        split_tiles = min_split_tiles = _INVARIANT_SPLIT_TOKENS // config.tile_n
        max_splits = max(1, triton.cdiv(max_tokens, _INVARIANT_SPLIT_TOKENS))
    splits_of_join, rows_of_join = tile_of_join(value_dim, num_rows)
    # For a single warp, joining many splits would take as long as attending to one.
    joins_itself = config.num_warps > 1 and num_rows * value_dim <= _MAX_JOIN_ELEMENTS
    partials = Partials.like(
        out, max_splits, num_seqs * num_groups if max_splits > 1 and joins_itself else 0
    )
    decode = Launch(
        _decode_kernel,
        (num_seqs, num_groups, max_splits),
        {
            "query_ptr": query,
            "out_ptr": out,
            "lse_ptr": lse,
            "partial_out_ptr": partials.out,
            "partial_lse_ptr": partials.lse,
            "num_splits_ptr": partials.num_splits,
            "counters_ptr": partials.counters,
            "num_seqs": num_seqs,
            "max_splits": max_splits,
            "num_programs_at_once": at_once,
            **call.arguments(config, device),
            # A single warp has registers for a full tile of codes, but not of floats.
            "FLOAT_TILE_N": min(config.tile_n, 16) if config.num_warps == 1 else config.tile_n,
            # No tree rule: with one query a sequence, only bit 0 of the mask matters, and `hi`
            # takes it in.
            "RULES": (*call.rules[:2], False, call.scales_last),
            "MIN_SPLIT_TILES": min_split_tiles,
            "SPLIT_TILES": split_tiles,
            "JOIN_SPLITS": splits_of_join,
            "JOIN_ROWS": rows_of_join if joins_itself else 0,
            "HAS_LSE": lse.numel() > 0,
            "IS_SPLIT": max_splits > 1,
        },
        config.num_warps,
        config.num_stages,
        max_registers=255 if call.is_quantized or call.is_float8 else None,
        scratch=partials.scratch,
    )
    if max_splits == 1 or joins_itself:
        return [decode]
    return [decode, plan_join(call, partials, out, lse)]
