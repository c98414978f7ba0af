"""Rows of keys, values and queries as tuples of tiles.

A row is cut into parts, each as wide as a power of two: `((first, width, end), ...)`, channels
`first` to `end - 1` in a tile of `width`. Queries, keys, values and accumulators are tuples with a
tile for each part; `kvkernels.triton_kernels.launch.cut_row` chooses them.
"""

# Kernels build tuples with `+`, which changes their type: Triton compiles no iterable unpacking.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from kvkernels.triton_kernels.float8 import from_float8, from_float8_pairs


# An item of a tuple, as a constexpr. Where a kernel indexes a tuple itself, Triton 3.6 makes a
# plain number of the item, which can neither be passed on as a constexpr nor be part of a shape.
@triton.constexpr_function
def at(values, index):
    return values[index]


@triton.constexpr_function
def first_of(parts, index):
    """First channel of a part."""
    return parts[index][0]


@triton.constexpr_function
def width_of(parts, index):
    """Channels that a part is loaded as, a power of two."""
    return parts[index][1]


@triton.constexpr_function
def end_of(parts, index):
    """Channel before which a part's own channels end; those up to its width are masked."""
    return parts[index][2]


@triton.constexpr_function
def halved(parts):
    """The parts in words of two channels."""
    return tuple((first // 2, width // 2, end // 2) for first, width, end in parts)


@triton.jit
def load_rows(
    base_ptr,
    offsets,  # [num_rows], int64, in elements
    keep,  # [num_rows]; only looked at where MASKED
    PARTS: tl.constexpr,
    INDEX: tl.constexpr,  # of the part; its channels from its end on are zero
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    AS_COLUMNS: tl.constexpr = False,  # [width, num_rows] instead
):
    """One part of some rows, `[num_rows, width]`; zero where masked, whatever memory holds."""
    FIRST: tl.constexpr = first_of(PARTS, INDEX)
    WIDTH: tl.constexpr = width_of(PARTS, INDEX)
    END: tl.constexpr = end_of(PARTS, INDEX)
    channels = tl.expand_dims(FIRST + tl.arange(0, WIDTH), 1 if AS_COLUMNS else 0)
    offsets = tl.expand_dims(offsets, 0 if AS_COLUMNS else 1)
    keep = tl.expand_dims(keep, 0 if AS_COLUMNS else 1)
    pointers = base_ptr + offsets + channels
    if FIRST + WIDTH > END:
        inside = channels < END
        if MASKED:
            inside = inside & keep
        return tl.load(pointers, mask=inside, other=0.0, eviction_policy=EVICTION)
    if MASKED:
        return tl.load(pointers, mask=keep, other=0.0, eviction_policy=EVICTION)
    return tl.load(pointers, eviction_policy=EVICTION)


@triton.jit
def load_parts(
    base_ptr,
    offsets,
    keep,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
    EVICTION: tl.constexpr,
    dtype: tl.constexpr = None,  # of the result, where float8 is loaded as bytes or pairs
    HAS_FLOAT8: tl.constexpr = False,  # whether the machine converts it
    IS_PURE: tl.constexpr = True,
    AS_COLUMNS: tl.constexpr = False,
):
    """Rows as a tuple with one tile a part.

    Where `IS_PURE` the compiler moves a conversion behind the load from shared memory. Good for
    keys, whose channels lie as the product takes them; values it would then load byte by byte.
    """
    parts = ()
    for i in tl.static_range(len(PARTS)):
        part = load_rows(base_ptr, offsets, keep, PARTS, i, MASKED, EVICTION, AS_COLUMNS)
        if part.dtype == tl.int16:
            even, odd = from_float8_pairs(part, dtype)
            parts = parts + (even, odd)
        elif part.dtype == tl.uint8:
            parts = parts + (from_float8(part, dtype, HAS_FLOAT8, IS_PURE),)
        else:
            parts = parts + (part,)
    return parts


@triton.jit
def store_parts(
    base_ptr,
    offsets,  # [num_rows], int64, in elements
    keep,  # [num_rows]
    parts,  # tiles [num_rows, width]
    factor,  # [num_rows]: multiplies a row
    PARTS: tl.constexpr,
):
    """Store parts of rows, each row multiplied by its factor."""
    for i in tl.static_range(len(PARTS)):
        channels = first_of(PARTS, i) + tl.arange(0, width_of(PARTS, i))
        pointers = base_ptr + offsets[:, None] + channels[None, :]
        mask = keep[:, None] & (channels[None, :] < end_of(PARTS, i))
        rows = parts[i] * factor[:, None]
        tl.store(pointers, rows.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def zeros(TILE_M: tl.constexpr, PARTS: tl.constexpr):
    """Accumulators of a value's parts."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        parts = parts + (tl.zeros([TILE_M, width_of(PARTS, i)], tl.float32),)
    return parts


@triton.jit
def split_parts(parts):
    """Each part as two: its even channels, then its odd ones."""
    pairs = ()
    for i in tl.static_range(len(parts)):
        even, odd = tl.split(tl.reshape(parts[i], [parts[i].shape[0], parts[i].shape[1] // 2, 2]))
        pairs = pairs + (even, odd)
    return pairs


@triton.jit
def join_parts(pairs):
    """What `split_parts` split."""
    parts = ()
    for i in tl.static_range(0, len(pairs), 2):
        both = tl.join(pairs[i], pairs[i + 1])
        parts = parts + (tl.reshape(both, [pairs[i].shape[0], 2 * pairs[i].shape[1]]),)
    return parts


@triton.jit
def swap_parts(parts):
    """Each part with its rows as columns."""
    swapped = ()
    for i in tl.static_range(len(parts)):
        swapped = swapped + (tl.trans(parts[i]),)
    return swapped
