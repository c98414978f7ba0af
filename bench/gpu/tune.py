"""Times launch configurations other than the table's; winners are put into the table by hand.

Not part of a whole run: ``bench/gpu/run.sh FILE --parts tune``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from triton.errors import TritonError

from bench import attention_cases
from bench.attention_providers import Call, attend_paged
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
from kvkernels.triton_kernels.launch import Device, device_of
from kvkernels.triton_kernels.shapes import Shape, plan

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
# For codes and float8, with up to 8 query heads per key-value head.
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
    """Replace a row of a table inside the block; the device may have had no row."""
    attention_replays.clear()
    try:
        with mock.patch.dict(table, {key: value}):
            yield
    finally:
        attention_replays.clear()


@dataclass(frozen=True)
class Tuning:
    """A call, and the candidates for its row of a table.

    Attributes:
        name: Of the result's row.
        shape: Shape that the plan is made for.
        candidates: Configurations to time.
        first: Which field a candidate begins with: 0 tile_m, 1 tile_n.
        choose: Context manager that makes a candidate the device's row.
        make_calls: Makes calls on inputs to be used in turn.
    """

    name: str
    shape: Shape
    candidates: tuple[Tiles, ...]
    first: int
    choose: Callable[[Device, Tiles], AbstractContextManager[Any]]
    make_calls: Callable[[], list[Call]]

    def check_plan(self, device: Device, tiles: Tiles) -> None:
        """Raise ValueError unless the call would be launched with these tiles."""
        launch = plan(self.shape, device)[0]
        sizes, num_programs = launch.arguments, launch.arguments["num_programs_at_once"]
        planned = (
            *(sizes["TILE_M"], sizes["TILE_N"], launch.num_warps, launch.num_stages),
            num_programs // device.num_multiprocessors,
        )[self.first :][: len(tiles)]
        if planned != tiles:
            raise ValueError(f"{self.name}: expected {tiles} to be planned, got {planned}")

    @torch.inference_mode()
    def run(self) -> dict[str, Any]:
        """Microseconds with the table's row first, then with each candidate, or its error."""
        calls = self.make_calls()
        device = device_of(calls[0]())
        row: dict[str, Any] = {"table": time_both_ways(calls)["graph_us"]}
        for tiles in self.candidates:
            name = "x".join(map(str, tiles))
            with self.choose(device, tiles):
                self.check_plan(device, tiles)
                try:
                    row[name] = time_both_ways(calls)["graph_us"]
                except (TritonError, RuntimeError) as error:  # too large for the device
                    row[name] = f"{type(error).__name__}: {error}"[:100]
        return row


def _row_of(device: Device, head_dim: int) -> tuple[int, int, int]:
    """Key of a device's rows; Blackwell uses Hopper's row where it has none."""
    return configs._row(device.arch, torch.bfloat16, head_dim)


def _row_as_hopper(device: Device, head_dim: int) -> tuple[int, int, int]:
    served_as, itemsize, width = _row_of(device, head_dim)
    return min(served_as, 9), itemsize, width


def _choose_decode(
    table: dict[Any, Any], head_dim: int, device: Device, tiles: Tiles
) -> AbstractContextManager[Any]:
    return replaced(table, _row_as_hopper(device, head_dim), tiles)


@contextmanager
def _choose_prefill(head_dim: int, device: Device, tiles: Tiles) -> Iterator[None]:
    """Make a candidate the only tiles, used for few query rows too."""
    row, entries = _row_of(device, head_dim), {tiles[0]: tiles[1:]}
    table = configs._PREFILL_BLACKWELL if row[0] == 10 else configs._PREFILL
    with mock.patch.dict(configs._LEAST_ROWS, clear=True), replaced(table, row, entries):
        yield


def _choose_latent(case: LatentCase, device: Device, tiles: Tiles) -> AbstractContextManager[Any]:
    row = _row_of(device, case.key_dim)
    return replaced(configs._DECODE_MANY_HEADS, row, (1, *tiles))


def _shape_of(case: attention_cases.Case, **kinds: Any) -> Shape:
    return Shape(
        "decode" if case.is_decode else "prefill",
        "bf16",
        case.head_dim,
        group=case.num_heads // case.num_kv_heads,
        num_kv_heads=case.num_kv_heads,
        num_queries=case.num_queries,
        num_seqs=case.num_seqs,
        **kinds,
    )


def _make_calls(case: attention_cases.Case) -> list[Call]:
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    return [partial(attend_paged, one) for one in inputs]


def _make_narrow_calls(case: attention_cases.Case, kind: str) -> list[Call]:
    made = make_cold(
        lambda: make_narrow(attention_cases.make_inputs(case), kind), case.num_kv_bytes // 4
    )
    return [partial(attend_decode, inputs, **caches) for inputs, caches in made]


def _make_latent_calls(case: LatentCase) -> list[Call]:
    inputs = make_cold(partial(make_latent_inputs, case), case.num_kv_bytes)
    return [partial(paged_attention, *one) for one in inputs]


def _tune_decode(case: attention_cases.Case) -> Tuning:
    choose = partial(_choose_decode, configs._DECODE, case.head_dim)
    candidates = DECODE[case.head_dim]
    return Tuning(case.name, _shape_of(case), candidates, 1, choose, partial(_make_calls, case))


def _tune_prefill(case: attention_cases.Case) -> Tuning:
    choose = partial(_choose_prefill, case.head_dim)
    return Tuning(case.name, _shape_of(case), PREFILL, 0, choose, partial(_make_calls, case))


def _tune_codes(case: attention_cases.Case, kind: str) -> Tuning:
    is_float8 = kind == "float8"
    table = configs._DECODE_FLOAT8_ALONE if is_float8 else configs._DECODE_CODES_ALONE
    return Tuning(
        f"{case.name}_{kind}",
        _shape_of(case, is_float8=is_float8, kinds=() if is_float8 else (kind,)),
        CODES,
        1,
        partial(_choose_decode, table, case.head_dim),
        partial(_make_narrow_calls, case, kind),
    )


def _tune_latent(case: LatentCase) -> Tuning:
    shape = Shape(
        "decode", "bf16", case.key_dim, case.value_dim,
        group=case.num_heads, num_kv_heads=1, num_seqs=case.num_seqs,
    )  # fmt: skip
    choose = partial(_choose_latent, case)
    return Tuning(case.name, shape, MANY_HEADS, 0, choose, partial(_make_latent_calls, case))


def tunings() -> Iterator[Tuning]:
    by_name = {case.name: case for case in CASES}
    yield from (_tune_decode(by_name[name]) for name in DECODE_CASES)
    yield from (_tune_prefill(by_name[name]) for name in PREFILL_CASES)
    for kind in ("float8", "int8", "int4"):
        yield from (_tune_codes(by_name[name], kind) for name in ("decode_4x8k", "decode_8x32k"))
    yield from map(_tune_latent, LATENT_CASES)


def tune_cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what to run, one at a time."""
    for tuning in tunings():
        yield tuning.name, tuning.run
