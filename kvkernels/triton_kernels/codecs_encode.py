"""Triton kernels that write keys and values as codes of 8, 4 and 2 bits."""

import triton
import triton.language as tl

from kvkernels.triton_kernels.codecs_parts import (
    add_sums,
    find_item,
    find_scales,
    magnitudes,
    spread,
    to_codes,
    total,
    weigh_bytes,
    weigh_steps,
    weigh_words,
    widen,
    write_zeros,
)

_NUM_STAGES = tl.constexpr(3)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "sums_ptr", "is_raw_ptr"],
)
def _encode_keys_kernel(
    blocks_ptr,  # [num_blocks, num_layers, LAYER], rows of HEAD_DIM
    block_ids_ptr,  # [num_rows]
    payloads_ptr,  # [num_rows, row_bytes], uint8
    sums_ptr,  # [num_rows, num_layers, 2], int64, is added to
    is_raw_ptr,  # [num_rows], uint8, gets 1 for what codes do not hold
    layers_ptr,  # [num_chosen, 2]: layers of this codec, and where they begin
    num_items,
    num_chosen,
    num_layers,
    stride_block,  # in elements
    stride_row,  # in words
    LAYER: tl.constexpr,  # elements of a layer
    FIRST: tl.constexpr,  # the first that is written
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,  # of those of HEAD_DIM
    NUM_BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # of tokens
    CODES: tl.constexpr,  # where parts of a layer begin, in bytes
    SCALES: tl.constexpr,
    END: tl.constexpr,  # of the scales
    NEXT: tl.constexpr,  # where the next side begins, or the layer ends
    LIMIT: tl.constexpr,  # bits of float16's greatest number, in the type of the elements
    TILE_M: tl.constexpr,  # tokens at a time, a multiple of 4
    TILE_N: tl.constexpr,  # bytes of codes of each
):
    # One item is a group of tokens, TILE_N bytes wide. The columns of all heads lie beside each
    # other, so that one head's few bytes do not leave a warp half idle. A thread keeps to its
    # column and reads the tokens twice: for the range, then (from a cache) for the codes.
    PARTS: tl.constexpr = 8 // NUM_BITS  # codes a byte, of channels WIDTH apart
    WIDTH: tl.constexpr = NUM_CHANNELS // PARTS
    GROUP: tl.constexpr = BLOCK_SIZE // NUM_GROUPS
    COLUMNS: tl.constexpr = NUM_HEADS * WIDTH
    CUTS: tl.constexpr = (COLUMNS + TILE_N - 1) // TILE_N
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    parts = tl.arange(0, PARTS)
    tokens = tl.arange(0, TILE_M)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, NUM_GROUPS * CUTS)
        group = piece // CUTS
        columns = (piece % CUTS) * TILE_N + tl.arange(0, TILE_N)
        is_column = columns < COLUMNS
        heads = columns // WIDTH
        channels = columns % WIDTH
        # int64: blocks and rows times strides overflow int32.
        source_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
        source_ptr += layer * LAYER + FIRST + group * (GROUP * HEAD_DIM)
        sources = heads * (BLOCK_SIZE * HEAD_DIM) + channels  # [TILE_N]
        sources = (parts * WIDTH)[:, None, None] + (tokens * HEAD_DIM)[:, None] + sources
        is_inside = is_column[None, None, :]  # of [PARTS, TILE_M, TILE_N]
        lowest = tl.full([PARTS, TILE_M, TILE_N], float("inf"), tl.float32)
        highest = tl.full([PARTS, TILE_M, TILE_N], -float("inf"), tl.float32)
        farthest = tl.zeros([PARTS, TILE_M, TILE_N], tl.int32)
        for step in tl.range(0, GROUP // TILE_M, num_stages=_NUM_STAGES):
            items_ptr = source_ptr + step * (TILE_M * HEAD_DIM) + sources
            items = tl.load(items_ptr, mask=is_inside, other=0)
            numbers = widen(items)
            lowest = tl.minimum(lowest, numbers)
            highest = tl.maximum(highest, numbers)
            farthest = tl.maximum(farthest, magnitudes(items))
        if tl.max(tl.max(tl.max(farthest, 2), 1), 0) > LIMIT:
            tl.store(is_raw_ptr + row, 1)

        lowest = tl.min(lowest, 1)
        highest = tl.max(highest, 1)
        word, low, inverse, top = find_scales(lowest, highest, NUM_BITS, dtype)
        layer_ptr = payloads_ptr + row * stride_row * 4 + offset
        places = SCALES // 4 + (heads * NUM_GROUPS + group) * NUM_CHANNELS + channels
        places = places[None, :] + (parts * WIDTH)[:, None]
        is_word = tl.broadcast_to(is_column[None, :], [PARTS, TILE_N])
        tl.store(layer_ptr.to(tl.pointer_type(tl.int32)) + places, word, mask=is_word)
        word_plain, word_weighted = weigh_words(tl.where(is_word, word, 0), places)

        places = CODES + (heads * BLOCK_SIZE + group * GROUP) * WIDTH + channels
        places = places[None, :] + (tokens * WIDTH)[:, None]
        counts = tl.zeros([TILE_M, TILE_N], tl.int32)
        levers = tl.zeros([TILE_M, TILE_N], tl.int32)
        for step in tl.range(0, GROUP // TILE_M, num_stages=_NUM_STAGES):
            items_ptr = source_ptr + step * (TILE_M * HEAD_DIM) + sources
            numbers = widen(tl.load(items_ptr, mask=is_inside, other=0))
            steps = low[:, None, :], inverse[:, None, :], top[:, None, :]
            codes = to_codes(numbers, *steps, NUM_BITS)
            packed = tl.sum(codes << (parts * NUM_BITS)[:, None, None], 0)
            packed = tl.where(is_column[None, :], packed, 0)
            codes_ptr = layer_ptr + step * (TILE_M * WIDTH) + places
            tl.store(codes_ptr, packed.to(tl.uint8), mask=is_column[None, :])
            counts += packed
            levers += packed * step
        plain, weighted = weigh_steps(counts, levers, places, TILE_M * WIDTH)
        plain = total(word_plain) + total(plain)
        weighted = total(word_weighted) + total(weighted)
        add_sums(sums_ptr, row, layer, num_layers, plain, weighted)
        if piece == NUM_GROUPS * CUTS - 1:
            write_zeros(layer_ptr, END, NEXT)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "sums_ptr", "is_raw_ptr"],
)
def _encode_values_kernel(
    blocks_ptr,  # like those of the keys
    block_ids_ptr,
    payloads_ptr,
    sums_ptr,
    is_raw_ptr,
    layers_ptr,
    num_items,
    num_chosen,
    num_layers,
    stride_block,
    stride_row,
    LAYER: tl.constexpr,
    FIRST: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,  # of channels
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    END: tl.constexpr,
    NEXT: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE_M: tl.constexpr,  # tokens
    TILE_N: tl.constexpr,  # next power of two of the bytes of a token's codes
    TILE_GROUPS: tl.constexpr,  # and of the groups
    TILE_GROUP: tl.constexpr,  # and of the channels of one
):
    # One item is TILE_M tokens of one head; heads follow each other in the items' order.
    PARTS: tl.constexpr = 8 // NUM_BITS
    WIDTH: tl.constexpr = NUM_CHANNELS // PARTS
    GROUP: tl.constexpr = NUM_CHANNELS // NUM_GROUPS
    CUTS: tl.constexpr = NUM_HEADS * BLOCK_SIZE // TILE_M
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    tokens = tl.arange(0, TILE_M)[:, None]
    groups = tl.arange(0, TILE_GROUPS)[None, :]
    members = tl.arange(0, TILE_GROUP)[None, None, :]
    columns = tl.arange(0, TILE_N)[None, :]
    is_column = columns < WIDTH
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        source_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
        start = piece * TILE_M
        source_ptr += layer * LAYER + FIRST + start * HEAD_DIM
        layer_ptr = payloads_ptr + row * stride_row * 4 + offset
        # Read group by group to find the ranges, and a second time, from L1, in the order of the
        # codes: the channels that share a byte may belong to different groups.
        channels = groups[:, :, None] * GROUP + members
        is_inside = (groups < NUM_GROUPS)[:, :, None] & (members < GROUP)
        items = tl.load(
            source_ptr + tokens[:, :, None] * HEAD_DIM + channels, mask=is_inside, other=0
        )
        farthest = tl.max(tl.max(tl.max(magnitudes(items), 2), 1), 0)
        numbers = widen(items)
        lowest = tl.min(tl.where(members < GROUP, numbers, float("inf")), 2)
        highest = tl.max(tl.where(members < GROUP, numbers, -float("inf")), 2)
        word, low, inverse, top = find_scales(lowest, highest, NUM_BITS, dtype)
        places = SCALES // 4 + (start + tokens) * NUM_GROUPS + groups
        is_group = tl.broadcast_to(groups < NUM_GROUPS, [TILE_M, TILE_GROUPS])
        tl.store(layer_ptr.to(tl.pointer_type(tl.int32)) + places, word, mask=is_group)
        plain, weighted = weigh_words(tl.where(is_group, word, 0), places)

        packed = tl.zeros([TILE_M, TILE_N], tl.int32)
        for part in tl.static_range(PARTS):
            channels = part * WIDTH + columns
            items = tl.load(source_ptr + tokens * HEAD_DIM + channels, mask=is_column, other=0)
            codes = to_codes(
                widen(items),
                spread(low, channels, GROUP, NUM_GROUPS),
                spread(inverse, channels, GROUP, NUM_GROUPS),
                spread(top, channels, GROUP, NUM_GROUPS),
                NUM_BITS,
            )
            packed |= codes << (part * NUM_BITS)
        packed = tl.where(is_column, packed, 0)
        places = CODES + (start + tokens) * WIDTH + columns
        tl.store(layer_ptr + places, packed.to(tl.uint8), mask=is_column)
        more_plain, more_weighted = weigh_bytes(packed, places)
        plain = total(plain) + total(more_plain)
        weighted = total(weighted) + total(more_weighted)
        add_sums(sums_ptr, row, layer, num_layers, plain, weighted)
        if piece == CUTS - 1:
            write_zeros(layer_ptr, END, NEXT)
        if farthest > LIMIT:
            tl.store(is_raw_ptr + row, 1)
