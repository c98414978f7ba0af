"""Meaning of the codecs: which bytes stand for which numbers, and how they are found.

Everything is float32 arithmetic in a fixed order, so every implementation writes the same bytes.
"""

from __future__ import annotations

import torch

from kvkernels.codecs import NUM_ESCAPES, UNUSED_ESCAPE, BlockFormat, LayerFormat, Part, SideFormat
from kvkernels.reference.quantize import (
    LARGEST,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)


def encode_block(block: torch.Tensor, block_format: BlockFormat) -> torch.Tensor | None:
    """The payload of `[num_layers, num_planes, num_kv_heads, block_size, head_dim]`, uint8.

    None where a layer's codec cannot hold the block: an element that is not finite, or past
    float16's range, or more escapes than fit.
    """
    payload = torch.zeros(block_format.payload_bytes, dtype=torch.uint8)
    for layer, layer_format in zip(block, block_format.layers, strict=True):
        data = _layer_bytes(payload, layer_format)
        for side in layer_format.sides:
            if not _encode_side(_view(layer, side), side, data):
                return None
    return payload


def decode_block(payload: torch.Tensor, block_format: BlockFormat) -> torch.Tensor:
    """The inverse of `encode_block`, up to the codec's rounding."""
    layout = block_format.layout
    block = torch.empty(layout.block_shape, dtype=layout.dtype)
    for layer, layer_format in zip(block, block_format.layers, strict=True):
        data = _layer_bytes(payload, layer_format)
        for side in layer_format.sides:
            _view(layer, side).copy_(_decode_side(data, side, layout.dtype))
    return block


def sum_layers(payload: torch.Tensor, block_format: BlockFormat) -> torch.Tensor:
    """`[num_layers, 2]`, int64: sums of a layer's little-endian u32 words w_i and of (i + 1) * w_i.

    Modulo 2^64, as the bits of an unsigned number.
    """
    sums = torch.empty(len(block_format.layers), 2, dtype=torch.int64)
    for layer_sums, layer_format in zip(sums, block_format.layers, strict=True):
        data = _layer_bytes(payload, layer_format).clone()
        words = data.view(torch.int32).long() & 0xFFFFFFFF
        layer_sums[0] = words.sum()
        layer_sums[1] = (words * torch.arange(1, len(words) + 1)).sum()
    return sums


def _layer_bytes(payload: torch.Tensor, layer_format: LayerFormat) -> torch.Tensor:
    return payload[layer_format.offset : layer_format.offset + layer_format.num_bytes]


def _view(layer: torch.Tensor, side: SideFormat) -> torch.Tensor:
    """A side's elements of a layer in the pool."""
    return layer[side.plane, ..., side.channels.start : side.channels.stop]


def _read(data: torch.Tensor, part: Part) -> torch.Tensor:
    piece = data[part.offset : part.offset + part.num_bytes].clone()
    return piece.view(part.dtype).view(part.shape)


def _write(data: torch.Tensor, part: Part, items: torch.Tensor) -> None:
    piece = items.to(part.dtype).contiguous().view(-1).view(torch.uint8)
    data[part.offset : part.offset + part.num_bytes] = piece


def _encode_side(elements: torch.Tensor, side: SideFormat, data: torch.Tensor) -> bool:
    if side.bits == 16:
        _write(data, side.parts[0], elements)
        return True
    if side.bits == 12:
        items = split_exponents(elements)
        if items is None:
            return False
    else:
        if not elements.float().abs().amax() <= LARGEST:  # also where it is not a number
            return False
        quantize = quantize_keys if side.is_key else quantize_values
        items = quantize(elements, side.bits, side.num_groups)
    for part, item in zip(side.parts, items, strict=True):
        _write(data, part, item)
    return True


def _decode_side(data: torch.Tensor, side: SideFormat, dtype: torch.dtype) -> torch.Tensor:
    items = [_read(data, part) for part in side.parts]
    if side.bits == 16:
        return items[0]
    if side.bits == 12:
        return join_exponents(*items)
    if side.is_key:
        return dequantize_keys(items[0], items[1], dtype)
    return dequantize_values(items[0], items[1], len(side.channels), dtype)


def split_exponents(side: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """The four arrays of "l12" for bfloat16 `[num_kv_heads, block_size, head_dim]`.

    A number is its sign and mantissa, 8 bits, and how far its exponent lies below the largest one
    of its channel, 4 bits: 0 to 14. 15 stands for an exponent of zero, or for one in the list of
    escapes: ``position | exponent << 24``, by rising position ``token * head_dim + channel``. None
    if a head has more of those than fit.
    """
    bits = side.view(torch.int16).int() & 0xFFFF
    low = (bits >> 15) << 7 | bits & 127
    exponents = bits >> 7 & 255
    tops = exponents.amax(-2)
    deltas = tops[:, None] - exponents
    escapes = torch.full((side.shape[0], NUM_ESCAPES), UNUSED_ESCAPE, dtype=torch.int64)
    for head in range(side.shape[0]):
        escaped = ((deltas[head] > 14) & (exponents[head] > 0)).view(-1).nonzero()[:, 0]
        if len(escaped) > NUM_ESCAPES:
            return None
        escapes[head, : len(escaped)] = escaped | exponents[head].view(-1)[escaped].long() << 24
    nibbles = deltas.clamp(max=15)
    halves = nibbles.chunk(2, dim=-1)
    return low, halves[0] | halves[1] << 4, escapes, tops


def join_exponents(
    low: torch.Tensor, nibbles: torch.Tensor, escapes: torch.Tensor, tops: torch.Tensor
) -> torch.Tensor:
    """The inverse of `split_exponents`."""
    deltas = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).int()
    exponents = torch.where(deltas == 15, 0, tops[:, None].int() - deltas & 255)
    for head, listed in enumerate(escapes.long() & 0xFFFFFFFF):
        used = listed[listed != UNUSED_ESCAPE]
        places = used & 0xFFFFFF
        is_inside = places < exponents[head].numel()
        exponents[head].view(-1)[places[is_inside]] = (used >> 24)[is_inside].int()
    wide = low.int()
    bits = (wide >> 7) << 15 | exponents << 7 | wide & 127
    return bits.to(torch.int16).view(torch.bfloat16)
