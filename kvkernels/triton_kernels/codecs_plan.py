"""Plans the launches that turn blocks of a pool into payloads, and back: tiles and arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kvkernels.codecs import BlockFormat, LayerFormat, SideFormat
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
from kvkernels.triton_kernels.launch import Device, Launch

_TILE_BYTES = 1024  # of codes at a time: 8 a thread
_MAX_COLUMNS = 256
_VALUE_ELEMENTS = 4096
_TILE_WORDS = 4096
_NUM_WARPS = 4
# Without this, the assembler sometimes spills a few bytes to stay at a round number of registers.
_MAX_REGISTERS = 255
# Programs per multiprocessor where the caller sets no bound: more than run at once.
_MAX_PROGRAMS = 32
# The bits of 65408, the largest number quantisers take (see `kvkernels.reference.codecs`); for
# bfloat16 those of the next number below it.
_LIMITS = {torch.float32: 0x477F8000, torch.float16: 0x7BFC, torch.bfloat16: 0x477F}

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes

Layers = list[tuple[int, LayerFormat]]


@functools.cache
def _layer_table(entries: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """`[layers, 2]`, int64, kept for good: layers, and where they begin in units of 64 bytes."""
    with torch.inference_mode(False):
        table = torch.tensor(entries, dtype=torch.int64)
        if device.type == "cuda":  # pinned, so that nobody waits
            return table.pin_memory().to(device, non_blocking=True)
        return table.to(device)


@dataclass(frozen=True)
class Work:
    """What the launches of a call share; see `encode_blocks` for the tensors.

    Attributes:
        device: Where they run.
        num_programs: At most so many at once; None for no bound.
        chosen: The layers it is about; None for all.
    """

    blocks: torch.Tensor
    block_ids: torch.Tensor
    block_format: BlockFormat
    payloads: torch.Tensor
    is_raw: torch.Tensor
    device: Device
    num_programs: int | None
    chosen: range | None = None

    def launch(
        self,
        kernel: Any,
        layers: Layers,
        num_pieces: int,
        num_warps: int = _NUM_WARPS,
        **arguments: Any,
    ) -> Launch:
        """A kernel for some layers of all blocks, each in so many pieces."""
        num_items = len(self.block_ids) * len(layers) * num_pieces
        bound = self.num_programs or _MAX_PROGRAMS * self.device.num_multiprocessors
        entries = tuple((index, layer.offset // 64) for index, layer in layers)
        common = {
            "payloads_ptr": self.payloads,
            "is_raw_ptr": self.is_raw.view(torch.uint8),
            "layers_ptr": _layer_table(entries, self.blocks.device),
            "num_items": num_items,
            "num_chosen": len(layers),
            "num_layers": self.block_format.layout.num_layers,
            "stride_row": self.payloads.stride(0) // 4,
        }
        return Launch(
            kernel,
            (min(num_items, bound),),
            common | arguments,
            num_warps,
            max_registers=_MAX_REGISTERS,
            fp_fusion=False,
        )

    @property
    def rows(self) -> dict[str, Any]:
        """Arguments that say where blocks lie, for kernels of elements."""
        layout = self.block_format.layout
        return {
            "blocks_ptr": self.blocks,
            "block_ids_ptr": self.block_ids,
            "stride_block": self.blocks.stride(0),
            "NUM_HEADS": layout.num_kv_heads,
            "BLOCK_SIZE": layout.block_size,
            "HEAD_DIM": layout.head_dim,
        }

    def elements(self, side: SideFormat) -> dict[str, Any]:
        """The same for kernels of one side of a layer."""
        layout = self.block_format.layout
        plane = layout.num_kv_heads * layout.block_size * layout.head_dim
        return self.rows | {
            "LAYER": layout.num_planes * plane,
            "FIRST": side.plane * plane + side.channels.start,
            "NUM_CHANNELS": len(side.channels),
        }

    def bits(self, side: SideFormat) -> dict[str, Any]:
        """The same for kernels that see elements as integers."""
        as_integers = self.blocks.view(_INTEGERS[self.blocks.itemsize])
        return self.elements(side) | {"blocks_ptr": as_integers}

    @property
    def words(self) -> dict[str, Any]:
        """Arguments for kernels of words, whatever the elements are."""
        words = self.blocks.flatten(1).view(torch.int32)
        return {
            "blocks_ptr": words,
            "block_ids_ptr": self.block_ids,
            "stride_block": words.stride(0),
            "LAYER": words.shape[1] // self.block_format.layout.num_layers,
        }

    def layers(self) -> Iterator[tuple[LayerFormat, Layers]]:
        """Layers by codec: how one of them is written, and which they are."""
        found: dict[str, Layers] = {}
        for index, layer in self._choose(self.block_format):
            found.setdefault(layer.codec.name, []).append((index, layer))
        for layers in found.values():
            yield layers[0][1], layers

    def copy(
        self, kernel: Any, layers: Layers, raw_blocks: bool | None, **arguments: Any
    ) -> Launch:
        """A kernel of words, for blocks that are raw, those that are not, or all."""
        num_words = layers[0][1].num_bytes // 4
        return self.launch(
            kernel,
            layers,
            triton.cdiv(num_words, _TILE_WORDS),
            _NUM_WARPS,
            NUM_WORDS=num_words,
            RAW_BLOCKS=raw_blocks,
            TILE=_TILE_WORDS,
            **arguments,
        )

    @property
    def raw_layers(self) -> Layers:
        """The layers as a block has them that is written raw."""
        return self._choose(self.block_format.raw)

    def _choose(self, block_format: BlockFormat) -> Layers:
        layers = list(enumerate(block_format.layers))
        return layers if self.chosen is None else layers[self.chosen.start : self.chosen.stop]


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
    fewest = 32 * _NUM_WARPS // groups if groups > 1 else 1
    tokens = max(fewest, _VALUE_ELEMENTS // widest)
    tokens = min(layout.block_size, tokens)
    constants = {"TILE_M": tokens, "TILE_N": width, "TILE_GROUPS": groups}
    num_pieces = layout.num_kv_heads * layout.block_size // tokens
    return num_pieces, _code_constants(side) | constants


def _num_value_warps(constants: dict[str, int]) -> int:
    """Warps that have a group of a token for every thread; see `_value_tile`."""
    if constants["TILE_GROUPS"] == 1:
        return _NUM_WARPS
    return max(1, min(_NUM_WARPS, constants["TILE_M"] * constants["TILE_GROUPS"] // 32))


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
    num_warps = 2 * _NUM_WARPS if constants["TILE_N"] > _MAX_COLUMNS else _NUM_WARPS
    arguments = {"sums_ptr": sums, **work.rows}
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
    arguments = work.elements(side) | more | {"LIMIT": _LIMITS[layout.dtype]}
    if side.is_key:
        pieces, constants = _key_tile(side, layout)
        # With four codes a byte, the scales and minima of a byte take more registers than four
        # warps have.
        num_warps = 2 * _NUM_WARPS if side.bits == 2 else _NUM_WARPS
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
            arguments = {**flags, **work.rows}
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
