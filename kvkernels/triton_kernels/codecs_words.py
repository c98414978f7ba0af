"""Triton kernels that move layers, or channels of them, as they are, and that sum their words."""

import triton
import triton.language as tl

from kvkernels.triton_kernels.codecs_parts import (
    add_sums,
    find_item,
    total,
    weigh_items,
    weigh_words,
    write_zeros,
)


@triton.jit
def _is_wanted(is_raw_ptr, row, RAW_BLOCKS: tl.constexpr):
    """Whether a block's turn is in this launch; without a preference it always is."""
    is_wanted = True
    if RAW_BLOCKS is not None:
        is_wanted = (tl.load(is_raw_ptr + row) != 0) == RAW_BLOCKS
    return is_wanted


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "sums_ptr", "is_raw_ptr"],
)
def _copy_out_kernel(
    blocks_ptr,  # [num_blocks, words of a block], int32
    block_ids_ptr,  # [num_rows]
    payloads_ptr,  # [num_rows, row_bytes], uint8
    sums_ptr,  # [num_rows, num_layers, 2], int64, is added to
    is_raw_ptr,  # [num_rows], uint8
    layers_ptr,  # [num_chosen, 2]: layers that are written raw, and where they begin
    num_items,
    num_chosen,
    num_layers,
    stride_block,  # in words, like all
    stride_row,
    LAYER: tl.constexpr,  # words of a layer in the pool
    NUM_WORDS: tl.constexpr,  # and of it in a payload, zeros at its end included
    RAW_BLOCKS: tl.constexpr,  # whether only blocks that are raw, or not, are; None for all
    TILE: tl.constexpr,
):
    CUTS: tl.constexpr = (NUM_WORDS + TILE - 1) // TILE
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        if _is_wanted(is_raw_ptr, row, RAW_BLOCKS):
            places = piece * TILE + tl.arange(0, TILE)
            source_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            words = tl.load(source_ptr + layer * LAYER + places, mask=places < LAYER, other=0)
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            words_ptr = layer_ptr.to(tl.pointer_type(tl.int32)) + places
            tl.store(words_ptr, words, mask=places < NUM_WORDS)
            plain, weighted = weigh_words(words, places)
            add_sums(sums_ptr, row, layer, num_layers, total(plain), total(weighted))


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "is_raw_ptr", "is_good_ptr"],
)
def _copy_in_kernel(
    blocks_ptr,  # as above
    block_ids_ptr,
    payloads_ptr,
    is_raw_ptr,
    is_good_ptr,  # [num_rows, num_layers], uint8: which layers are written
    layers_ptr,
    num_items,
    num_chosen,
    num_layers,
    stride_block,
    stride_row,
    LAYER: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    RAW_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    CUTS: tl.constexpr = (NUM_WORDS + TILE - 1) // TILE
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        is_good = tl.load(is_good_ptr + row * num_layers + layer) != 0
        if is_good and _is_wanted(is_raw_ptr, row, RAW_BLOCKS):
            places = piece * TILE + tl.arange(0, TILE)
            is_inside = places < LAYER
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            words = tl.load(layer_ptr.to(tl.pointer_type(tl.int32)) + places, mask=is_inside)
            target_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            tl.store(target_ptr + layer * LAYER + places, words, mask=is_inside)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "sums_ptr"],
)
def _copy_channels_out_kernel(
    blocks_ptr,  # [num_blocks, num_layers, LAYER], rows of HEAD_DIM, int16 or int32
    block_ids_ptr,
    payloads_ptr,
    sums_ptr,
    layers_ptr,
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
    START: tl.constexpr,  # where they begin in the payload's layer, in elements
    END: tl.constexpr,  # and end, in bytes
    NEXT: tl.constexpr,  # where the next side begins, or the layer ends
    TILE_M: tl.constexpr,  # tokens
    TILE_N: tl.constexpr,  # next power of two of the channels
):
    # One item is TILE_M tokens of one head; heads follow each other in the items' order.
    CUTS: tl.constexpr = NUM_HEADS * BLOCK_SIZE // TILE_M
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    columns = tl.arange(0, TILE_N)[None, :]
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        tokens = piece * TILE_M + tl.arange(0, TILE_M)[:, None]
        is_inside = tl.broadcast_to(columns < NUM_CHANNELS, [TILE_M, TILE_N])
        source_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
        source_ptr += layer * LAYER + FIRST
        items = tl.load(source_ptr + tokens * HEAD_DIM + columns, mask=is_inside, other=0)
        layer_ptr = payloads_ptr + row * stride_row * 4 + offset
        places = START + tokens * NUM_CHANNELS + columns
        tl.store(layer_ptr.to(tl.pointer_type(dtype)) + places, items, mask=is_inside)
        plain, weighted = weigh_items(items, places)
        add_sums(sums_ptr, row, layer, num_layers, total(plain), total(weighted))
        if piece == CUTS - 1:
            write_zeros(layer_ptr, END, NEXT)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["block_ids_ptr", "is_raw_ptr", "is_good_ptr"],
)
def _copy_channels_in_kernel(
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
    LAYER: tl.constexpr,
    FIRST: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    START: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
):
    CUTS: tl.constexpr = NUM_HEADS * BLOCK_SIZE // TILE_M
    dtype: tl.constexpr = blocks_ptr.dtype.element_ty
    columns = tl.arange(0, TILE_N)[None, :]
    is_inside = columns < NUM_CHANNELS
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        is_good = tl.load(is_good_ptr + row * num_layers + layer) != 0
        if is_good and tl.load(is_raw_ptr + row) == 0:
            tokens = piece * TILE_M + tl.arange(0, TILE_M)[:, None]
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            places = START + tokens * NUM_CHANNELS + columns
            items = tl.load(layer_ptr.to(tl.pointer_type(dtype)) + places, mask=is_inside)
            target_ptr = blocks_ptr + tl.load(block_ids_ptr + row) * stride_block
            target_ptr += layer * LAYER + FIRST
            tl.store(target_ptr + tokens * HEAD_DIM + columns, items, mask=is_inside)


@triton.jit(
    do_not_specialize=["num_items", "num_chosen", "num_layers"],
    do_not_specialize_on_alignment=["sums_ptr", "is_raw_ptr"],
)
def _sum_layers_kernel(
    payloads_ptr,  # as above
    sums_ptr,
    is_raw_ptr,
    layers_ptr,
    num_items,
    num_chosen,
    num_layers,
    stride_row,
    NUM_WORDS: tl.constexpr,
    RAW_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    CUTS: tl.constexpr = (NUM_WORDS + TILE - 1) // TILE
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        row, layer, offset, piece = find_item(item, layers_ptr, num_chosen, CUTS)
        if _is_wanted(is_raw_ptr, row, RAW_BLOCKS):
            places = piece * TILE + tl.arange(0, TILE)
            layer_ptr = payloads_ptr + row * stride_row * 4 + offset
            words = tl.load(
                layer_ptr.to(tl.pointer_type(tl.int32)) + places, mask=places < NUM_WORDS, other=0
            )
            plain, weighted = weigh_words(words, places)
            add_sums(sums_ptr, row, layer, num_layers, total(plain), total(weighted))
