"""How a long sequence is cut into splits, and how their partial results become one again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.calls import Call
from kvkernels.triton_kernels.launch import Launch
from kvkernels.triton_kernels.scratch import Scratch

# A split has at least two tiles and reads at least twice what it writes: shorter ones cost more to
# join than they gain.
_MIN_SPLIT_TILES = 2
_READ_TO_WRITTEN = 2
MAX_SPLITS = 128
# Elements of partial results that a program holds while it joins them.
_JOIN_ELEMENTS = 8192
_JOIN_SPLITS = 16  # joined in one step, at least, for each row


def shortest_split(num_rows: int, tile_n: int, call: Call) -> int:
    """Tiles of the shortest split, of whose result there are so many rows."""
    num_written = 4 * num_rows * call.value_dim
    width = call.query.shape[2] + (0 if call.is_latent else call.value_dim)
    num_read = tile_n * width * call.key_cache.element_size()
    return max(_MIN_SPLIT_TILES, triton.cdiv(_READ_TO_WRITTEN * num_written, num_read))


def tile_of_join(value_dim: int, num_rows: int) -> tuple[int, int]:
    """Splits and rows that are joined in one step, where there are so many rows."""
    parts = max(_JOIN_SPLITS, _JOIN_ELEMENTS // triton.next_power_of_2(value_dim))
    rows = min(triton.next_power_of_2(num_rows), parts // _JOIN_SPLITS)
    return parts // rows, rows


@triton.jit
def count_tiles(seq_len, window, TILE_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """First tile in reach of the newest token, and the number of tiles from there to the end."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(seq_len - window, 0) // TILE_N
    return first, (seq_len + TILE_N - 1) // TILE_N - first


@triton.jit
def count_splits(
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
    SPLIT_TILES: tl.constexpr,  # a fixed length, or 0
):
    """Number of splits of a sequence that asks one query, and their length in tiles.

    Never more than `max_splits`, whatever the length: counters would wait for programs that are not
    there, and be wrong in all later launches.
    """
    if SPLIT_TILES > 0:
        num_splits = tl.minimum((num_tiles + SPLIT_TILES - 1) // SPLIT_TILES, max_splits)
        return tl.maximum(num_splits, 1), SPLIT_TILES
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_seqs, 128):
        seqs = first + tl.arange(0, 128)
        lens = tl.load(seq_lens_ptr + seqs, mask=seqs < num_seqs, other=0)
        _, tiles = count_tiles(lens, window, TILE_N, HAS_WINDOW)
        total += tl.sum(tiles)
    return cut(total * num_groups, num_tiles, num_programs_at_once, max_splits, MIN_SPLIT_TILES)


@triton.jit
def count_query_splits(
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    num_seqs,
    num_tiles,  # that this program's queries see
    num_groups,
    num_programs_at_once,
    max_splits,
    TILE_Q: tl.constexpr,
    TILE_N: tl.constexpr,
    MIN_SPLIT_TILES: tl.constexpr,
):
    """`count_splits` for any number of queries a sequence, `TILE_Q` of which share a program.

    What a causal mask or a window spares is left out of account: the splits are longer for it.
    """
    total = tl.full((), 0, tl.int64)
    for first in range(0, num_seqs, 128):
        seqs = first + tl.arange(0, 128)
        is_seq = seqs < num_seqs
        begins = tl.load(cu_seqlens_q_ptr + seqs, mask=is_seq, other=0)
        ends = tl.load(cu_seqlens_q_ptr + seqs + 1, mask=is_seq, other=0)
        lens = tl.load(seq_lens_ptr + seqs, mask=is_seq, other=0)
        query_tiles = (ends - begins + TILE_Q - 1) // TILE_Q
        total += tl.sum(query_tiles.to(tl.int64) * ((lens + TILE_N - 1) // TILE_N))
    return cut(total * num_groups, num_tiles, num_programs_at_once, max_splits, MIN_SPLIT_TILES)


@triton.jit
def cut(total, num_tiles, num_programs_at_once, max_splits, MIN_SPLIT_TILES: tl.constexpr):
    """Number of splits of some of all tiles, and their length.

    They are as many as have each the share of all that one of the programs at once would have, or
    more: a program beyond those would wait for another to end. And they are equally long: all ends
    when the longest does.
    """
    share = (total + num_programs_at_once - 1) // num_programs_at_once
    share = tl.cast(tl.minimum(share, num_tiles), tl.int32)  # all of them may be more than it holds
    fit = (num_tiles + max_splits - 1) // max_splits
    shortest = tl.maximum(tl.maximum(share, fit), MIN_SPLIT_TILES)
    num_splits = tl.maximum(num_tiles // shortest, 1)
    # Split in two already from one and a half shares on: one program alone would take up to twice
    # as long as all others.
    num_splits = tl.where((num_splits == 1) & (2 * num_tiles > 3 * shortest), 2, num_splits)
    tiles_per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, 1)
    return tl.maximum((num_tiles + tiles_per_split - 1) // tiles_per_split, 1), tiles_per_split


@triton.jit
def arrive(counter_ptr, num_splits):
    """Whether this program is the last of its splits to end; then the counter is zero again."""
    # The barrier: all threads of this program have stored before one of them counts it. Release and
    # acquire of the addition: stores of the programs before come before loads of the last one.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def join_splits(
    partial_out_ptr,  # [num_rows, max_splits, VALUE_DIM], fp32; a row is a head of a token
    partial_lse_ptr,  # [num_rows, max_splits]
    out_ptr,
    lse_ptr,
    rows,  # [TILE_ROWS], int64
    keep,  # [TILE_ROWS]: those that are joined
    num_splits,  # of all rows, or [TILE_ROWS]
    most_splits,  # of any row
    max_splits,
    VALUE_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """Write the results of some rows out of those of their splits, in the order of the splits."""
    WIDTH: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    channels = tl.arange(0, WIDTH)
    counts = tl.zeros([TILE_ROWS], tl.int32) + num_splits
    largest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, WIDTH], tl.float32)
    for start in range(0, most_splits, TILE_SPLITS):
        splits = start + tl.arange(0, TILE_SPLITS)
        used = (splits[:, None] < counts[None, :]) & keep[None, :]
        index = rows[None, :] * max_splits + splits[:, None]
        # Another processor wrote them: the first-level cache may hold what was there before.
        lses = tl.load(
            partial_lse_ptr + index, mask=used, other=-float("inf"), cache_modifier=".cg"
        )
        parts = tl.load(
            partial_out_ptr + index[:, :, None] * VALUE_DIM + channels[None, None, :],
            mask=used[:, :, None] & (channels < VALUE_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new = tl.maximum(largest, tl.max(lses, 0))
        pivot = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp(lses - pivot[None, :])
        rescale = tl.exp(largest - pivot)
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale[:, None] + tl.sum(parts * weights[:, :, None], 0)
        largest = new
    # Splits that saw nothing leave an output of zero and a log-sum-exp of minus infinity.
    total = tl.where(total == 0.0, 1.0, total)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    inside = keep[:, None] & (channels < VALUE_DIM)[None, :]
    tl.store(out_ptr + rows[:, None] * VALUE_DIM + channels[None, :], out, mask=inside)
    if HAS_LSE:
        # As in `finish`: infinity stays what it is.
        lse = tl.where(largest == float("inf"), largest, largest + tl.log(total))
        tl.store(lse_ptr + rows, lse, mask=keep)


@triton.jit(
    do_not_specialize=["num_tokens", "num_heads", "num_seqs", "max_splits"],
    do_not_specialize_on_alignment=["cu_seqlens_q_ptr"],
)
def _join_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    num_splits_ptr,  # [num_tokens, num_heads]: rows of one split are written already
    cu_seqlens_q_ptr,  # [num_seqs + 1], or None where all tokens are of sequences
    num_tokens,
    num_heads,
    num_seqs,
    max_splits,
    VALUE_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if cu_seqlens_q_ptr is not None:
        # Tokens after the last sequence have no count of splits.
        num_tokens = tl.minimum(tl.load(cu_seqlens_q_ptr + num_seqs), num_tokens)
    counts = tl.load(num_splits_ptr + rows, mask=rows < num_tokens * num_heads, other=1)
    counts = tl.minimum(counts, max_splits)
    most = tl.max(counts, 0)
    if most > 1:
        join_splits(
            partial_out_ptr,
            partial_lse_ptr,
            out_ptr,
            lse_ptr,
            rows.to(tl.int64),
            counts > 1,
            counts,
            most,
            max_splits,
            VALUE_DIM,
            TILE_SPLITS,
            TILE_ROWS,
            HAS_LSE,
        )


@dataclass(frozen=True)
class Partials:
    """Where the splits of all rows leave their results; of no elements where there is one split.

    Attributes:
        out: ``[num_rows, max_splits, value_dim]``, float32, and the others as `Scratch` says.
        lse: See there.
        num_splits: How many of its splits a row has.
        counters: See there.
        scratch: The sizes of all these.
    """

    out: torch.Tensor
    lse: torch.Tensor
    num_splits: torch.Tensor
    counters: torch.Tensor
    scratch: Scratch

    @classmethod
    def like(cls, out: torch.Tensor, max_splits: int, num_counters: int = 0) -> Partials:
        """Of the rows of ``out``, ``[num_tokens, num_heads, value_dim]``, on its device."""
        num_rows = out.shape[0] * out.shape[1] if max_splits > 1 else 0
        scratch = Scratch(num_rows, max_splits, out.shape[2], num_counters)
        return cls(*scratch.views(*scratch.allocate(out)), scratch)


def plan_join(call: Call, partials: Partials, out: torch.Tensor, lse: torch.Tensor) -> Launch:
    """The launch that joins the splits of all rows once they are all there."""
    num_tokens, num_heads, value_dim = out.shape
    # Chosen from the rows of one token, as the number of tokens must not change the order of a sum.
    tile_splits, tile_rows = tile_of_join(value_dim, num_heads)
    return Launch(
        _join_kernel,
        (triton.cdiv(num_tokens * num_heads, tile_rows),),
        {
            "partial_out_ptr": partials.out,
            "partial_lse_ptr": partials.lse,
            "out_ptr": out,
            "lse_ptr": lse,
            "num_splits_ptr": partials.num_splits,
            "cu_seqlens_q_ptr": call.cu_seqlens_q,
            "num_tokens": num_tokens,
            "num_heads": num_heads,
            "num_seqs": call.seq_lens.shape[0],
            "max_splits": partials.scratch.max_splits,
            "VALUE_DIM": value_dim,
            "TILE_SPLITS": tile_splits,
            "TILE_ROWS": tile_rows,
            "HAS_LSE": lse.numel() > 0,
        },
        num_warps=4,
        scratch=partials.scratch,
    )
