"""What the attention kernels share: one step of softmax attention over a tile of the cache."""

# Kernels build tuples with `+`, which changes their type: Triton compiles no iterable unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kvkernels.triton_kernels.parts import halved, join_parts, load_parts, split_parts, swap_parts
from kvkernels.triton_kernels.rules import apply_rules, as_column

# The interpreter's dot takes bf16 operands for 16-bit integers (Triton 3.6 to 3.9).
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def is_swapped(num_rows):
    """Whether products have tokens, and channels of values, as rows, and queries as columns.

    A product has 16 rows but 8 columns at least: so up to 8 queries waste half as much, and take
    half the registers.
    """
    return num_rows < 16


@triton.constexpr_function
def keeps_offsets(num_rows, value_parts, is_converted):
    """Whether accumulators, and bytes that become floats, leave registers for what is the same in
    every tile's addresses. Of the instructions of a long prompt's loop a quarter would else reckon
    those.
    """
    num_elements = num_rows * sum(width for _, width, _ in value_parts)
    return num_elements <= (1 << 13 if is_converted else 1 << 14)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` in fp32; every matrix product of the kernels comes through here."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # ieee: float32 operands would otherwise be rounded to tf32; 16-bit ones are not affected.
    if a.dtype == tl.float32:
        # Sum each tile by itself, then add: rounding errors grow with the length of a chain of
        # additions. The compiler would fuse the addition into the dot product; naming
        # max_num_imprecise_acc prevents that, and for float32 has no other effect.
        return acc + tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=32)
    return tl.dot(a, b, acc)


@triton.jit
def load_block_ids(
    table_ptr,  # of this sequence, [max_blocks_per_seq]
    start,  # first token of the tile, a multiple of TILE_N
    lo,  # table entries of tokens outside lo .. hi - 1 are not read
    hi,
    BLOCK_SIZE: tl.constexpr,
    TILE_N: tl.constexpr,
):
    """Table entries of a tile of tokens: one if the tile lies in one block, else `[TILE_N]`."""
    if BLOCK_SIZE % TILE_N == 0:
        # Tiles are visited from the one that holds lo on, so only the end needs a look.
        entries = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < hi, other=0)
    else:
        # The compiler turns the division by a power of two into a shift, and tokens of one block
        # into one load.
        tokens = start + tl.arange(0, TILE_N)
        keep = (tokens >= lo) & (tokens < hi)
        entries = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=keep, other=0)
    return entries


@triton.jit
def start_rows(sinks_ptr, heads, keep, split, TILE_M: tl.constexpr):
    """Largest score and sum of weights of rows that have seen nothing yet, or only their sink.

    A sink is a key without a value, so of several splits only the first has it.
    """
    row_max = tl.full([TILE_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    if sinks_ptr is not None:
        keep = keep & (tl.zeros([TILE_M], tl.int32) + split == 0)
        row_max = tl.load(sinks_ptr + heads, mask=keep, other=-float("inf")) * 1.4426950408889634
        row_sum += tl.where(keep, 1.0, 0.0)
    return row_max, row_sum


@triton.jit
def advance(
    q,  # parts of the queries
    k,  # parts of the keys, [TILE_N, width]
    acc,
    row_max,
    row_sum,
    scale,
    rows,
    rules,
    tokens,  # [TILE_N]
    MASKED: tl.constexpr,
    RULES: tl.constexpr,
    IS_SWAPPED: tl.constexpr = False,  # q and acc are [width, TILE_M]; see `is_swapped`
):
    """Weights of a tile, and the state rescaled for it; values remain to be added."""
    if IS_SWAPPED:
        swapped = tl.zeros([k[0].shape[0], q[0].shape[1]], tl.float32)
        for i in tl.static_range(len(q)):
            swapped = dot(k[i], q[i], swapped)
        scores = tl.trans(swapped)
    else:
        scores = tl.zeros([q[0].shape[0], k[0].shape[0]], tl.float32)
        for i in tl.static_range(len(q)):
            scores = dot(q[i], tl.trans(k[i]), scores)
    scores = apply_rules(scores, scale, rows, rules, tokens, MASKED, RULES)
    largest = tl.max(scores, 1)
    if RULES[3]:
        # A tiny scale may round to zero, and zero times minus infinity would be NaN.
        scale = tl.maximum(tl.cast(scale, tl.float32), 1e-37)
        largest *= scale
    new_max = tl.maximum(row_max, largest)
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    pivot = tl.where(new_max == -float("inf"), 0.0, new_max) if MASKED else new_max
    if RULES[3]:
        p = tl.exp2(scores * as_column(scale) - pivot[:, None])  # one multiply-add an element
    else:
        p = tl.exp2(scores - pivot[:, None])
    rescale = tl.exp2(row_max - pivot)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    scaled = ()
    for i in tl.static_range(len(acc)):
        scaled = scaled + (acc[i] * tl.expand_dims(rescale, 0 if IS_SWAPPED else 1),)
    return p, scaled, new_max, row_sum


@triton.jit
def add_values(p, v, acc, IS_SWAPPED: tl.constexpr = False):
    """`acc` with weights times values added, part by part."""
    p = p.to(v[0].dtype)
    total = ()
    for i in tl.static_range(len(acc)):
        if IS_SWAPPED:
            total = total + (dot(v[i], tl.trans(p), acc[i]),)
        else:
            total = total + (dot(p, v[i], acc[i]),)
    return total


@triton.jit
def attend(
    q,  # parts of the queries, each [TILE_M, width]
    acc,  # parts of fp32: sum of weights times values so far
    row_max,  # [TILE_M]: largest score so far, in base 2
    row_sum,  # [TILE_M]: sum of 2 ** (score - row_max)
    first_tile,
    last_tile,  # tiles first_tile .. last_tile - 1 are visited, in order
    rows,  # what each row sees; see `apply_rules`
    lo,  # tokens outside lo .. hi - 1 are seen by no row and not read
    hi,
    scale,  # of scores, a scalar or [TILE_M], times log2 of e
    rules,
    cache,  # of this key-value head; see `select_head`
    table_ptr,  # of this sequence, [max_blocks_per_seq]
    BLOCK_SIZE: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    IS_LATENT: tl.constexpr,  # values are the first part of the keys
    HAS_FLOAT8: tl.constexpr,
    TILE_N: tl.constexpr,
    MASKED: tl.constexpr,  # without it every row must see every token of the tiles
    RULES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Softmax attention over a run of tiles of floats; returns acc, row_max and row_sum."""
    key_ptr, value_ptr, key_block, key_slot, value_block, value_slot = cache
    dtype: tl.constexpr = q[0].dtype
    IN_PAIRS: tl.constexpr = key_ptr.dtype.element_ty == tl.int16
    KEY_WORDS: tl.constexpr = halved(KEY_PARTS) if IN_PAIRS else KEY_PARTS
    VALUE_WORDS: tl.constexpr = halved(VALUE_PARTS) if IN_PAIRS else VALUE_PARTS
    IS_SWAPPED: tl.constexpr = is_swapped(q[0].shape[0])
    KEEPS_OFFSETS: tl.constexpr = keeps_offsets(
        q[0].shape[0], VALUE_PARTS, key_ptr.dtype.element_ty == tl.uint8
    )
    if IN_PAIRS:
        q = split_parts(q)
        acc = split_parts(acc)
    if IS_SWAPPED:
        q = swap_parts(q)
        acc = swap_parts(acc)
    next_block = load_block_ids(table_ptr, first_tile * TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
    for tile in range(first_tile, last_tile):
        start = tile * TILE_N
        tokens = start + tl.arange(0, TILE_N)
        keep = (tokens >= lo) & (tokens < hi)
        # Ids are loaded one tile ahead by hand: within the loop's chain of loads the pipeliner
        # would give them a stage of their own and keep half as many keys and values in flight.
        block = next_block.to(tl.int64)
        next_block = load_block_ids(table_ptr, start + TILE_N, lo, hi, BLOCK_SIZE, TILE_N)
        key_tile = key_ptr
        value_tile = value_ptr
        if BLOCK_SIZE % TILE_N == 0 and (IN_PAIRS or KEEPS_OFFSETS):
            # The tile's start moves; the offsets within a tile stay the same from tile to tile.
            slot = (start % BLOCK_SIZE).to(tl.int64)
            key_tile += block * key_block + slot * key_slot
            value_tile += block * value_block + slot * value_slot
            key_rows = tl.arange(0, TILE_N).to(tl.int64) * key_slot
            value_rows = tl.arange(0, TILE_N).to(tl.int64) * value_slot
        else:
            slots = (tokens % BLOCK_SIZE).to(tl.int64)
            key_rows = block * key_block + slots * key_slot
            value_rows = block * value_block + slots * value_slot

        # Keys need no mask: scores of tokens that nobody sees are replaced anyway.
        k = load_parts(
            key_tile, key_rows, keep, KEY_WORDS, MASKED and not IN_PAIRS, EVICTION, dtype,
            HAS_FLOAT8,
        )  # fmt: skip
        p, acc, row_max, row_sum = advance(
            q, k, acc, row_max, row_sum, scale, rows, rules, tokens, MASKED, RULES, IS_SWAPPED
        )
        # Values of slots nobody sees are loaded as zero: a weight of zero would not silence a NaN.
        if IS_LATENT:
            acc = add_values(p, k, acc)
        else:
            v = load_parts(
                value_tile, value_rows, keep, VALUE_WORDS, MASKED, EVICTION, dtype, HAS_FLOAT8,
                False, IS_SWAPPED,
            )  # fmt: skip
            acc = add_values(p, v, acc, IS_SWAPPED)
    if IS_SWAPPED:
        acc = swap_parts(acc)
    if IN_PAIRS:
        acc = join_parts(acc)
    return acc, row_max, row_sum


@triton.jit
def select_head(cache, kv_head):
    """Pointers to one head's rows, and strides of blocks and slots."""
    key_ptr, value_ptr, key_block, key_head, key_slot, value_block, value_head, value_slot = cache
    key_ptr += kv_head * key_head
    value_ptr += kv_head * value_head
    return key_ptr, value_ptr, key_block, key_slot, value_block, value_slot


@triton.jit
def finish(row_max, row_sum):
    """Factor that normalises a row of `acc`, and the row's natural log-sum-exp."""
    # A row that saw nothing has a maximum of -inf and an accumulator of zero: any other sum than
    # zero gives output 0 and lse -inf.
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = (row_max + tl.log2(total)) * 0.6931471805599453
    # A score of infinity leaves no number of the sum, but the maximum tells what it was.
    return 1.0 / total, tl.where(row_max == float("inf"), row_max, lse)
