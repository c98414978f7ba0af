"""One call of attention, and what both kernels are given of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from kvkernels.errors import UnsupportedError
from kvkernels.quantized_cache import QuantizedCache
from kvkernels.scoring import Scoring
from kvkernels.triton_kernels.configs import MAX_HEAD_DIM, TileConfig
from kvkernels.triton_kernels.launch import Device, cut_row, largest_power_of_2

_MAX_FLOAT32_SUM = 64  # longest chain of additions in one dot product, for its rounding errors
_MIN_TILE_N = 16  # the smallest that `tl.dot` takes
# Kernel arguments that change from call to call of one model: Triton must not compile for their
# values.
CHANGING = ["num_seqs", "stride_table", "window"]
INDEX_TENSORS = ["seq_lens_ptr", "block_table_ptr", "cu_seqlens_q_ptr", "tree_mask_ptr"]


class CodesLayout(NamedTuple):
    """How a kernel reads the quantised blocks of one kind; all known at compile time.

    Attributes:
        tile_n: Tokens of a step, which share the scales of keys.
        key_tokens: Neighbouring tokens that share a scale of a key's channel.
        value_channels: Neighbouring channels of a value that share a scale.
        key_dim: Width of a key.
        value_dim: Width of a value.
        runs: For each part of a value, channels of which a run lies within one group.
        in_pairs: Whether codes and the scales of keys are loaded two at a time; see `pairs`.
    """

    tile_n: int
    key_tokens: int
    value_channels: int
    key_dim: int
    value_dim: int
    runs: tuple[int, ...]
    in_pairs: bool


@dataclass(frozen=True)
class Call:
    """The arguments of `kvkernels.reference.attention.paged_attention`, but for the outputs."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    scoring: Scoring
    int8_cache: QuantizedCache | None = None
    int4_cache: QuantizedCache | None = None
    batch_invariant: bool = False

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache.shape[1]

    @property
    def block_size(self) -> int:
        return self.key_cache.shape[2]

    @property
    def value_dim(self) -> int:
        return self.value_cache.shape[3]

    @property
    def width(self) -> int:
        """Of a key or a value, whichever is wider: the kernels are cut for that."""
        if self.value_dim > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"value_cache: the kernels serve a head_dim of up to {MAX_HEAD_DIM},"
                f" got {self.value_dim}"
            )
        return max(self.query.shape[2], self.value_dim)

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.query.shape[1] // self.num_kv_heads

    @property
    def is_quantized(self) -> bool:
        return self.int8_cache is not None or self.int4_cache is not None

    @property
    def is_heavy(self) -> bool:
        """Whether a tile takes more registers than one of plain floats."""
        return self.is_quantized or any(self.rules)

    @property
    def rules(self) -> tuple[bool, bool, bool]:
        """Whether scores have a soft cap, ALiBi and tree masks: `RULES` of the kernels."""
        return (
            self.scoring.soft_cap > 0,
            self.scoring.alibi_slopes is not None,
            self.scoring.tree_mask is not None,
        )

    @property
    def scales_last(self) -> bool:
        """Whether scores are scaled when their exponents are taken: the largest one is known before
        only if the scale keeps their order, and nothing else may follow the scale.
        """
        has_cap, has_slopes, _ = self.rules
        return self.scoring.sm_scale > 0 and not has_cap and not has_slopes

    @property
    def is_latent(self) -> bool:
        """Whether values are the first part of the keys: then one load serves both."""
        key, value = self.key_cache, self.value_cache
        (first, width, _), *_ = cut_row(key.shape[3], False)
        return (
            self.int4_cache is None
            and first + width == value.shape[3] < key.shape[3]
            and key.stride() == value.stride()
            and key.data_ptr() == value.data_ptr()
        )

    @property
    def _widest_key_part(self) -> int | None:
        """Of float32, whose sums are over a part each: rounding errors grow with their length."""
        is_long = self.query.dtype == torch.float32 and not self.is_latent
        return _MAX_FLOAT32_SUM if is_long else None

    @property
    def is_float8(self) -> bool:
        return self.key_cache.dtype == torch.float8_e4m3fn

    @property
    def _serves_pairs(self) -> bool:
        """Whether the kernel loads bytes as pairs where they lie as such; see `pairs`.

        More rows than those of decode take operands from shared memory, where they are floats;
        and with float32 or wider heads, pairs of tiles take more registers than there are. A part
        may begin in the middle of a row, and no pair lies across that.
        """
        is_decode = self.cu_seqlens_q is None
        has_even_halves = self.query.shape[2] % 4 == 0 and self.value_dim % 4 == 0
        is_narrow = self.query.dtype != torch.float32 and self.width <= 256
        return is_decode and is_narrow and has_even_halves

    @property
    def in_pairs(self) -> bool:
        """Whether codes are loaded as pairs, and scales of keys with them."""
        caches = [cache for cache in (self.int8_cache, self.int4_cache) if cache is not None]
        return (
            bool(caches)
            and self._serves_pairs
            and all(
                _lies_in_words(cache.key_codes, 2)
                and _lies_in_words(cache.value_codes, 2)
                and _lies_in_words(cache.key_scales, 4)  # scale and minimum of two channels
                # Both channels of a pair have one scale
                and self.value_dim // cache.value_scales.shape[3] % 2 == 0
                for cache in caches
            )
        )

    def _has_float8_pairs(self, device: Device) -> bool:
        """Whether float8 is loaded as pairs, which Ampere would convert bit by bit."""
        return (
            self.is_float8
            and device.arch >= 9
            and self._serves_pairs
            and not self.is_latent
            and _lies_in_words(self.key_cache, 2)
            and _lies_in_words(self.value_cache, 2)
        )

    def fit_tile(self, config: TileConfig) -> TileConfig:
        """The configuration with tiles that lie in one block, where blocks are of several kinds."""
        if not self.is_quantized:
            return config
        tile_n = math.gcd(config.tile_n, self.block_size)
        if tile_n < _MIN_TILE_N:
            raise UnsupportedError(
                f"key_cache: beside quantised blocks the kernels serve a block_size that is a"
                f" multiple of {_MIN_TILE_N}, got {self.block_size}"
            )
        return replace(config, tile_n=tile_n)

    def arguments(self, config: TileConfig, device: Device) -> dict[str, Any]:
        """Arguments that the kernels share, by name."""
        query, key, value, scoring = self.query, self.key_cache, self.value_cache, self.scoring
        in_pairs, floats_in_pairs = self.in_pairs, self._has_float8_pairs(device)
        if self.is_float8:  # Triton does not compile the type for Ampere
            integer = torch.int16 if floats_in_pairs else torch.uint8
            key, value = key.view(integer), value.view(integer)
        # In pairs, cutting a head into halves saves registers where the halves have as many
        # channels in all.
        is_even = query.shape[2] == largest_power_of_2(query.shape[2]) >= 64
        in_halves = self.int4_cache is not None or ((in_pairs or floats_in_pairs) and is_even)
        # A part held in pairs is split into even and odd channels, and `tl.dot` takes at least 16.
        least = 32 if in_pairs or floats_in_pairs else 16
        value_parts = cut_row(self.value_dim, in_halves, least)
        layouts = {
            f"{kind.upper()}_LAYOUT": (
                _codes_layout(f"{kind}_cache", cache, config.tile_n, value_parts, in_pairs)
                if cache is not None
                else ()
            )
            for kind, cache in (("int8", self.int8_cache), ("int4", self.int4_cache))
        }
        return {
            "query_ptr": query,
            "float_cache": (key, value, *key.stride()[:3], *value.stride()[:3]),
            "int8_cache": _codes_arguments(self.int8_cache, in_pairs),
            "int4_cache": _codes_arguments(self.int4_cache, in_pairs),
            "block_table_ptr": self.block_table,
            "seq_lens_ptr": self.seq_lens,
            "sinks_ptr": scoring.sinks,
            "slopes_ptr": scoring.alibi_slopes,
            "tree_mask_ptr": scoring.tree_mask,
            "sm_scale": scoring.sm_scale,
            "soft_cap": scoring.soft_cap,
            "window": scoring.window,
            "stride_query_token": query.stride(0),
            "stride_query_head": query.stride(1),
            "stride_table": self.block_table.stride(0),
            "GROUP": self.group,
            "BLOCK_SIZE": self.block_size,
            "VALUE_DIM": self.value_dim,
            "KEY_PARTS": cut_row(query.shape[2], in_halves, least, self._widest_key_part),
            "VALUE_PARTS": value_parts,
            "IS_LATENT": self.is_latent,
            "HAS_FLOAT8": device.arch >= 9,
            **layouts,
            "TILE_M": config.tile_m,
            "TILE_N": config.tile_n,
            "HAS_WINDOW": scoring.window > 0,
            "RULES": (*self.rules, self.scales_last),
        }


def _lies_in_words(part: torch.Tensor, size: int) -> bool:
    """Whether so many neighbouring elements of a row are one word of memory."""
    counts = (part.storage_offset(), *part.stride()[:3], math.prod(part.shape[3:]))
    return all(count % size == 0 for count in counts)


def _codes_layout(
    name: str,
    cache: QuantizedCache,
    tile_n: int,
    value_parts: tuple[tuple[int, int, int], ...],
    in_pairs: bool,
) -> CodesLayout:
    key_groups, key_dim = cache.key_scales.shape[2:4]
    block_size, value_groups = cache.value_scales.shape[2:4]
    value_dim = cache.value_codes.shape[3] * (2 if name == "int4_cache" else 1)
    tile_n = math.gcd(tile_n, block_size // key_groups)
    if tile_n < _MIN_TILE_N:
        raise UnsupportedError(
            f"{name}: the kernels serve key scales of {_MIN_TILE_N} tokens and multiples,"
            f" got {block_size // key_groups}"
        )
    channels = value_dim // value_groups
    return CodesLayout(
        tile_n,
        block_size // key_groups,
        channels,
        key_dim,
        value_dim,
        tuple(math.gcd(first, width, channels) for first, width, _ in value_parts),
        in_pairs,
    )


def _codes_arguments(cache: QuantizedCache | None, in_pairs: bool) -> tuple[Any, ...] | None:
    """Pointers, then the strides of blocks and heads of each; a scale and a minimum are a word."""
    if cache is None:
        return None
    parts = [
        cache.key_codes,
        cache.key_scales.view(torch.int32).squeeze(-1),
        cache.value_codes,
        cache.value_scales.view(torch.int32).squeeze(-1),
    ]
    if in_pairs:
        for index, dtype in ((0, torch.int16), (1, torch.int64), (2, torch.int16)):
            parts[index] = parts[index].view(dtype)
    return (*parts, *(stride for part in parts for stride in part.stride()[:2]))
