"""Launch configurations: a table, never a search at run time.

`aot.py` compiles every entry and refuses one that spills registers or does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkernels.errors import UnsupportedError

MAX_HEAD_DIM = 576


@dataclass(frozen=True)
class TileConfig:
    """How one attention kernel is cut.

    Attributes:
        tile_m: Query rows of a program: tokens times grouped heads.
        tile_n: Cached tokens a program looks at in one step.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
        programs_per_multiprocessor: Among how many a multiprocessor's share of the work is split;
            not more than fit at once. Each more is one more partial result to join.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1


def _width(head_dim: int) -> int:
    """The table's row for keys and values of up to so many channels: the next of 64, 128, 256 and
    576.
    """
    for width in (64, 128, 256, MAX_HEAD_DIM):
        if head_dim <= width:
            return width
    raise UnsupportedError(f"head_dim: the kernels serve up to {MAX_HEAD_DIM}, got {head_dim}")


# (arch, bytes of an element, width of a head): tile_n, num_warps, num_stages, programs at once.
# A step is 16 to 32 KB of keys and values, and two steps of each program are in flight: enough, on
# Hopper, for one program to draw a multiprocessor's share of the memory's bandwidth.
_DECODE = {
    (8, 2, 64): (64, 4, 4, 2),
    (8, 2, 128): (64, 4, 3, 2),
    (8, 2, 256): (32, 4, 3, 2),
    (8, 4, 64): (32, 8, 3, 2),
    (8, 4, 128): (32, 8, 3, 2),
    (8, 4, 256): (16, 8, 3, 2),
    (8, 2, 576): (32, 8, 2, 1),
    (8, 4, 576): (16, 8, 2, 1),
    (9, 2, 64): (64, 2, 4, 2),
    (9, 2, 128): (32, 2, 3, 2),
    (9, 2, 256): (64, 4, 3, 1),
    (9, 4, 64): (32, 8, 3, 3),
    (9, 4, 128): (32, 8, 3, 2),
    (9, 4, 256): (16, 8, 3, 2),
    (9, 2, 576): (32, 8, 2, 2),
    (9, 4, 576): (16, 8, 2, 2),
}

# The first number is the least query heads to a key-value head; then tile_m, and the rest as above.
# With that many heads latent attention is bound by its products and no longer by memory, and wide
# heads need more warps for them.
_DECODE_MANY_HEADS = {
    (9, 2, 256): (17, 32, 64, 8, 3, 1),
    (9, 2, 576): (33, 64, 32, 8, 3, 1),
    (10, 2, 256): (17, 32, 64, 8, 3, 1),
}

# Where blocks may be quantised: a step reads a quarter to half as many bytes, so more steps are in
# flight.
_DECODE_CODES = {
    (8, 2, 64): (64, 4, 4, 2),
    (8, 2, 128): (32, 4, 4, 2),
    (8, 2, 256): (32, 4, 3, 1),
    (8, 2, 576): (16, 8, 2, 1),
    (8, 4, 64): (32, 8, 3, 1),
    (8, 4, 128): (32, 8, 3, 1),
    (8, 4, 256): (16, 8, 3, 1),
    (8, 4, 576): (16, 8, 1, 1),
    (9, 2, 64): (64, 4, 4, 3),
    (9, 2, 128): (32, 4, 5, 3),
    (9, 2, 256): (32, 4, 3, 2),
    (9, 2, 576): (32, 8, 2, 1),
    (9, 4, 64): (32, 8, 3, 1),
    (9, 4, 128): (32, 8, 3, 1),
    (9, 4, 256): (16, 8, 3, 1),
    (9, 4, 576): (16, 8, 2, 1),
}

# The same for heads of exactly this many channels and at most 8 query heads to each. One warp to a
# program: that needs no sums across warps and no barriers, which take most of a step when there are
# only 8 rows.
_DECODE_CODES_ALONE = {
    (9, 2, 64): (64, 1, 3, 8),
    (9, 2, 128): (32, 1, 3, 8),
}
# And for float8.
_DECODE_FLOAT8_ALONE = {
    (9, 2, 64): (64, 1, 3, 8),
    (9, 2, 128): (32, 2, 3, 4),
}

# (arch, bytes of an element, width of a head): for each tile_m its tile_n, num_warps, num_stages.
# float32 products run on the ordinary units, which hold operands in registers: small tiles.
_PREFILL = {
    (8, 2, 64): {16: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
    (8, 2, 128): {16: (64, 4, 3), 64: (64, 8, 2), 128: (32, 8, 3)},
    (8, 2, 256): {16: (32, 4, 2), 64: (16, 8, 3)},
    (8, 4, 64): {16: (32, 8, 3), 32: (32, 8, 3)},
    (8, 4, 128): {16: (32, 8, 3), 32: (16, 8, 3)},
    (8, 4, 256): {16: (16, 8, 2), 32: (16, 8, 2)},
    (8, 2, 576): {16: (32, 8, 2)},
    (8, 4, 576): {16: (16, 8, 1)},
    (9, 2, 64): {16: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 4)},
    (9, 2, 128): {16: (64, 4, 3), 64: (64, 4, 3), 128: (64, 8, 3)},
    (9, 2, 256): {16: (32, 4, 2), 64: (32, 8, 2), 128: (32, 8, 3)},
    (9, 4, 64): {16: (32, 8, 3), 32: (32, 8, 3)},
    (9, 4, 128): {16: (16, 8, 2), 32: (16, 8, 3)},
    (9, 4, 256): {16: (16, 8, 2), 32: (16, 8, 2)},
    (9, 2, 576): {16: (32, 8, 2), 32: (32, 8, 2)},
    (9, 4, 576): {16: (16, 8, 1)},
}

# Entries where Blackwell needs other tiles than Hopper: its accumulators lie in tensor memory,
# which changes what registers hold, and Hopper's tiles would spill.
_PREFILL_BLACKWELL = {
    (10, 2, 64): {16: (64, 4, 3), 64: (64, 8, 3), 128: (64, 8, 3)},
    (10, 2, 128): {16: (64, 4, 3), 64: (64, 8, 3), 128: (64, 8, 3)},
    (10, 2, 256): {16: (32, 4, 2), 64: (32, 8, 3)},
    (10, 4, 128): {16: (16, 8, 2), 32: (16, 8, 3)},
    (10, 4, 256): {16: (16, 8, 3)},
}


# Entries where rules of scoring or quantised blocks need more registers than plain floats.
_PREFILL_HEAVY = {
    (8, 2, 128): {16: (64, 4, 3), 64: (16, 8, 3)},
    (8, 2, 256): {16: (32, 4, 2), 32: (16, 8, 3)},
    (8, 2, 576): {16: (16, 8, 2)},
    (9, 2, 128): {16: (64, 4, 3), 64: (64, 8, 3), 128: (64, 8, 3)},
    (9, 2, 256): {16: (32, 4, 2), 32: (32, 8, 2)},
    (9, 2, 576): {16: (32, 8, 2)},
    (10, 2, 128): {16: (64, 4, 3), 64: (32, 8, 3)},
}

# By entry and tile_m: the least query rows per multiprocessor for which this tile pays. One program
# takes longer than with the next smaller tile, so with fewer rows the last programs would leave the
# device half empty.
_LEAST_ROWS = {
    ((9, 2, 64), 128): 1024,
}


def _row(arch: int, dtype: torch.dtype, head_dim: int) -> tuple[int, int, int]:
    """The key of a row; Blackwell's 10 falls back to 9 where it has no row of its own."""
    if arch < 8:
        raise UnsupportedError(f"device: the kernels need compute capability 8.0, got {arch}.x")
    # From compute capability 12 on chips have only 99 KB of shared memory, like 8.6 and 8.9.
    served_as = 8 if arch >= 12 else min(arch, 10)
    return (served_as, dtype.itemsize, _width(head_dim))


def decode_config(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    is_quantized: bool = False,
    is_float8: bool = False,
) -> TileConfig:
    """Configuration of the decode kernel for `group` query heads to a key-value head."""
    served_as, itemsize, width = _row(arch, dtype, head_dim)
    if group <= 8 and (is_quantized or is_float8):
        alone = _DECODE_CODES_ALONE if is_quantized else _DECODE_FLOAT8_ALONE
        row = alone.get((min(served_as, 9), itemsize, head_dim))
        if row is not None:
            return TileConfig(8, *row)
    table = _DECODE_CODES if is_quantized else _DECODE
    least_group, *many = _DECODE_MANY_HEADS.get((served_as, itemsize, width), (group + 1,))
    if group >= least_group and not is_quantized:
        return TileConfig(*many)
    # 32 rows instead of 16 avoid reading the cache a second time. Not for float32, which lacks the
    # registers, nor for wide latent queries on Ampere, which lacks the shared memory.
    is_narrow = group <= 16 or itemsize == 4 or (served_as == 8 and width > 256 and is_quantized)
    tile_m = 16 if is_narrow else 32
    return TileConfig(tile_m, *table[min(served_as, 9), itemsize, width])


def prefill_tiles(
    arch: int, dtype: torch.dtype, head_dim: int, is_heavy: bool = False
) -> list[TileConfig]:
    """Configurations of the prefill kernel, the ones for few query rows first.

    `is_heavy` says that blocks may be quantised, or that scores have rules beside a window.
    """
    served_as, itemsize, width = row = _row(arch, dtype, head_dim)
    as_hopper = (min(served_as, 9), itemsize, width)
    entries = _PREFILL_BLACKWELL.get(row) or _PREFILL[as_hopper]
    if is_heavy:
        entries = _PREFILL_HEAVY.get(row) or _PREFILL_HEAVY.get(as_hopper) or entries
    return [TileConfig(tile_m, *entries[tile_m]) for tile_m in sorted(entries)]


def prefill_config(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    num_rows: int,
    is_heavy: bool = False,
    rows_per_multiprocessor: int | None = None,
) -> TileConfig:
    """Of `prefill_tiles`, the one for about `num_rows` query rows a sequence.

    `rows_per_multiprocessor` are those of the whole call, None for any number.
    """
    row = _row(arch, dtype, head_dim)
    least_rows = {} if is_heavy else _LEAST_ROWS
    tiles = [
        tile
        for tile in prefill_tiles(arch, dtype, head_dim, is_heavy)
        if rows_per_multiprocessor is None
        or rows_per_multiprocessor >= least_rows.get((row, tile.tile_m), 0)
    ]
    return next((tile for tile in tiles if num_rows <= tile.tile_m), tiles[-1])
