"""Attention for one query a sequence: the cached tokens are split over programs, then combined.

::

    sequence   [ tile 0 | tile 1 | ... | tile n - 1 ]      one key-value head of one sequence
    splits     [ split 0      ][ split 1      ][ .. ]      one program each
    partials     out, log-sum  , out, log-sum , ...        fp32, joined in split order

The grid has room for `max_splits` splits and is made from shapes alone, so a captured graph stays
right when lengths change. How many are used is decided on the device, from all lengths; the
programs of the rest exit at once. A sequence with one split is written directly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.configs import TileConfig, decode_config
from kvkernels.triton_kernels.launch import Device, Launch, split_head_dim
from kvkernels.triton_kernels.tiles import attend, finish, load_rows, store_rows

# A split shorter than this costs more to combine than it gains.
_MIN_SPLIT_TILES = 2
# The combine kernel holds one weight a split in registers.
_MAX_SPLITS = 128
# Programs in the grid, as a multiple of those that run at once. More serve very unequal lengths
# better, but each one that is not needed still has to start and exit.
_GRID_FACTOR = 8


@triton.jit
def _count_tiles(seq_len, window, TILE_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First tile in reach of the newest token, and the number of tiles from there to the end."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0) // TILE_N
    return first, (seq_len + TILE_N - 1) // TILE_N - first


@triton.jit
def _tiles_per_split(
    seq_lens_ptr,
    num_seqs,
    num_tiles,  # of this sequence
    num_groups,
    num_programs_at_once,
    max_splits,
    window,
    TILE_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
):
    """Length of a split: the work of all sequences over the programs that run at once, and 10 %.

    The 10 % keep a slightly unequal batch from spilling into a second round.
    """
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_seqs, 128):
        seqs = first + tl.arange(0, 128)
        lens = tl.load(seq_lens_ptr + seqs, mask=seqs < num_seqs, other=0)
        _, tiles = _count_tiles(lens, window, TILE_N, HAS_WINDOW)
        total += tl.sum(tiles)
    tenths = num_programs_at_once * 10
    share = tl.cast((total * num_groups * 11 + tenths - 1) // tenths, tl.int32)
    fit = (num_tiles + max_splits - 1) // max_splits
    return tl.maximum(tl.maximum(share, fit), MIN_SPLIT_TILES)


_SHAPES_THAT_CHANGE = [
    "num_seqs",
    "max_splits",
    "stride_table",
    "window",
    "num_programs_at_once",
]
_INDEX_TENSORS = ["seq_lens_ptr", "block_table_ptr"]


@triton.jit(do_not_specialize=_SHAPES_THAT_CHANGE, do_not_specialize_on_alignment=_INDEX_TENSORS)
def _decode_kernel(
    query_ptr,  # [num_seqs, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    value_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM], contiguous
    lse_ptr,  # [num_seqs, num_heads], contiguous
    partial_out_ptr,  # [num_seqs, num_heads, max_splits, HEAD_DIM], fp32
    partial_lse_ptr,  # [num_seqs, num_heads, max_splits], natural logarithm
    num_splits_ptr,  # [num_seqs]
    num_seqs,
    max_splits,
    num_programs_at_once,
    sm_scale,
    window,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_head,
    stride_key_slot,
    stride_value_block,
    stride_value_head,
    stride_value_slot,
    stride_table,
    GROUP: tl.constexpr,  # query heads to a key-value head
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
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
    first_tile, num_tiles = _count_tiles(seq_len, window, TILE_N, HAS_WINDOW)
    num_splits = 1
    last_tile = first_tile + num_tiles
    if IS_SPLIT:
        # The cheap test first: most programs of a short sequence end here.
        if split > 0 and split * MIN_SPLIT_TILES >= num_tiles:
            return
        tiles_per_split = _tiles_per_split(
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
        )
        num_splits = tl.maximum((num_tiles + tiles_per_split - 1) // tiles_per_split, 1)
        if split >= num_splits:
            return
        first_tile += split * tiles_per_split
        last_tile = tl.minimum(first_tile + tiles_per_split, last_tile)
        if split == 0 and tl.program_id(1) == 0:
            tl.store(num_splits_ptr + seq, num_splits)

    rows = head_tile * TILE_M + tl.arange(0, TILE_M)
    is_head = rows < GROUP
    heads = kv_head * GROUP + rows
    query_rows = seq * stride_query_token + heads.to(tl.int64) * stride_query_head
    q = load_rows(query_ptr, query_rows, is_head, 0, HEAD_MAIN, HEAD_DIM, True, "")
    acc = tl.zeros([TILE_M, HEAD_MAIN], tl.float32)
    q_tail = q
    acc_tail = acc
    if HEAD_TAIL > 0:
        q_tail = load_rows(query_ptr, query_rows, is_head, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, True, "")
        acc_tail = tl.zeros([TILE_M, HEAD_TAIL], tl.float32)

    lo = 0
    if HAS_WINDOW:
        lo = tl.maximum(seq_len - window, 0)
    every_row = tl.zeros([TILE_M], tl.int32)
    kv_head = kv_head.to(tl.int64)
    acc, acc_tail, row_max, row_sum = attend(
        q,
        q_tail,
        acc,
        acc_tail,
        tl.full([TILE_M], -float("inf"), tl.float32),
        tl.zeros([TILE_M], tl.float32),
        first_tile,
        last_tile,
        every_row + lo,
        every_row + seq_len,
        lo,
        seq_len,
        sm_scale,
        key_cache_ptr + kv_head * stride_key_head,
        value_cache_ptr + kv_head * stride_value_head,
        stride_key_block,
        stride_key_slot,
        stride_value_block,
        stride_value_slot,
        block_table_ptr + seq * stride_table,
        BLOCK_SIZE,
        HEAD_DIM,
        HEAD_MAIN,
        HEAD_TAIL,
        TILE_N,
        True,
        # Read once: leave the L2 to what is read again.
        "evict_first",
    )

    norm, lse = finish(row_max, row_sum)
    acc *= norm[:, None]
    if HEAD_TAIL > 0:
        acc_tail *= norm[:, None]
    out_index = seq * (GROUP * (tl.num_programs(1) // HEAD_TILES)) + heads
    if num_splits == 1:
        store_rows(out_ptr, out_index * HEAD_DIM, is_head, acc, 0, HEAD_MAIN, HEAD_DIM)
        if HEAD_TAIL > 0:
            store_rows(
                out_ptr, out_index * HEAD_DIM, is_head, acc_tail, HEAD_MAIN, HEAD_TAIL, HEAD_DIM
            )
        if HAS_LSE:
            tl.store(lse_ptr + out_index, lse, mask=is_head)
    else:
        partial = out_index * max_splits + split
        store_rows(partial_out_ptr, partial * HEAD_DIM, is_head, acc, 0, HEAD_MAIN, HEAD_DIM)
        if HEAD_TAIL > 0:
            store_rows(
                partial_out_ptr,
                partial * HEAD_DIM,
                is_head,
                acc_tail,
                HEAD_MAIN,
                HEAD_TAIL,
                HEAD_DIM,
            )
        tl.store(partial_lse_ptr + partial, lse, mask=is_head)


@triton.jit(do_not_specialize=["max_splits"])
def _combine_kernel(
    partial_out_ptr,  # [num_seqs, num_heads, max_splits, HEAD_DIM], fp32
    partial_lse_ptr,  # [num_seqs, num_heads, max_splits]
    num_splits_ptr,  # [num_seqs]
    out_ptr,  # [num_seqs, num_heads, HEAD_DIM], contiguous
    lse_ptr,  # [num_seqs, num_heads], contiguous
    max_splits,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # next power of two of HEAD_DIM
    TILE_SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    # One program joins the splits of one head of one sequence.
    seq = tl.program_id(0).to(tl.int64)
    num_splits = tl.load(num_splits_ptr + seq)
    if num_splits == 1:  # written directly
        return
    row = seq * tl.num_programs(1) + tl.program_id(1)
    first = row * max_splits

    all_splits = tl.arange(0, MAX_SPLITS)
    all_lses = tl.load(
        partial_lse_ptr + first + all_splits, mask=all_splits < num_splits, other=-float("inf")
    )
    # Finite: a split in use holds at least one visible token.
    largest = tl.max(all_lses, 0)
    total = tl.sum(tl.exp(all_lses - largest), 0)

    channels = tl.arange(0, WIDTH)
    acc = tl.zeros([WIDTH], tl.float32)
    for start in range(0, num_splits, TILE_SPLITS):
        splits = start + tl.arange(0, TILE_SPLITS)
        used = splits < num_splits
        lses = tl.load(partial_lse_ptr + first + splits, mask=used, other=-float("inf"))
        parts = tl.load(
            partial_out_ptr + (first + splits)[:, None] * HEAD_DIM + channels[None, :],
            mask=used[:, None] & (channels[None, :] < HEAD_DIM),
            other=0.0,
        )
        acc += tl.sum(parts * tl.exp(lses - largest)[:, None], 0)
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + channels, out, mask=channels < HEAD_DIM)
    if HAS_LSE:
        tl.store(lse_ptr + row, largest + tl.log(total))


def _count_splits(
    config: TileConfig, device: Device, num_seqs: int, num_groups: int, max_tokens: int
) -> tuple[int, int]:
    """Splits that the grid has room for, and programs that run at once."""
    at_once = device.num_multiprocessors * config.programs_per_multiprocessor
    max_splits = min(
        _MAX_SPLITS,
        triton.cdiv(max_tokens, config.tile_n * _MIN_SPLIT_TILES),
        triton.cdiv(at_once, num_groups),  # one sequence cannot use more
        triton.cdiv(_GRID_FACTOR * at_once, num_seqs * num_groups),
    )
    return max(1, max_splits), at_once


def plan_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sm_scale: float,
    window: int,
    device: Device,
) -> list[Launch]:
    """Launches for one query a sequence; `lse` of no elements is not written."""
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    config = decode_config(device.arch, query.dtype, head_dim, group)
    num_groups = num_kv_heads * triton.cdiv(group, config.tile_m)
    max_tokens = block_table.shape[1] * block_size
    if window:
        max_tokens = min(max_tokens, window + config.tile_n)
    max_splits, at_once = _count_splits(config, device, num_seqs, num_groups, max_tokens)
    is_split = max_splits > 1
    partials = num_seqs * num_heads * max_splits if is_split else 0
    partial_out = query.new_empty(partials * head_dim, dtype=torch.float32)
    partial_lse = query.new_empty(partials, dtype=torch.float32)
    num_splits = query.new_empty(num_seqs if is_split else 0, dtype=torch.int32)
    main, tail = split_head_dim(head_dim)
    decode = Launch(
        _decode_kernel,
        (num_seqs, num_groups, max_splits),
        {
            "query_ptr": query,
            "key_cache_ptr": key_cache,
            "value_cache_ptr": value_cache,
            "block_table_ptr": block_table,
            "seq_lens_ptr": seq_lens,
            "out_ptr": out,
            "lse_ptr": lse,
            "partial_out_ptr": partial_out,
            "partial_lse_ptr": partial_lse,
            "num_splits_ptr": num_splits,
            "num_seqs": num_seqs,
            "max_splits": max_splits,
            "num_programs_at_once": at_once,
            "sm_scale": sm_scale,
            "window": window,
            "stride_query_token": query.stride(0),
            "stride_query_head": query.stride(1),
            "stride_key_block": key_cache.stride(0),
            "stride_key_head": key_cache.stride(1),
            "stride_key_slot": key_cache.stride(2),
            "stride_value_block": value_cache.stride(0),
            "stride_value_head": value_cache.stride(1),
            "stride_value_slot": value_cache.stride(2),
            "stride_table": block_table.stride(0),
            "GROUP": group,
            "BLOCK_SIZE": block_size,
            "HEAD_DIM": head_dim,
            "HEAD_MAIN": main,
            "HEAD_TAIL": tail,
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "MIN_SPLIT_TILES": _MIN_SPLIT_TILES,
            "HAS_WINDOW": window > 0,
            "HAS_LSE": lse.numel() > 0,
            "IS_SPLIT": is_split,
        },
        config.num_warps,
        config.num_stages,
    )
    if not is_split:
        return [decode]
    combine = Launch(
        _combine_kernel,
        (num_seqs, num_heads),
        {
            "partial_out_ptr": partial_out,
            "partial_lse_ptr": partial_lse,
            "num_splits_ptr": num_splits,
            "out_ptr": out,
            "lse_ptr": lse,
            "max_splits": max_splits,
            "HEAD_DIM": head_dim,
            "WIDTH": triton.next_power_of_2(head_dim),
            "TILE_SPLITS": 16,
            "MAX_SPLITS": _MAX_SPLITS,
            "HAS_LSE": lse.numel() > 0,
        },
        num_warps=4,
    )
    return [decode, combine]
