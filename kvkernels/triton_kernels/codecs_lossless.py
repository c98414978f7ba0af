"""Triton kernels of "l12": bfloat16 as sign and mantissa, and how far exponents lie below a top."""

import triton
import triton.language as tl

from kvkernels.codecs import NUM_ESCAPES
from kvkernels.triton_kernels.codecs_parts import (
    add_sums,
    find_item,
    total,
    weigh_bytes,
    weigh_steps,
    weigh_words,
    write_zeros,
)

_NUM_ESCAPES = tl.constexpr(NUM_ESCAPES)
_UNUSED = tl.constexpr(-1)  # `UNUSED_ESCAPE` as int32
_ESCAPED = tl.constexpr(15)
_NUM_STAGES = tl.constexpr(3)


@triton.jit
def _load_bits(items_ptr, is_inside):
    """The bits of bfloat16, int32; zeros outside."""
    return tl.load(items_ptr, mask=is_inside, other=0).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _exponents_of(bits):
    return bits >> 7 & 255


@triton.jit
def _far_below(tops, exponents):
    """1 where an exponent needs an escape, int32."""
    return ((tops - exponents >= _ESCAPED) & (exponents > 0)).to(tl.int32)


@triton.jit
def _list_escapes(
    source_ptr,
    escapes_ptr,
    start,  # word of the layer that is the first escape
    places,  # [2, TILE_M, TILE_N]: of the first tokens' elements in the head
    is_inside,
    tops,  # [2, 1, TILE_N]
    STEP: tl.constexpr,  # elements of TILE_M tokens
    NUM_STEPS: tl.constexpr,
):
    """Enter a head's escapes, in order and as far as they fit; their share of the sums."""
    plain = tl.zeros([], tl.int64)
    weighted = tl.zeros([], tl.int64)
    num_before = 0
    for step in range(NUM_STEPS):
        exponents = _exponents_of(_load_bits(source_ptr + step * STEP + places, is_inside))
        is_far = _far_below(tops, exponents)
        in_halves = tl.sum(is_far, 2)  # [2, TILE_M]
        in_tokens = tl.sum(in_halves, 0)
        # An element's rank counts the escapes of earlier tokens, of its token's first half if it
        # lies in the second, and of its own half before it.
        before = tl.cumsum(in_tokens, 0) - in_tokens
        ranks = before[None, :] + tl.cumsum(in_halves, 0) - in_halves
        ranks = num_before + ranks[:, :, None] + tl.cumsum(is_far, 2) - is_far
        words = step * STEP + places | exponents << 24
        is_listed = (is_far != 0) & (ranks < _NUM_ESCAPES)
        tl.store(escapes_ptr + ranks, words, mask=is_listed)
        tile_plain, tile_weighted = weigh_words(tl.where(is_listed, words, 0), start + ranks)
        plain += total(tile_plain)
        weighted += total(tile_weighted)
        num_before += tl.sum(in_tokens, 0)
    return plain, weighted


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "sums_ptr", "is_raw_ptr"],
)
def _encode_lossless_kernel(
    blocks_ptr,  # [num_blocks, num_layers, NUM_SIDES, NUM_HEADS, BLOCK_SIZE, HEAD_DIM], bfloat16
    block_ids_ptr,  # [num_rows]
    payloads_ptr,  # [num_rows, row_bytes], uint8
    sums_ptr,  # [num_rows, num_layers, 2], int64, is added to
    is_raw_ptr,  # [num_rows], uint8, gets 1 where more escapes are needed than fit
    layers_ptr,  # [num_chosen, 2]: layers of this codec, and where they begin
    num_items,
    num_chosen,
    num_layers,
    stride_block,  # in elements
    stride_row,  # in words
    NUM_SIDES: tl.constexpr,  # keys and values, or latents
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NIBBLES: tl.constexpr,  # where parts of a side begin, after signs and mantissas
    ESCAPES: tl.constexpr,
    TOPS: tl.constexpr,
    END: tl.constexpr,
    NEXT: tl.constexpr,  # where the values begin, or the layer ends
    NUM_BYTES: tl.constexpr,  # of a layer
    TILE_M: tl.constexpr,  # tokens at a time, a multiple of 4
    TILE_N: tl.constexpr,  # next power of two of half the channels
):
    # One item is a head, as its escapes are listed in the order of its tokens. The tokens are read
    # twice (highest exponents, then codes), and once more if there are escapes.
    HALF: tl.constexpr = HEAD_DIM // 2
    STEPS: tl.constexpr = BLOCK_SIZE // TILE_M
    STEP: tl.constexpr = TILE_M * HEAD_DIM
    halves = tl.arange(0, 2)
    tokens = tl.arange(0, TILE_M)
    columns = tl.arange(0, TILE_N)
    is_column = columns < HALF
    is_inside = is_column[None, None, :]  # of [2, TILE_M, TILE_N]
    channels = (halves * HALF)[:, None] + columns[None, :]
    elements = (tokens * HEAD_DIM)[None, :, None] + channels[:, None, :]
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        # Values follow keys both in the pool and in the payload, so they count as further heads.
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, NUM_SIDES * NUM_HEADS)
        base = piece // NUM_HEADS * NEXT
        head = piece % NUM_HEADS
        source_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
        source_ptr += (layer * NUM_SIDES * NUM_HEADS + piece) * (BLOCK_SIZE * HEAD_DIM)
        layer_ptr = payloads_ptr + row * stride_row * 4 + offset

        highest = tl.zeros([2, TILE_M, TILE_N], tl.int32)
        for step in tl.range(0, STEPS, num_stages=_NUM_STAGES):
            bits = _load_bits(source_ptr + step * STEP + elements, is_inside)
            highest = tl.maximum(highest, _exponents_of(bits))
        tops = tl.max(highest, 1)  # [2, TILE_N]; zeros outside
        places = base + TOPS + head * HEAD_DIM + channels
        is_top = tl.broadcast_to(is_column[None, :], [2, TILE_N])
        tl.store(layer_ptr + places, tops.to(tl.uint8), mask=is_top)
        top_plain, top_weighted = weigh_bytes(tops, places)
        tops = tops[:, None, :]

        low_places = base + head * (BLOCK_SIZE * HEAD_DIM) + elements
        first_places = (tokens * HEAD_DIM)[:, None] + columns[None, :]
        first_places += base + head * (BLOCK_SIZE * HEAD_DIM)
        places = (tokens * HALF)[:, None] + columns[None, :]
        places = base + NIBBLES + head * (BLOCK_SIZE * HALF) + places
        low_counts = tl.zeros([2, TILE_M, TILE_N], tl.int32)
        low_levers = tl.zeros([2, TILE_M, TILE_N], tl.int32)
        num_far = tl.zeros([TILE_M, TILE_N], tl.int32)
        counts = tl.zeros([TILE_M, TILE_N], tl.int32)
        levers = tl.zeros([TILE_M, TILE_N], tl.int32)
        for step in tl.range(0, STEPS, num_stages=_NUM_STAGES):
            bits = _load_bits(source_ptr + step * STEP + elements, is_inside)
            exponents = _exponents_of(bits)
            num_far += tl.sum(_far_below(tops, exponents), 0)
            low = (bits >> 8 & 0x80) | (bits & 0x7F)
            # Stored one half after the other: a single store would need another layout over the
            # threads.
            first, second = tl.split(tl.permute(low.to(tl.uint8), (1, 2, 0)))
            low_ptr = layer_ptr + step * STEP + first_places
            tl.store(low_ptr, first, mask=is_column[None, :])
            tl.store(low_ptr + HALF, second, mask=is_column[None, :])
            low_counts += low
            low_levers += low * step
            deltas = tl.minimum(tops - exponents, _ESCAPED)
            packed = tl.sum(deltas << (halves * 4)[:, None, None], 0)
            nibbles_ptr = layer_ptr + step * (STEP // 2) + places
            tl.store(nibbles_ptr, packed.to(tl.uint8), mask=is_column[None, :])
            counts += packed
            levers += packed * step
        low_plain, low_weighted = weigh_steps(low_counts, low_levers, low_places, STEP)
        plain = total(top_plain) + total(low_plain)
        weighted = total(top_weighted) + total(low_weighted)
        nibble_plain, nibble_weighted = weigh_steps(counts, levers, places, STEP // 2)
        plain += total(nibble_plain)
        weighted += total(nibble_weighted)

        start = (base + ESCAPES) // 4 + head * _NUM_ESCAPES
        escapes_ptr = layer_ptr.to(tl.pointer_type(tl.int32)) + start
        num_escapes = total(num_far)
        if num_escapes > 0:
            more_plain, more_weighted = _list_escapes(
                source_ptr, escapes_ptr, start, elements, is_inside, tops, STEP, STEPS
            )
            plain += more_plain
            weighted += more_weighted
        slots = tl.arange(0, _NUM_ESCAPES)
        unused = tl.where(slots >= num_escapes, _UNUSED, 0)
        tl.store(escapes_ptr + slots, unused, mask=slots >= num_escapes)
        slot_plain, slot_weighted = weigh_words(unused, start + slots)
        plain += total(slot_plain)
        weighted += total(slot_weighted)
        add_sums(sums_ptr, row, layer, num_layers, plain, weighted)
        if head == NUM_HEADS - 1:  # zeros up to where the values begin, or to the layer's end
            write_zeros(layer_ptr, base + END, tl.where(base == 0, NEXT, NUM_BYTES))
        if num_escapes > _NUM_ESCAPES:
            tl.store(is_raw_ptr + row, 1)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "is_raw_ptr", "is_good_ptr"],
)
def _decode_lossless_kernel(
    blocks_ptr,  # as above
    block_ids_ptr,
    payloads_ptr,
    is_raw_ptr,  # [num_rows], uint8: which are left out
    is_good_ptr,  # [num_rows, num_layers], uint8: which layers are not
    layers_ptr,
    num_items,
    num_chosen,
    num_layers,
    stride_block,
    stride_row,
    NUM_SIDES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NIBBLES: tl.constexpr,
    ESCAPES: tl.constexpr,
    TOPS: tl.constexpr,
    NEXT: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    # One item is TILE_M tokens of a head.
    HALF: tl.constexpr = HEAD_DIM // 2
    CUTS: tl.constexpr = BLOCK_SIZE // TILE_M
    halves = tl.arange(0, 2)
    columns = tl.arange(0, TILE_N)
    is_inside = (columns < HALF)[None, None, :]  # of [2, TILE_M, TILE_N]
    channels = (halves * HALF)[:, None] + columns[None, :]
    slots = tl.arange(0, _NUM_ESCAPES)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        num_pieces: tl.constexpr = NUM_SIDES * NUM_HEADS * CUTS
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, num_pieces)
        is_good = tl.load(is_good_ptr + row * num_layers + layer) != 0
        if is_good and tl.load(is_raw_ptr + row) == 0:
            side_head = piece // CUTS
            head = side_head % NUM_HEADS
            target_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            target_ptr += (layer * NUM_SIDES * NUM_HEADS + side_head) * (BLOCK_SIZE * HEAD_DIM)
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            layer_ptr += side_head // NUM_HEADS * NEXT
            tokens = piece % CUTS * TILE_M + tl.arange(0, TILE_M)
            places = (tokens * HEAD_DIM)[None, :, None] + channels[:, None, :]
            low_ptr = layer_ptr + head * (BLOCK_SIZE * HEAD_DIM) + places
            low = tl.load(low_ptr, mask=is_inside, other=0).to(tl.int32)
            nibbles_ptr = layer_ptr + NIBBLES + head * (BLOCK_SIZE * HALF)
            nibbles_ptr += (tokens * HALF)[:, None] + columns[None, :]
            nibbles = tl.load(nibbles_ptr, mask=(columns < HALF)[None, :], other=0).to(tl.int32)
            tops_ptr = layer_ptr + TOPS + head * HEAD_DIM + channels
            tops = tl.load(tops_ptr, mask=(columns < HALF)[None, :], other=0).to(tl.int32)
            deltas = nibbles[None, :, :] >> (halves * 4)[:, None, None] & 15
            exponents = tl.where(deltas == _ESCAPED, 0, tops[:, None, :] - deltas & 255)

            escapes_ptr = layer_ptr.to(tl.pointer_type(tl.int32))
            escapes_ptr += ESCAPES // 4 + head * _NUM_ESCAPES
            escapes = tl.load(escapes_ptr + slots)
            begin = piece % CUTS * (TILE_M * HEAD_DIM)
            distances = (escapes & 0xFFFFFF) - begin
            is_here = (distances >= 0) & (distances < TILE_M * HEAD_DIM) & (escapes != _UNUSED)
            if tl.sum(is_here.to(tl.int32), 0) > 0:
                # In order, so that of two with one place the later one wins
                for slot in range(_NUM_ESCAPES):
                    escape = tl.load(escapes_ptr + slot)
                    is_place = (places == (escape & 0xFFFFFF)) & (escape != _UNUSED)
                    exponents = tl.where(is_place, escape >> 24 & 255, exponents)
            bits = (low & 0x80) << 8 | exponents << 7 | (low & 0x7F)
            items = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
            tl.store(target_ptr + places, items, mask=is_inside)
