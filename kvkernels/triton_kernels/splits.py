"""How a long sequence is cut into splits, and how their partial results become one again."""

import triton
import triton.language as tl


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
    """Number of splits of a sequence, and their length in tiles.

    The length is the work of all sequences over the programs that run at once, and 10 %: they keep
    a slightly unequal batch from spilling into a second round.
    """
    tiles_per_split = SPLIT_TILES
    if SPLIT_TILES == 0:
        total = tl.full((), 0, tl.int64)
        for first in range(0, num_seqs, 128):
            seqs = first + tl.arange(0, 128)
            lens = tl.load(seq_lens_ptr + seqs, mask=seqs < num_seqs, other=0)
            _, tiles = count_tiles(lens, window, TILE_N, HAS_WINDOW)
            total += tl.sum(tiles)
        tenths = num_programs_at_once * 10
        share = tl.cast((total * num_groups * 11 + tenths - 1) // tenths, tl.int32)
        fit = (num_tiles + max_splits - 1) // max_splits
        tiles_per_split = tl.maximum(tl.maximum(share, fit), MIN_SPLIT_TILES)
    num_splits = tl.maximum((num_tiles + tiles_per_split - 1) // tiles_per_split, 1)
    return num_splits, tiles_per_split


@triton.jit
def arrive(counter_ptr, num_splits):
    """Whether this program is the last of its splits to end; then the counter is zero again."""
    # All threads have stored their share before one of them says so, and the release and the
    # acquire of the addition order the stores of one program before the loads of another.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == num_splits - 1
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def join_splits(
    partial_out_ptr,  # [num_heads of all sequences, max_splits, VALUE_DIM], fp32
    partial_lse_ptr,  # [num_heads of all sequences, max_splits]
    out_ptr,
    lse_ptr,
    first_row,  # rows first_row .. first_row + num_rows - 1 are joined
    num_rows,
    num_splits,
    max_splits,
    VALUE_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    WIDTH: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    channels = tl.arange(0, WIDTH)
    for first in range(0, num_rows, TILE_ROWS):
        rows = first + tl.arange(0, TILE_ROWS)
        keep = rows < num_rows
        rows = first_row + rows
        largest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
        total = tl.zeros([TILE_ROWS], tl.float32)
        acc = tl.zeros([TILE_ROWS, WIDTH], tl.float32)
        for start in range(0, num_splits, TILE_SPLITS):
            splits = start + tl.arange(0, TILE_SPLITS)
            used = (splits < num_splits)[:, None] & keep[None, :]
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
            tl.store(lse_ptr + rows, largest + tl.log(total), mask=keep)
