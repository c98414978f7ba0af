"""Times other launch configurations than the table's; what wins is written into the table by hand.

Not part of a whole run: ``bench/gpu/run.sh FILE --parts tune``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bench import attention_cases
from bench.attention_providers import attend_paged
from bench.gpu.attention_timing import (
    CASES,
    LATENT_CASES,
    LatentCase,
    attend_decode,
    make_latent_inputs,
    make_narrow,
)
from bench.gpu.events import make_cold, time_both_ways
from kvkernels import paged_attention
from kvkernels.triton_kernels import configs
from kvkernels.triton_kernels.attention import attention_replays

Tiles = tuple[int, ...]

# tile_n, num_warps, num_stages, programs at once
DECODE: dict[int, tuple[Tiles, ...]] = {
    64: (
        *((64, 2, 6, 2), (64, 2, 4, 3), (64, 2, 4, 1), (128, 2, 3, 2), (128, 4, 3, 1)),
        *((64, 1, 4, 4), (32, 1, 4, 6), (64, 4, 4, 2)),
    ),
    128: (
        *((32, 2, 3, 2), (32, 2, 5, 2), (32, 2, 6, 2), (32, 2, 4, 3), (32, 2, 4, 1)),
        *((16, 2, 6, 3), (64, 2, 3, 2), (64, 4, 3, 1), (64, 4, 2, 2), (128, 4, 3, 1)),
        *((32, 1, 3, 6), (32, 1, 3, 4), (32, 1, 4, 4)),
    ),
    256: (
        *((32, 4, 3, 2), (64, 4, 2, 1), (64, 4, 3, 1), (32, 8, 3, 1), (64, 8, 2, 1)),
        *((32, 4, 4, 1), (16, 4, 4, 2)),
    ),
}
# Of codes and of float8, for up to 8 query heads to a key-value head.
CODES: tuple[Tiles, ...] = (
    *((32, 1, 3, at_once) for at_once in (4, 6, 8, 9, 10, 11)),
    *((32, 1, 2, 8), (32, 1, 4, 6), (32, 1, 4, 8), (64, 1, 3, 4), (64, 1, 3, 6), (64, 1, 2, 8)),
    *((32, 4, 5, 3), (64, 4, 3, 3), (32, 2, 3, 4), (64, 2, 3, 4)),
)
# tile_m, tile_n, num_warps, num_stages
PREFILL: tuple[Tiles, ...] = (
    *((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (128, 128, 8, 3)),
    *((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3), (64, 128, 8, 2)),
)
# tile_m, tile_n, num_warps, num_stages, programs at once
MANY_HEADS: tuple[Tiles, ...] = (
    *((64, 64, 8, 2, 2), (64, 32, 8, 3, 1), (64, 32, 8, 2, 1), (64, 16, 8, 2, 1)),
    *((32, 32, 8, 2, 2), (32, 64, 8, 2, 1)),
)
DECODE_CASES = (
    *("decode_1x1k", "decode_1x8k", "decode_1x32k", "decode_4x8k", "decode_8x4k", "decode_32x1k"),
    *("decode_4x8k_9_3_d64", "decode_4x8k_14_2_d64", "decode_4x8k_4_1_d256"),
)
PREFILL_CASES = (
    *("extend_16_of_8k", "extend_256_of_8k", "extend_512_after_8k"),
    *("prefill_512_d128", "prefill_2k_d128", "prefill_2k_d64"),
)


@contextmanager
def replaced(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    before = table[key]
    table[key] = value
    attention_replays.clear()
    try:
        yield
    finally:
        table[key] = before
        attention_replays.clear()


def time_each(
    candidates: tuple[Tiles, ...],
    choose: Callable[[Tiles], Any],
    calls: list[Callable[[], torch.Tensor]],
) -> dict[str, Any]:
    """Microseconds with each of the candidates, or why there are none; with the table's first."""
    row: dict[str, Any] = {"table": time_both_ways(calls)["graph_us"]}
    for tiles in candidates:
        name = "x".join(map(str, tiles))
        try:
            with choose(tiles):
                row[name] = time_both_ways(calls)["graph_us"]
        except Exception as error:  # too large for the device: the others remain
            row[name] = f"{type(error).__name__}: {error}"[:100]
    return row


@torch.inference_mode()
def tune_decode(case: attention_cases.Case) -> dict[str, Any]:
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    key = (9, 2, case.head_dim)
    return time_each(
        DECODE[case.head_dim],
        lambda tiles: replaced(configs._DECODE, key, tiles),
        [partial(attend_paged, one) for one in inputs],
    )


@torch.inference_mode()
def tune_codes(case: attention_cases.Case, kind: str) -> dict[str, Any]:
    made = make_cold(
        lambda: make_narrow(attention_cases.make_inputs(case), kind), case.num_kv_bytes // 4
    )
    key = (9, 2, case.head_dim)
    table = configs._DECODE_FLOAT8_ALONE if kind == "float8" else configs._DECODE_CODES_ALONE
    return time_each(
        CODES,
        lambda tiles: replaced(table, key, tiles),
        [partial(attend_decode, inputs, **caches) for inputs, caches in made],
    )


@torch.inference_mode()
def tune_prefill(case: attention_cases.Case) -> dict[str, Any]:
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    key = (9, 2, case.head_dim)
    return time_each(
        PREFILL,
        lambda tiles: replaced(configs._PREFILL, key, {tiles[0]: tiles[1:]}),
        [partial(attend_paged, one) for one in inputs],
    )


@torch.inference_mode()
def tune_latent(case: LatentCase) -> dict[str, Any]:
    inputs = make_cold(partial(make_latent_inputs, case), case.num_kv_bytes)
    return time_each(
        MANY_HEADS,
        lambda tiles: replaced(configs._DECODE_MANY_HEADS, (9, 2, case.key_dim), (1, *tiles)),
        [partial(paged_attention, *one) for one in inputs],
    )


def tune_cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what to run, one at a time."""
    by_name = {case.name: case for case in CASES}
    for name in DECODE_CASES:
        yield name, partial(tune_decode, by_name[name])
    for name in PREFILL_CASES:
        yield name, partial(tune_prefill, by_name[name])
    for kind in ("float8", "int8", "int4"):
        for name in ("decode_4x8k", "decode_8x32k"):
            yield f"{name}_{kind}", partial(tune_codes, by_name[name], kind)
    for latent_case in LATENT_CASES:
        yield latent_case.name, partial(tune_latent, latent_case)
