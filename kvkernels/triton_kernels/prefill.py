"""Attention for any number of queries a sequence: prefill, extend and mixed batches.

The queries of all sequences lie one after another. A program takes `TILE_Q` of one sequence's
tokens, for the query heads of one key-value head, and finds out on the device whose they are::

    cu_seqlens_q   0           5     7              TILE_Q = 4
    tokens         a a a a a   b b   c c c c
    programs       0       1   2     3 (and 4, with nothing to do)

Sequence s owns the programs from `cu_seqlens_q[s] // TILE_Q + s` up to the first of sequence s + 1:
always enough, and the grid, `num_tokens // TILE_Q + num_seqs`, needs only shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.configs import prefill_config
from kvkernels.triton_kernels.launch import Device, Launch, split_head_dim
from kvkernels.triton_kernels.tiles import attend, finish, load_rows, store_rows


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
    do_not_specialize=["num_seqs", "stride_table", "window"],
    do_not_specialize_on_alignment=["cu_seqlens_q_ptr", "seq_lens_ptr", "block_table_ptr"],
)
def _prefill_kernel(
    query_ptr,  # [num_tokens, num_heads, HEAD_DIM]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, HEAD_DIM]
    value_cache_ptr,
    block_table_ptr,  # [num_seqs, max_blocks_per_seq]
    seq_lens_ptr,  # [num_seqs]
    cu_seqlens_q_ptr,  # [num_seqs + 1]
    out_ptr,  # [num_tokens, num_heads, HEAD_DIM], contiguous
    lse_ptr,  # [num_tokens, num_heads], contiguous
    num_seqs,
    num_heads,
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
    GROUP_TILE: tl.constexpr,  # of which one program takes this many
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    TILE_Q: tl.constexpr = TILE_M // GROUP_TILE
    HEAD_TILES: tl.constexpr = (GROUP + GROUP_TILE - 1) // GROUP_TILE
    # Backwards: under a causal mask the last tokens have the most to do, so they start first.
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

    # Row r is token r // GROUP_TILE and head r % GROUP_TILE of the tile.
    rows = tl.arange(0, TILE_M)
    queries = first_query + rows // GROUP_TILE
    kv_head = tl.program_id(1) // HEAD_TILES
    group_heads = tl.program_id(1) % HEAD_TILES * GROUP_TILE + rows % GROUP_TILE
    keep = (rows < TILE_Q * GROUP_TILE) & (queries < num_queries) & (group_heads < GROUP)
    tokens = (first_token + queries).to(tl.int64)
    heads = kv_head * GROUP + group_heads
    query_rows = tokens * stride_query_token + heads.to(tl.int64) * stride_query_head
    q = load_rows(query_ptr, query_rows, keep, 0, HEAD_MAIN, HEAD_DIM, True, "")
    acc = tl.zeros([TILE_M, HEAD_MAIN], tl.float32)
    q_tail = q
    acc_tail = acc
    if HEAD_TAIL > 0:
        q_tail = load_rows(query_ptr, query_rows, keep, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, True, "")
        acc_tail = tl.zeros([TILE_M, HEAD_TAIL], tl.float32)

    # Tokens a row sees, then those that any and those that all rows of the program see.
    before = seq_len - num_queries  # position of the sequence's first query
    first_position = before + first_query
    last_position = before + tl.minimum(first_query + TILE_Q, num_queries) - 1
    row_lo = tl.zeros([TILE_M], tl.int32)
    row_hi = row_lo + seq_len
    lo = 0
    hi = seq_len
    all_lo = 0
    all_hi = seq_len
    if IS_CAUSAL:
        row_hi = before + queries + 1
        hi = tl.maximum(last_position + 1, 0)
        all_hi = tl.maximum(first_position + 1, 0)
    if HAS_WINDOW:
        row_lo = before + queries - window + 1
        lo = tl.maximum(first_position - window + 1, 0)
        all_lo = tl.maximum(last_position - window + 1, 0)
    first_tile = lo // TILE_N
    last_tile = (hi + TILE_N - 1) // TILE_N
    # Between these two no row needs a mask.
    full_first = tl.minimum((all_lo + TILE_N - 1) // TILE_N, last_tile)
    full_last = tl.maximum(all_hi // TILE_N, full_first)

    key_ptr = key_cache_ptr + kv_head.to(tl.int64) * stride_key_head
    value_ptr = value_cache_ptr + kv_head.to(tl.int64) * stride_value_head
    table_ptr = block_table_ptr + seq * stride_table
    row_max = tl.full([TILE_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    # 0: the window's edge; 1: seen by all rows; 2: the causal edge and the end of the sequence.
    for phase in tl.static_range(0 if HAS_WINDOW else 1, 3):
        begin = first_tile if phase == 0 else (full_first if phase == 1 else full_last)
        end = full_first if phase == 0 else (full_last if phase == 1 else last_tile)
        acc, acc_tail, row_max, row_sum = attend(
            q,
            q_tail,
            acc,
            acc_tail,
            row_max,
            row_sum,
            begin,
            end,
            row_lo,
            row_hi,
            lo,
            hi,
            sm_scale,
            key_ptr,
            value_ptr,
            stride_key_block,
            stride_key_slot,
            stride_value_block,
            stride_value_slot,
            table_ptr,
            BLOCK_SIZE,
            HEAD_DIM,
            HEAD_MAIN,
            HEAD_TAIL,
            TILE_N,
            phase != 1,
            "",
        )

    norm, lse = finish(row_max, row_sum)
    out_index = tokens * num_heads + heads
    store_rows(out_ptr, out_index * HEAD_DIM, keep, acc * norm[:, None], 0, HEAD_MAIN, HEAD_DIM)
    if HEAD_TAIL > 0:
        acc_tail *= norm[:, None]
        store_rows(out_ptr, out_index * HEAD_DIM, keep, acc_tail, HEAD_MAIN, HEAD_TAIL, HEAD_DIM)
    if HAS_LSE:
        tl.store(lse_ptr + out_index, lse, mask=keep)


def plan_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sm_scale: float,
    causal: bool,
    window: int,
    device: Device,
) -> list[Launch]:
    """The launch for queries that `cu_seqlens_q` deals out; `lse` of no elements is not written."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_seqs = seq_lens.shape[0]
    group = num_heads // num_kv_heads
    num_rows = triton.cdiv(num_tokens, num_seqs) * group
    config = prefill_config(device.arch, query.dtype, head_dim, num_rows)
    group_tile = min(group, config.tile_m)
    tile_q = config.tile_m // group_tile
    main, tail = split_head_dim(head_dim)
    prefill = Launch(
        _prefill_kernel,
        (num_tokens // tile_q + num_seqs, num_kv_heads * triton.cdiv(group, group_tile)),
        {
            "query_ptr": query,
            "key_cache_ptr": key_cache,
            "value_cache_ptr": value_cache,
            "block_table_ptr": block_table,
            "seq_lens_ptr": seq_lens,
            "cu_seqlens_q_ptr": cu_seqlens_q,
            "out_ptr": out,
            "lse_ptr": lse,
            "num_seqs": num_seqs,
            "num_heads": num_heads,
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
            "GROUP_TILE": group_tile,
            "BLOCK_SIZE": block_size,
            "HEAD_DIM": head_dim,
            "HEAD_MAIN": main,
            "HEAD_TAIL": tail,
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "IS_CAUSAL": causal,
            "HAS_WINDOW": window > 0,
            "HAS_LSE": lse.numel() > 0,
        },
        config.num_warps,
        config.num_stages,
    )
    return [prefill]
