"""Triton kernels that bring keys and values back from codes of 8, 4 and 2 bits."""

import triton
import triton.language as tl

from kvkernels.triton_kernels.codecs_parts import find_item, minimum_of, round_to, scale_of, spread

_NUM_STAGES = tl.constexpr(3)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "is_raw_ptr", "is_good_ptr"],
)
def _decode_keys_kernel(
    blocks_ptr,  # [num_blocks, num_layers, LAYER], rows of HEAD_DIM
    block_ids_ptr,  # [num_rows]
    payloads_ptr,  # [num_rows, row_bytes], uint8
    is_raw_ptr,  # [num_rows], uint8: which are left out
    is_good_ptr,  # [num_rows, num_layers], uint8: which layers are not
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
    TILE_M: tl.constexpr,  # tokens at a time
    TILE_N: tl.constexpr,  # bytes of codes of each
):
    # One item is a group of tokens, TILE_N bytes wide, as in the kernel that encodes.
    PARTS: tl.constexpr = 8 // NUM_BITS
    WIDTH: tl.constexpr = NUM_CHANNELS // PARTS
    GROUP: tl.constexpr = BLOCK_SIZE // NUM_GROUPS
    COLUMNS: tl.constexpr = NUM_HEADS * WIDTH
    CUTS: tl.constexpr = (COLUMNS + TILE_N - 1) // TILE_N
    levels: tl.constexpr = (1 << NUM_BITS) - 1
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    parts = tl.arange(0, PARTS)
    tokens = tl.arange(0, TILE_M)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, NUM_GROUPS * CUTS)
        is_good = tl.load(is_good_ptr + row * num_layers + layer) != 0
        if is_good and tl.load(is_raw_ptr + row) == 0:
            group = piece // CUTS
            columns = (piece % CUTS) * TILE_N + tl.arange(0, TILE_N)
            is_column = columns < COLUMNS
            heads = columns // WIDTH
            channels = columns % WIDTH
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            places = SCALES // 4 + (heads * NUM_GROUPS + group) * NUM_CHANNELS + channels
            places = places[None, :] + (parts * WIDTH)[:, None]
            words_ptr = layer_ptr.to(tl.pointer_type(tl.int32)) + places
            word = tl.load(words_ptr, mask=is_column[None, :], other=0)
            scale = scale_of(word)[:, None, :]  # [PARTS, 1, TILE_N]
            minimum = minimum_of(word)[:, None, :]
            # int64: blocks and rows times strides overflow int32.
            target_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            target_ptr += layer * LAYER + FIRST + group * (GROUP * HEAD_DIM)
            targets = heads * (BLOCK_SIZE * HEAD_DIM) + channels
            targets = (parts * WIDTH)[:, None, None] + (tokens * HEAD_DIM)[:, None] + targets
            places = CODES + (heads * BLOCK_SIZE + group * GROUP) * WIDTH + channels
            places = places[None, :] + (tokens * WIDTH)[:, None]
            for step in tl.range(0, GROUP // TILE_M, num_stages=_NUM_STAGES):
                codes_ptr = layer_ptr + step * (TILE_M * WIDTH) + places
                packed = tl.load(codes_ptr, mask=is_column[None, :], other=0).to(tl.int32)
                codes = packed[None, :, :] >> (parts * NUM_BITS)[:, None, None] & levels
                numbers = round_to(minimum + scale * codes.to(tl.float32), dtype)
                items_ptr = target_ptr + step * (TILE_M * HEAD_DIM) + targets
                tl.store(items_ptr, numbers, mask=is_column[None, None, :])


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "is_raw_ptr", "is_good_ptr"],
)
def _decode_values_kernel(
    blocks_ptr,  # like those of the keys
    block_ids_ptr,
    payloads_ptr,
    is_raw_ptr,
    is_good_ptr,
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
    TILE_M: tl.constexpr,  # tokens
    TILE_N: tl.constexpr,  # next power of two of the bytes of a token's codes
    TILE_GROUPS: tl.constexpr,  # and of the groups
):
    # One item is TILE_M tokens of one head; heads follow each other in the items' order.
    PARTS: tl.constexpr = 8 // NUM_BITS
    WIDTH: tl.constexpr = NUM_CHANNELS // PARTS
    GROUP: tl.constexpr = NUM_CHANNELS // NUM_GROUPS
    CUTS: tl.constexpr = NUM_HEADS * BLOCK_SIZE // TILE_M
    levels: tl.constexpr = (1 << NUM_BITS) - 1
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    tokens = tl.arange(0, TILE_M)[:, None]
    groups = tl.arange(0, TILE_GROUPS)[None, :]
    columns = tl.arange(0, TILE_N)[None, :]
    is_column = columns < WIDTH
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        is_good = tl.load(is_good_ptr + row * num_layers + layer) != 0
        if is_good and tl.load(is_raw_ptr + row) == 0:
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            start = piece * TILE_M
            places = SCALES // 4 + (start + tokens) * NUM_GROUPS + groups
            word = tl.load(
                layer_ptr.to(tl.pointer_type(tl.int32)) + places, mask=groups < NUM_GROUPS, other=0
            )
            places = CODES + (start + tokens) * WIDTH + columns
            packed = tl.load(layer_ptr + places, mask=is_column, other=0).to(tl.int32)
            target_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            target_ptr += layer * LAYER + FIRST + start * HEAD_DIM
            for part in tl.static_range(PARTS):
                channels = part * WIDTH + columns
                own = spread(word, channels, GROUP, NUM_GROUPS)
                codes = (packed >> (part * NUM_BITS)) & levels
                numbers = scale_of(own) * codes.to(tl.float32)
                numbers = round_to(minimum_of(own) + numbers, dtype)
                tl.store(target_ptr + tokens * HEAD_DIM + channels, numbers, mask=is_column)
