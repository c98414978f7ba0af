"""What the attention kernels share: one step of softmax attention over a tile of the cache."""

import triton
import triton.language as tl

# The interpreter's dot takes bf16 operands for 16-bit integers (Triton 3.6 to 3.9).
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in fp32; every matrix product of the kernels comes through here."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # ieee: float32 operands would otherwise be rounded to tf32; 16-bit ones are not affected.
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(
    base_ptr,
    offsets,  # [num_rows], int64, in elements
    keep,  # [num_rows]; only looked at where MASKED
    FIRST: tl.constexpr,  # first channel
    WIDTH: tl.constexpr,  # channels, a power of two
    HEAD_DIM: tl.constexpr,  # channels from here on are zero
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Rows of `WIDTH` channels, `[num_rows, WIDTH]`; zero where masked, whatever memory holds."""
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = base_ptr + offsets[:, None] + channels[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        inside = channels[None, :] < HEAD_DIM
        if MASKED:
            inside = inside & keep[:, None]
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    if MASKED:
        return tl.load(pointers, mask=keep[:, None], other=0.0, eviction_policy=EVICTION)
    return tl.load(pointers, eviction_policy=EVICTION)


@triton.jit
def store_rows(
    base_ptr,
    offsets,  # [num_rows], int64, in elements
    keep,  # [num_rows]
    rows,  # [num_rows, WIDTH]
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    channels = FIRST + tl.arange(0, WIDTH)
    pointers = base_ptr + offsets[:, None] + channels[None, :]
    mask = keep[:, None] & (channels[None, :] < HEAD_DIM)
    tl.store(pointers, rows.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_block_ids(
    table_ptr,  # of this sequence, [max_blocks_per_seq]
    start,  # first token of the tile, a multiple of TILE_N
    lo,  # table entries of tokens outside lo .. hi - 1 are not read
    hi,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Block ids of a tile of tokens, int64: one if the tile lies in one block, else `[TILE_N]`."""
    if BLOCK_SIZE % TILE_N == 0:
        # Tiles are visited from the one that holds lo on, so only the end needs a look.
        block = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < hi, other=0)
    else:
        # For powers of two the division is a shift, and tokens of one block share a load.
        tokens = start + tl.arange(0, TILE_N)
        keep = (tokens >= lo) & (tokens < hi)
        block = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=keep, other=0)
    return block.to(tl.int64)


@triton.jit
def attend(
    q,  # [TILE_M, HEAD_MAIN]
    q_tail,  # [TILE_M, HEAD_TAIL]; unused where that is 0
    acc,  # [TILE_M, HEAD_MAIN], fp32: sum of weights times values so far
    acc_tail,
    row_max,  # [TILE_M]: largest score so far, in base 2
    row_sum,  # [TILE_M]: sum of 2 ** (score - row_max)
    first_tile,
    last_tile,  # tiles first_tile .. last_tile - 1 are visited, in order
    row_lo,  # [TILE_M]: each row sees tokens row_lo .. row_hi - 1; only used where MASKED
    row_hi,
    lo,  # smallest row_lo and largest row_hi: what lies outside is not read
    hi,
    sm_scale,
    key_ptr,  # of this key-value head, [num_blocks, block_size, HEAD_DIM]
    value_ptr,
    stride_key_block,
    stride_key_slot,
    stride_value_block,
    stride_value_slot,
    table_ptr,  # of this sequence, [max_blocks_per_seq]
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_MAIN: tl.constexpr,
    HEAD_TAIL: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,  # without it every row must see every token of the tiles
    EVICTION: tl.constexpr,
):
    """Softmax attention over a run of tiles; returns acc, acc_tail, row_max and row_sum."""
    scale = sm_scale * _LOG2E
    next_block = load_block_ids(table_ptr, first_tile * TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
    for tile in range(first_tile, last_tile):
        start = tile * TILE_N
        tokens = start + tl.arange(0, TILE_N)
        keep = (tokens >= lo) & (tokens < hi)
        # Ids are loaded one tile ahead by hand: left in the chain, the pipeliner would count them
        # as a stage of their own and keep half as many keys and values in flight.
        block = next_block
        next_block = load_block_ids(table_ptr, start + TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
        slots = (tokens % BLOCK_SIZE).to(tl.int64)
        key_rows = block * stride_key_block + slots * stride_key_slot
        value_rows = block * stride_value_block + slots * stride_value_slot

        k = load_rows(key_ptr, key_rows, keep, 0, HEAD_MAIN, HEAD_DIM, MASKED, EVICTION)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], TILE_N], tl.float32))
        if HEAD_TAIL > 0:
            k = load_rows(key_ptr, key_rows, keep, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, MASKED, EVICTION)
            scores = dot(q_tail, tl.trans(k), scores)
        scores *= scale
        if MASKED:
            seen = (tokens[None, :] >= row_lo[:, None]) & (tokens[None, :] < row_hi[:, None])
            scores = tl.where(seen, scores, -float("inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        pivot = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max

        # Values of slots nobody sees are loaded as zero: a weight of zero would not silence a NaN.
        v = load_rows(value_ptr, value_rows, keep, 0, HEAD_MAIN, HEAD_DIM, MASKED, EVICTION)
        p = p.to(v.dtype)
        acc = dot(p, v, acc * rescale[:, None])
        if HEAD_TAIL > 0:
            v = load_rows(
                value_ptr, value_rows, keep, HEAD_MAIN, HEAD_TAIL, HEAD_DIM, MASKED, EVICTION
            )
            acc_tail = dot(p, v, acc_tail * rescale[:, None])
    return acc, acc_tail, row_max, row_sum


@triton.jit
def finish(row_max, row_sum):
    """Factor that normalises a row of `acc`, and the row's natural log-sum-exp."""
    # A row that saw nothing has a maximum of -inf and an accumulator of zero: any other sum than
    # zero gives output 0 and lse -inf.
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    return 1.0 / total, (row_max + tl.log2(total)) * _LN2
