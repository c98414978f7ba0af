"""Meaning of codes of 8, 4 and 2 bits: the exact values they stand for, and how they are found."""

import torch

# The largest magnitude that quantisers take. Rounding of the scale lets codes restore numbers
# slightly beyond the range: above this bound one could exceed float16's largest number, 65504.
LARGEST = 65408.0


def unpack_codes(codes: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Codes one an element, `[..., head_dim]`, uint8, from one, two or four a byte."""
    per_byte = head_dim // codes.shape[-1]
    bits = 8 // per_byte
    return torch.cat([codes >> bits * i & (1 << bits) - 1 for i in range(per_byte)], dim=-1)


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


# Below it a float16 has fewer bits.
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal


def _quantize(groups: torch.Tensor, num_bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `[..., size]` that share a scale, and `[..., 2]` scale and minimum as float16.

    Of 16-bit floats, what codes restore gives the same codes and scales again. For that, the
    minimum is what the least element comes back as: in float16's normal range it is rounded down,
    which leaves 16-bit floats as they are, and below it to the nearest, which every 16-bit float
    holds. And a set is fitted to the range that its codes restore, not to the one that it has. With
    a scale of all bits that is the same range, up to the rounding of its end. A coarse scale, one
    below float16's normal numbers, may miss the range by much: the set is then fitted to what the
    first fit restored, and no code goes beyond that.

    An element is at most half a scale away, and half a unit of its own dtype.
    """
    levels = (1 << num_bits) - 1
    wide = groups.float()
    lowest, highest = wide.amin(-1) + 0.0, wide.amax(-1)  # + 0: no minus zero
    is_small = lowest.abs() < _SMALLEST_NORMAL
    minimum = torch.where(is_small, lowest.half() + 0.0, round_down_to_half(lowest))
    low = minimum.float()
    scale, _, restored = _fit(low, highest, levels, groups.dtype)
    fitted_scale, top, _ = _fit(low, restored, levels, groups.dtype)
    is_coarse = scale < _SMALLEST_NORMAL
    scale = torch.where(is_coarse, fitted_scale, scale)
    top = torch.where(is_coarse, top, levels)
    codes = _find_codes(wide, low[..., None], scale[..., None], levels)
    codes = torch.minimum(codes, top[..., None])
    return codes.to(torch.uint8), torch.stack([scale, minimum], dim=-1)


def _fit(
    low: torch.Tensor, highest: torch.Tensor, levels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scale of a range, twice rounded, the code of its end, and what that restores."""
    step = torch.tensor(1 / levels, dtype=torch.float32, device=low.device)
    scale = ((highest - low).clamp(min=0) * step).half()
    restored = low + scale.float() * _find_codes(highest, low, scale, levels)
    scale = ((restored.to(dtype).float() - low) * step).half()
    top = _find_codes(highest, low, scale, levels)
    return scale, top, (low + scale.float() * top).to(dtype).float()


def _find_codes(
    wide: torch.Tensor, low: torch.Tensor, scale: torch.Tensor, levels: int
) -> torch.Tensor:
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    return ((wide - low) * inverse).clamp(0, levels).round()


def round_down_to_half(values: torch.Tensor) -> torch.Tensor:
    """The largest float16 not above each float32."""
    rounded = values.half()
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.float() > values, lower, rounded)


def quantize_keys(
    keys: torch.Tensor, num_bits: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `[..., block_size, head_dim]`; see `dequantize_keys`."""
    groups = keys.unflatten(-2, (num_groups, -1)).transpose(-1, -2)
    codes, scales = _quantize(groups, num_bits)
    return pack_codes(codes.transpose(-1, -2).flatten(-3, -2), num_bits), scales


def quantize_values(
    values: torch.Tensor, num_bits: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of `[..., block_size, head_dim]`; see `dequantize_values`."""
    codes, scales = _quantize(values.unflatten(-1, (num_groups, -1)), num_bits)
    return pack_codes(codes.flatten(-2), num_bits), scales


def pack_codes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The inverse of `unpack_codes`: the channels of a byte lie as far apart as can be."""
    packed = torch.zeros_like(codes[..., : codes.shape[-1] * num_bits // 8])
    for i, part in enumerate(codes.chunk(8 // num_bits, dim=-1)):
        packed |= part << num_bits * i
    return packed
