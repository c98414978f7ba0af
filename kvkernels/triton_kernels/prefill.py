"""Attention for any number of queries a sequence: prefill, extend and mixed batches.

The queries of all sequences lie one after another. A program takes `TILE_Q` of one sequence's
tokens, for the query heads of one key-value head, and finds out on the device whose they are::

    cu_seqlens_q   0           5     7              TILE_Q = 4
    tokens         a a a a a   b b   c c c c
    programs       0       1   2     3 (and 4, with nothing to do)

Sequence s owns the programs from `cu_seqlens_q[s] // TILE_Q + s` up to the first of sequence s + 1:
always enough, and the grid, `num_tokens // TILE_Q + num_seqs`, needs only shapes.

Where so few programs would leave most of the device idle, as with a short question after a long
document, the cached tokens are split as well. A second kernel joins the splits: a program has too
many rows to join them as the last one of decode.py does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.calls import CHANGING, INDEX_TENSORS, Call
from kvkernels.triton_kernels.configs import TileConfig, prefill_config, prefill_tiles
from kvkernels.triton_kernels.launch import Device, Launch
from kvkernels.triton_kernels.parts import load_parts, store_parts, zeros
from kvkernels.triton_kernels.rules import tree_depths
from kvkernels.triton_kernels.runs import attend_cache
from kvkernels.triton_kernels.splits import (
    MAX_SPLITS,
    Partials,
    count_query_splits,
    plan_join,
    shortest_split,
)
from kvkernels.triton_kernels.tiles import finish, start_rows

# With `batch_invariant`, the tile is chosen as for this many query rows of a sequence.
_INVARIANT_ROWS = 64


@triton.jit
def _find_sequence(cu_seqlens_q_ptr, num_seqs, program, TILE_Q: tl.constexpr):
    """The last sequence whose first program is not after `program`, by binary search."""
    low = 0
    high = num_seqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_after = tl.load(cu_seqlens_q_ptr + middle) // TILE_Q + middle > program
        low = tl.where(is_after, low, middle)
        high = tl.where(is_after, middle - 1, high)
    return low


@triton.jit(
    do_not_specialize=["max_splits", "num_programs_at_once", *CHANGING],
    do_not_specialize_on_alignment=INDEX_TENSORS,
)
def _prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, head_dim]
    float_cache,  # pointers and strides; see `Call`
    int8_cache,  # or None
    int4_cache,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    out_ptr,  # [num_tokens, num_heads, VALUE_DIM], contiguous
    lse_ptr,  # [num_tokens, num_heads], contiguous
    partial_out_ptr,  # [num_tokens, num_heads, max_splits, VALUE_DIM], fp32
    partial_lse_ptr,  # [num_tokens, num_heads, max_splits], natural logarithm
    num_splits_ptr,  # [num_tokens, num_heads], is written
    sinks_ptr,  # [num_heads], or None
    slopes_ptr,  # [num_heads], or None
    tree_mask_ptr,  # [num_tokens], or None
    num_seqs,
    num_heads,
    max_splits,
    num_programs_at_once,
    sm_scale,
    soft_cap,
    window,
    stride_query_token,
    stride_query_head,
    stride_table,
    GROUP: tl.constexpr,  # query heads to a key-value head
    GROUP_TILE: tl.constexpr,  # of which one program takes this many
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
    RULES: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
    HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    TILE_Q: tl.constexpr = TILE_M // GROUP_TILE
    HEAD_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    # In reverse order: under a causal mask the last tokens have the most work, so they start first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    seq = _find_sequence(cu_seqlens_q_ptr, num_seqs, program, TILE_Q)
    first_token = tl.load(cu_seqlens_q_ptr + seq)
    num_queries = tl.load(cu_seqlens_q_ptr + seq + 1) - first_token
    first_query = (program - (first_token // TILE_Q + seq)) * TILE_Q
    if first_query >= num_queries:
        return
    seq_len = tl.load(seq_lens_ptr + seq)
    # int64: a sequence, token or block times a stride overflows int32 on large batches and caches.
    seq = seq.to(tl.int64)

    # Tokens that any row of the program sees, and those that all rows see.
    before = seq_len - num_queries  # position of the sequence's first query
    first_position = before + first_query
    last_position = before + tl.minimum(first_query + TILE_Q, num_queries) - 1
    hi = seq_len
    all_hi = seq_len
    if tree_mask_ptr is not None:
        first_position = before
        last_position = seq_len - 1
        all_hi = tl.maximum(before, 0)
    elif IS_CAUSAL:
        hi = tl.maximum(last_position + 1, 0)
        all_hi = tl.maximum(first_position + 1, 0)
    lo = 0
    all_lo = 0
    if HAS_WINDOW:
        lo = tl.maximum(first_position - window + 1, 0)
        all_lo = tl.maximum(last_position - window + 1, 0)
    first_tile = lo // TILE_N
    last_tile = (hi + TILE_N - 1) // TILE_N
    # Between these two no row needs a mask.
    full_first = tl.minimum((all_lo + TILE_N - 1) // TILE_N, last_tile)
    full_last = tl.maximum(all_hi // TILE_N, full_first)
    split = 0
    num_splits = 1
    if IS_SPLIT:
        split = tl.program_id(2)
        num_tiles = last_tile - first_tile
        # The cheap test first: most programs of a short sequence end here.
        if split > 0 and split * MIN_SPLIT_TILES >= num_tiles:
            return
        num_splits, tiles_per_split = count_query_splits(
            cu_seqlens_q_ptr,
            seq_lens_ptr,
            num_seqs,
            num_tiles,
            tl.num_programs(1),
            num_programs_at_once,
            max_splits,
            TILE_Q,
            TILE_N,
            MIN_SPLIT_TILES,
        )
        if split >= num_splits:
            return
        first_tile += split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, last_tile)
        full_first = tl.minimum(tl.maximum(full_first, first_tile), last_tile)
        full_last = tl.minimum(tl.maximum(full_last, first_tile), last_tile)

    # Row r is token r // GROUP_TILE and head r % GROUP_TILE of the tile.
    row = tl.arange(0, TILE_M)
    queries = first_query + row // GROUP_TILE
    kv_head = tl.program_id(1) // HEAD_TILES
    first_head = tl.program_id(1) % HEAD_TILES * GROUP_TILE
    group_heads = first_head + row % GROUP_TILE
    keep = (row < TILE_Q * GROUP_TILE) & (queries < num_queries) & (group_heads < GROUP)
    tokens = (first_token + queries).to(tl.int64)
    heads = kv_head * GROUP + group_heads
    query_rows = tokens * stride_query_token + heads.to(tl.int64) * stride_query_head
    q = load_parts(query_ptr, query_rows, keep, KEY_PARTS, True, "")
    acc = zeros(TILE_M, VALUE_PARTS)
    row_max, row_sum = start_rows(sinks_ptr, heads, keep, split, TILE_M)
    slopes = 0
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads, mask=keep, other=0.0) * 1.4426950408889634
    positions = before + queries
    trees = 0
    tree_ptr = 0
    row_hi = tl.zeros([TILE_M], tl.int32) + seq_len
    if tree_mask_ptr is not None:
        tree_ptr = tree_mask_ptr + first_token
        trees = tl.load(tree_ptr + queries, mask=keep, other=0)
        positions = before + tree_depths(trees, queries, num_queries)
    elif IS_CAUSAL:
        row_hi = positions + 1
    # Lower than any position: a tree's tokens may have negative ones, where a sequence is shorter
    # than its new tokens.
    row_lo = tl.full([TILE_M], -(1 << 30), tl.int32)
    if HAS_WINDOW:
        row_lo = positions - window + 1

    table_ptr = block_table_ptr + seq * stride_table
    # Phases. 0: tiles at the window's edge; 1: tiles that all rows see, without masks; 2: tiles at
    # the causal edge and the end of the sequence. Quantised blocks go through phase 2 alone: masks
    # cost little beside decoding codes, and a loop for each phase and kind would multiply the
    # kernel's size.
    IS_QUANTIZED: tl.constexpr = int8_cache is not None or int4_cache is not None
    for phase in tl.static_range(2 if IS_QUANTIZED else (0 if HAS_WINDOW else 1), 3):
        begin = first_tile if phase == 0 else (full_first if phase == 1 else full_last)
        end = full_first if phase == 0 else (full_last if phase == 1 else last_tile)
        if IS_QUANTIZED:
            begin = first_tile
        acc, row_max, row_sum = attend_cache(
            q, acc, row_max, row_sum, begin, end,
            (row_lo, row_hi, positions, slopes, trees), lo, hi,
            sm_scale * 1.4426950408889634, (soft_cap, before, num_queries, tree_ptr),
            float_cache, int8_cache, int4_cache, kv_head.to(tl.int64), table_ptr,
            BLOCK_SIZE, KEY_PARTS, VALUE_PARTS, IS_LATENT, HAS_FLOAT8,
            INT8_LAYOUT, INT4_LAYOUT, TILE_N, TILE_N, phase != 1, RULES, "",
        )  # fmt: skip

    norm, lse = finish(row_max, row_sum)
    out_rows = tokens * num_heads + heads
    if num_splits == 1:
        store_parts(out_ptr, out_rows * VALUE_DIM, keep, acc, norm, VALUE_PARTS)
        if HAS_LSE:
            tl.store(lse_ptr + out_rows, lse, mask=keep)
    else:
        partial = out_rows * max_splits + split
        store_parts(partial_out_ptr, partial * VALUE_DIM, keep, acc, norm, VALUE_PARTS)
        tl.store(partial_lse_ptr + partial, lse, mask=keep)
    if IS_SPLIT and split == 0:
        tl.store(num_splits_ptr + out_rows, num_splits, mask=keep)


def _max_splits(
    call: Call, config: TileConfig, min_split_tiles: int, num_programs: int, at_once: int
) -> int:
    """Splits that the grid has room for: 1 where the programs of one would fill the device."""
    max_tokens = call.block_table.shape[1] * call.block_size
    if call.scoring.window:
        max_tokens = min(max_tokens, call.scoring.window + call.query.shape[0])
    # Splitting needs registers that codes and rules, with this many rows, have not left.
    is_full = config.tile_m > 64 and (call.is_heavy or call.is_float8)
    if call.batch_invariant or is_full or num_programs > at_once:
        return 1
    max_splits = min(
        MAX_SPLITS,
        triton.cdiv(max_tokens, min_split_tiles * config.tile_n),
        # Twice, since some programs may have no queries and leave room for more splits of the
        # others.
        triton.cdiv(2 * at_once, num_programs),
    )
    return max(1, max_splits)  # also for a table without blocks


def _max_registers(call: Call, tile_m: int, is_split: bool) -> int | None:
    """Where the assembler's own choice spills; see `Launch`."""
    is_small_float32 = call.query.dtype == torch.float32 and tile_m == 16
    return 255 if call.is_heavy or is_split or is_small_float32 else None


def plan_prefill(call: Call, out: torch.Tensor, lse: torch.Tensor, device: Device) -> list[Launch]:
    """The launches for queries that `cu_seqlens_q` deals out; an empty `lse` is not written."""
    query, num_seqs = call.query, call.seq_lens.shape[0]
    num_tokens, num_heads, _ = query.shape
    num_rows = triton.cdiv(num_tokens, num_seqs) * call.group
    rows_per_multiprocessor: int | None = num_tokens * num_heads // device.num_multiprocessors
    if call.batch_invariant:
        num_rows, rows_per_multiprocessor = _INVARIANT_ROWS, None
    config = call.fit_tile(
        prefill_config(
            device.arch, query.dtype, call.width, num_rows, call.is_heavy, rows_per_multiprocessor
        )
    )
    group_tile = min(call.group, config.tile_m)
    tile_q = config.tile_m // group_tile
    grid = (
        num_tokens // tile_q + num_seqs,
        call.num_kv_heads * triton.cdiv(call.group, group_tile),
    )
    at_once = device.num_multiprocessors
    min_split_tiles = shortest_split(config.tile_m, config.tile_n, call)
    max_splits = _max_splits(call, config, min_split_tiles, grid[0] * grid[1], at_once)
    partials = Partials.like(out, max_splits)
    prefill = Launch(
        _prefill_kernel,
        (*grid, max_splits),
        {
            "cu_seqlens_q_ptr": call.cu_seqlens_q,
            "out_ptr": out,
            "lse_ptr": lse,
            "partial_out_ptr": partials.out,
            "partial_lse_ptr": partials.lse,
            "num_splits_ptr": partials.num_splits,
            "num_seqs": num_seqs,
            "num_heads": num_heads,
            "max_splits": max_splits,
            "num_programs_at_once": at_once,
            **call.arguments(config, device),
            "GROUP_TILE": group_tile,
            "IS_CAUSAL": call.scoring.causal,
            "MIN_SPLIT_TILES": min_split_tiles,
            "HAS_LSE": lse.numel() > 0,
            "IS_SPLIT": max_splits > 1,
        },
        config.num_warps,
        config.num_stages,
        max_registers=_max_registers(call, config.tile_m, max_splits > 1),
        scratch=partials.scratch,
    )
    return [prefill] if max_splits == 1 else [prefill, plan_join(call, partials, out, lse)]


def query_counts(call: Call, device: Device) -> list[int]:
    """Numbers of queries with which one sequence like those of `call` comes to every tile, and
    there to splits if it ever does.

    A tile serves more rows than the one before it has. The fewest take the fewest programs, and so
    are the likeliest to be split; but behind a window it also takes tokens enough for two splits.
    """
    counts, rows = set(), 0
    for tile in prefill_tiles(device.arch, call.query.dtype, call.width, call.is_heavy):
        config = call.fit_tile(tile)
        fewest = rows // call.group + 1
        counts.add(fewest)
        if call.scoring.window:
            tokens = shortest_split(config.tile_m, config.tile_n, call) * config.tile_n
            counts.add(max(fewest, tokens - call.scoring.window + 1))
        rows = config.tile_m
    return sorted(counts)
