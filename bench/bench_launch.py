"""Processor time of a call on a GPU: microseconds until it returns.

`remembered` is a call laid out like an earlier one, whose launch is repeated; `planned` one without
a remembered launch, though its kernel is compiled. Without a GPU, launches do nothing and the
launching functions are called directly, not through PyTorch's dispatcher: only this project's own
part is timed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import kvkernels
from bench import attention_cases, bench_kv_cache, bench_merge_attention
from bench.attention_cases import Case
from bench.gpu.attention_timing import make_narrow
from bench.harness import print_line
from kvkernels.scoring import Scoring

NUM_CALLS = 200  # in a timed run: fewer than fit into a device's queue, or calls would wait

ONE = Case("decode_1x1k", 1, 1024, 1, 32, 8, 128)
MANY = Case("decode_32x1k", 32, 1024, 1, 32, 8, 128)
FEW_QUERIES = Case("extend_16_of_1k", 1, 1024, 16, 32, 8, 128)
STORE = bench_kv_cache.Case("store_1", 1, 8, 128)
MERGE = bench_merge_attention.Case("merge_1", 1)

Call = Callable[[], Any]


class _NoKernel:
    """Takes the place of a compiled kernel where there is no GPU to run it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: None


@contextmanager
def _launches() -> Iterator[tuple[Callable[..., Any], ...]]:
    """The three ops on a GPU; elsewhere their launching functions, with empty launches."""
    if torch.cuda.is_available():
        yield kvkernels.paged_attention, kvkernels.store_kv, kvkernels.merge_attention
        return
    from kvkernels.triton_kernels import attention, kv_cache, replay

    def attend(*tensors: Any, **caches: Any) -> Any:
        return attention.paged_attention(*tensors, Scoring(0.125), False, **caches)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(replay, "CompiledKernel", _NoKernel))
        nothing = lambda launches, _: [_NoKernel()] * len(launches)  # noqa: E731
        stack.enter_context(mock.patch.object(replay, "run", nothing))
        yield attend, kv_cache.store_kv, attention.merge_attention


def _make_calls(ops: tuple[Callable[..., Any], ...]) -> dict[str, Call]:
    """By name; inputs are made on the default device."""
    attend, store, merge = ops
    calls: dict[str, Call] = {}
    for case in (ONE, MANY, FEW_QUERIES):
        inputs = attention_cases.make_inputs(case)
        tensors = (inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table)
        tensors += (inputs.seq_lens, inputs.cu_seqlens_q)
        calls[case.name] = partial(attend, *tensors)
        if case is ONE:
            narrow, caches = make_narrow(inputs, "int4")
            tensors = (narrow.query, narrow.key_cache, narrow.value_cache, narrow.block_table)
            calls[f"{case.name}_int4"] = partial(attend, *tensors, narrow.seq_lens, None, **caches)
            if torch.cuda.is_available():
                contiguous = (inputs.queries_by_head, inputs.key, inputs.value)
                calls["sdpa_1x1k"] = partial(
                    F.scaled_dot_product_attention, *contiguous, enable_gqa=True
                )
    calls[STORE.name] = partial(store, *bench_kv_cache.make_inputs(STORE))
    calls[MERGE.name] = partial(merge, *bench_merge_attention.make_inputs(MERGE))
    calls["layer"] = partial(_run_both, calls[STORE.name], calls[ONE.name])
    return calls


def _run_both(first: Call, second: Call) -> None:
    first()
    second()


@contextmanager
def _nothing_remembered() -> Iterator[None]:
    from kvkernels.triton_kernels import replay

    with (
        mock.patch.object(replay.Replays, "find", lambda self, signature: None),
        mock.patch.object(replay, "CompiledKernel", type(None)),  # so that none is kept
    ):
        yield


def _time_call(call: Call) -> float:
    """Microseconds of processor time per call; the device may still be at work afterwards."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(NUM_CALLS):
        call()
    return 1e6 * (time.perf_counter() - begin) / NUM_CALLS


def time_launches(case_filter: str = "", num_rounds: int = 15) -> Iterator[dict[str, Any]]:
    """A row for each call whose name contains `case_filter`: median and minimum of the rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode(), _launches() as ops:
        with torch.device(device):  # not while timing: this mode intercepts each PyTorch call
            calls = _make_calls(ops)
        for name, call in calls.items():
            if case_filter not in name:
                continue
            call()
            remembered, planned = [], []
            for _ in range(num_rounds):
                remembered.append(_time_call(call))
                with _nothing_remembered():
                    planned.append(_time_call(call))
            yield {
                "case": name,
                "remembered_us": statistics.median(remembered),
                "remembered_min_us": min(remembered),
                "planned_us": statistics.median(planned),
                "planned_min_us": min(planned),
            }


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for row in time_launches(case_filter, num_rounds):
        print_line(**row)
