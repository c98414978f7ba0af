"""Meaning of 8- and 4-bit codes: the exact values they stand for, and how they are found."""

import torch


def unpack_codes(codes: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Codes one an element, `[..., head_dim]`, uint8, from one or two a byte."""
    if codes.shape[-1] == head_dim:
        return codes
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def dequantize_keys(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[..., block_size, head_dim]` from codes and `[..., key_groups, head_dim, 2]` scales.

    Computed in float32, or in float64 where that is asked for, and then rounded to `dtype`.
    """
    head_dim = scales.shape[-2]
    wide = torch.promote_types(dtype, torch.float32)
    groups = unpack_codes(codes, head_dim).to(wide)
    groups = groups.unflatten(-2, (scales.shape[-3], -1))
    scale, minimum = scales.to(wide)[..., None, :, :].unbind(-1)
    return (minimum + scale * groups).flatten(-3, -2).to(dtype)


def dequantize_values(
    codes: torch.Tensor, scales: torch.Tensor, head_dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """`[..., block_size, head_dim]` from codes and `[..., block_size, value_groups, 2]` scales."""
    wide = torch.promote_types(dtype, torch.float32)
    groups = unpack_codes(codes, head_dim).to(wide)
    groups = groups.unflatten(-1, (scales.shape[-2], -1))
    scale, minimum = scales.to(wide)[..., None, :].unbind(-1)
    return (minimum + scale * groups).flatten(-2).to(dtype)


def _quantize(groups: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `[..., size]` that share a scale, and `[..., 2]` scale and minimum as float16.

    The minimum is rounded down and the scale up, so no element lies outside the range of codes,
    and the codes are found with the rounded two: the error of an element is at most half a scale.
    """
    lowest, highest = groups.amin(-1), groups.amax(-1)
    minimum = round_to_half(lowest, -torch.inf)
    scale = round_to_half((highest - minimum.float()) / levels, torch.inf)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    codes = ((groups - minimum.float()[..., None]) * inverse[..., None]).round()
    return codes.clamp(0, levels).to(torch.uint8), torch.stack([scale, minimum], dim=-1)


def round_to_half(values: torch.Tensor, toward: float) -> torch.Tensor:
    """float16 from float32, rounded up or down: toward `toward`, an infinity."""
    rounded = values.half()
    is_past = rounded.float() < values if toward > 0 else rounded.float() > values
    limit = torch.full_like(rounded, toward)
    return torch.where(is_past, torch.nextafter(rounded, limit), rounded)


def quantize_keys(
    keys: torch.Tensor, num_bits: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `[..., block_size, head_dim]`; see `dequantize_keys`."""
    groups = keys.float().unflatten(-2, (num_groups, -1)).transpose(-1, -2)
    codes, scales = _quantize(groups, (1 << num_bits) - 1)
    return pack_codes(codes.transpose(-1, -2).flatten(-3, -2), num_bits), scales


def quantize_values(
    values: torch.Tensor, num_bits: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `[..., block_size, head_dim]`; see `dequantize_values`."""
    groups = values.float().unflatten(-1, (num_groups, -1))
    codes, scales = _quantize(groups, (1 << num_bits) - 1)
    return pack_codes(codes.flatten(-2), num_bits), scales


def pack_codes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of `unpack_codes`."""
    if num_bits == 8:
        return codes
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)
