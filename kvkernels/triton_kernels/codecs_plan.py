"""Plans the launches that turn blocks of a pool into payloads, and back: tiles and arguments."""

from __future__ import annotations

import torch
import triton

from kvkernels.codecs import LayerFormat, SideFormat
from kvkernels.layout import KVLayout
from kvkernels.triton_kernels.codecs_decode import _decode_keys_kernel, _decode_values_kernel
from kvkernels.triton_kernels.codecs_encode import _encode_keys_kernel, _encode_values_kernel
from kvkernels.triton_kernels.codecs_lossless import (
    _decode_lossless_kernel,
    _encode_lossless_kernel,
)
from kvkernels.triton_kernels.codecs_words import (
    _copy_channels_in_kernel,
    _copy_channels_out_kernel,
    _copy_in_kernel,
    _copy_out_kernel,
    _sum_layers_kernel,
)
from kvkernels.triton_kernels.codecs_work import NUM_WARPS, Layers, Work
from kvkernels.triton_kernels.launch import Launch

_TILE_BYTES = 1024  # of codes at a time: 8 a thread
_MAX_COLUMNS = 256
_VALUE_ELEMENTS = 4096
# The bits of 65408, the largest number quantisers take (see `kvkernels.reference.quantize`); for
# bfloat16 those of the next number below it.
_LIMITS = {torch.float32: 0x477F8000, torch.float16: 0x7BFC, torch.bfloat16: 0x477F}


def _key_tile(side: SideFormat, layout: KVLayout) -> tuple[int, dict[str, int]]:
    """Pieces of a side that is coded like keys, and their constants."""
    group = layout.block_size // side.num_groups
    num_columns = layout.num_kv_heads * len(side.channels) * side.bits // 8
    columns = min(_MAX_COLUMNS, triton.next_power_of_2(num_columns))
    tokens = min(group, max(4, _TILE_BYTES // columns))
    constants = _code_constants(side) | {"TILE_M": tokens, "TILE_N": columns}
    return side.num_groups * triton.cdiv(num_columns, columns), constants


def _value_tile(side: SideFormat, layout: KVLayout) -> tuple[int, dict[str, int]]:
    """Pieces of a side that is coded like values, and their constants."""
    num_channels = len(side.channels)
    groups = triton.next_power_of_2(side.num_groups)
    group = triton.next_power_of_2(num_channels // side.num_groups)
    width = triton.next_power_of_2(num_channels * side.bits // 8)
    widest = max(groups * group, width * 8 // side.bits)
    # Before Triton 3.9 the compiler fails on a gather from a tensor with less than one element for
    # each thread (triton-lang/triton#11600).
    fewest = 32 * NUM_WARPS // groups if groups > 1 else 1
    tokens = max(fewest, _VALUE_ELEMENTS // widest)
    tokens = min(layout.block_size, tokens)
    constants = {"TILE_M": tokens, "TILE_N": width, "TILE_GROUPS": groups}
    num_pieces = layout.num_kv_heads * layout.block_size // tokens
    return num_pieces, _code_constants(side) | constants


def _num_value_warps(constants: dict[str, int]) -> int:
    """Warps that have a group of a token for every thread; see `_value_tile`."""
    if constants["TILE_GROUPS"] == 1:
        return NUM_WARPS
    return max(1, min(NUM_WARPS, constants["TILE_M"] * constants["TILE_GROUPS"] // 32))


def _channel_tile(side: SideFormat, layout: KVLayout) -> tuple[int, dict[str, int]]:
    """Pieces of a side that is written as it is, and their constants."""
    width = triton.next_power_of_2(len(side.channels))
    tokens = min(layout.block_size, max(1, _VALUE_ELEMENTS // width))
    start = side.parts[0].offset // layout.dtype.itemsize
    constants = {"START": start, "TILE_M": tokens, "TILE_N": width}
    return layout.num_kv_heads * layout.block_size // tokens, constants


def _code_constants(side: SideFormat) -> dict[str, int]:
    codes, scales = (part.offset for part in side.parts)
    constants = {"CODES": codes, "SCALES": scales}
    return constants | {"NUM_BITS": side.bits, "NUM_GROUPS": side.num_groups}


def _lossless_tile(layer: LayerFormat, layout: KVLayout) -> dict[str, int]:
    half = triton.next_power_of_2(layout.head_dim // 2)
    _, nibbles, escapes, tops = (part.offset for part in layer.sides[0].parts)
    tokens = min(layout.block_size, max(4, _TILE_BYTES // half))
    constants = {"NIBBLES": nibbles, "ESCAPES": escapes, "TOPS": tops}
    constants |= {"NEXT": _next_offset(layer, 0), "NUM_SIDES": len(layer.sides)}
    return constants | {"TILE_M": tokens, "TILE_N": half}


def _next_offset(layer: LayerFormat, index: int) -> int:
    """Where the side behind one begins in its layer, or the layer ends."""
    is_last = index + 1 == len(layer.sides)
    return layer.num_bytes if is_last else layer.sides[index + 1].parts[0].offset


def plan_encode(work: Work, sums: torch.Tensor) -> list[Launch]:
    """The launches that write all blocks by the format."""
    launches = []
    for layer, layers in work.layers():
        if layer.is_raw:
            launches.append(work.copy(_copy_out_kernel, layers, None, sums_ptr=sums, **work.words))
        elif layer.codec.name == "l12":
            launches.append(_plan_encode_lossless(work, layer, layers, sums))
        else:
            launches += [
                _plan_encode_side(work, layer, index, layers, sums)
                for index in range(len(layer.sides))
            ]
    return launches


def _plan_encode_lossless(
    work: Work, layer: LayerFormat, layers: Layers, sums: torch.Tensor
) -> Launch:
    layout = work.block_format.layout
    constants = _lossless_tile(layer, layout)
    constants |= {"END": layer.sides[0].end, "NUM_BYTES": layer.num_bytes}
    pieces = constants["NUM_SIDES"] * layout.num_kv_heads
    # Wide heads have larger tiles, for which four warps lack registers.
    num_warps = 2 * NUM_WARPS if constants["TILE_N"] > _MAX_COLUMNS else NUM_WARPS
    arguments = {"sums_ptr": sums, **work.raw_flags, **work.rows}
    return work.launch(_encode_lossless_kernel, layers, pieces, num_warps, **arguments, **constants)


def _plan_encode_side(
    work: Work, layer: LayerFormat, index: int, layers: Layers, sums: torch.Tensor
) -> Launch:
    layout, side = work.block_format.layout, layer.sides[index]
    more = {"sums_ptr": sums, "END": side.end, "NEXT": _next_offset(layer, index)}
    if side.bits == 16:
        pieces, constants = _channel_tile(side, layout)
        arguments = work.bits(side) | more
        return work.launch(_copy_channels_out_kernel, layers, pieces, **arguments, **constants)
    arguments = work.elements(side) | more | work.raw_flags | {"LIMIT": _LIMITS[layout.dtype]}
    if side.is_key:
        pieces, constants = _key_tile(side, layout)
        # With four codes a byte, the scales and minima of a byte take more registers than four
        # warps have.
        num_warps = 2 * NUM_WARPS if side.bits == 2 else NUM_WARPS
        return work.launch(_encode_keys_kernel, layers, pieces, num_warps, **arguments, **constants)
    pieces, constants = _value_tile(side, layout)
    num_warps = _num_value_warps(constants)
    constants["TILE_GROUP"] = triton.next_power_of_2(len(side.channels) // side.num_groups)
    return work.launch(_encode_values_kernel, layers, pieces, num_warps, **arguments, **constants)


def plan_encode_raw(work: Work, sums: torch.Tensor) -> list[Launch]:
    """The launch that writes the blocks that are raw."""
    arguments = {"sums_ptr": sums, **work.words}
    return [work.copy(_copy_out_kernel, work.raw_layers, True, **arguments)]


def plan_sums(work: Work, sums: torch.Tensor) -> list[Launch]:
    """The launches that sum the layers of payloads."""
    launches = [
        work.copy(_sum_layers_kernel, layers, False, sums_ptr=sums) for _, layers in work.layers()
    ]
    if holds_raw(work):
        launches.append(work.copy(_sum_layers_kernel, work.raw_layers, True, sums_ptr=sums))
    return launches


def plan_decode(work: Work, is_good: torch.Tensor) -> list[Launch]:
    """The launches that bring good layers back."""
    layout = work.block_format.layout
    flags = {"is_good_ptr": is_good.view(torch.uint8)}
    launches = []
    for layer, layers in work.layers():
        if layer.is_raw:
            launches.append(work.copy(_copy_in_kernel, layers, False, **flags, **work.words))
        elif layer.codec.name == "l12":
            constants = _lossless_tile(layer, layout)
            pieces = layout.num_kv_heads * layout.block_size // constants["TILE_M"]
            pieces *= constants["NUM_SIDES"]
            arguments = {**flags, **work.raw_flags, **work.rows}
            launches.append(
                work.launch(_decode_lossless_kernel, layers, pieces, **arguments, **constants)
            )
        else:
            launches += [_plan_decode_side(work, side, layers, flags) for side in layer.sides]
    if holds_raw(work):
        launches.append(work.copy(_copy_in_kernel, work.raw_layers, True, **flags, **work.words))
    return launches


def _plan_decode_side(
    work: Work, side: SideFormat, layers: Layers, flags: dict[str, torch.Tensor]
) -> Launch:
    layout = work.block_format.layout
    flags = flags | work.raw_flags
    if side.bits == 16:
        pieces, constants = _channel_tile(side, layout)
        arguments = flags | work.bits(side)
        return work.launch(_copy_channels_in_kernel, layers, pieces, **arguments, **constants)
    arguments = flags | work.elements(side)
    if side.is_key:
        pieces, constants = _key_tile(side, layout)
        return work.launch(_decode_keys_kernel, layers, pieces, **arguments, **constants)
    pieces, constants = _value_tile(side, layout)
    num_warps = _num_value_warps(constants)
    return work.launch(_decode_values_kernel, layers, pieces, num_warps, **arguments, **constants)


def holds_raw(work: Work) -> bool:
    """Whether rows of payloads are wide enough for blocks that are raw."""
    return work.payloads.shape[1] >= work.block_format.raw.payload_bytes
