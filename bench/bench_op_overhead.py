"""Overhead of a call: microseconds on inputs so small that there is hardly any work."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kvkernels
from bench.harness import print_line, time_alternating

NUM_CALLS = 500  # in a timed run

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 1, 64, 16


class _Recorder(TorchDispatchMode):
    """Keeps the last call of a kvkernels op, to be repeated without the public function."""

    def __init__(self) -> None:
        super().__init__()
        self.call: Callable[[], Any] | None = None

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "kvkernels":
            self.call = partial(op, *args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


def op_behind(public: Callable[[], Any]) -> Callable[[], Any]:
    """The call of `torch.ops` that a public call ends in."""
    with _Recorder() as recorder:
        public()
    assert recorder.call is not None
    return recorder.call


def make_calls() -> dict[str, Callable[[], Any]]:
    """One token of one sequence: stored, attending to a block, and merged."""
    query = torch.randn(1, NUM_HEADS, HEAD_DIM)
    key_cache, value_cache = torch.randn(2, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    table = torch.zeros(1, 1, dtype=torch.int32)
    seq_lens = torch.full((1,), BLOCK_SIZE, dtype=torch.int32)
    key, value = torch.randn(2, 1, NUM_KV_HEADS, HEAD_DIM)
    slots = torch.tensor([BLOCK_SIZE])
    lse = torch.zeros(1, NUM_HEADS)
    public = {
        "paged_attention": partial(
            kvkernels.paged_attention, query, key_cache, value_cache, table, seq_lens
        ),
        "store_kv": partial(kvkernels.store_kv, key, value, key_cache, value_cache, slots),
        "merge_attention": partial(kvkernels.merge_attention, query, lse, query, lse),
    }
    calls: dict[str, Callable[[], Any]] = {
        "torch.add": partial(torch.add, query, query),
        "scaled_dot_product_attention": partial(
            F.scaled_dot_product_attention,
            query.view(1, NUM_KV_HEADS, NUM_HEADS, HEAD_DIM),
            key_cache[:1],
            value_cache[:1],
        ),
    }
    for name, call in public.items():
        calls[f"kvkernels.{name}"] = call
        calls[f"torch.ops.kvkernels.{name}"] = op_behind(call)
    return calls


def repeat(call: Callable[[], Any], _: None) -> None:
    for _ in range(NUM_CALLS):
        call()


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    calls = {name: call for name, call in make_calls().items() if case_filter in name}
    runs = {name: partial(repeat, call) for name, call in calls.items()}
    for name, seconds in time_alternating(runs, [None], num_rounds).items():
        in_us = sorted(1e6 * value / NUM_CALLS for value in seconds)
        print_line(
            case="one call",
            provider=name,
            median_us=statistics.median(in_us),
            min_us=in_us[0],
            max_us=in_us[-1],
        )
