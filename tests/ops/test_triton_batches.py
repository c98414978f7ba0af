"""The Triton kernels: results that do not depend on the batch, and counters."""

import dataclasses
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_inputs import Case, Inputs, make_inputs
from test_attention_features import quantize_some

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

pytest.importorskip("triton", reason="Triton is only on Linux")
attention = pytest.importorskip("kvkernels.triton_kernels.attention")
counters = pytest.importorskip("kvkernels.triton_kernels.counters")
decode = pytest.importorskip("kvkernels.triton_kernels.decode")
shapes = pytest.importorskip("kvkernels.triton_kernels.shapes")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")
replay = pytest.importorskip("kvkernels.triton_kernels.replay")

DECODES = ((1, 330), (1, 3), (1, 0), (1, 128), (1, 129))
MIXED = ((3, 40), (1, 90), (20, 20), (0, 9), (9, 60))


def pick(inputs: Inputs, seqs: list[int]) -> tuple:
    """The arguments of only some of the sequences, in another order."""
    bounds = inputs.cu_seqlens_q
    if bounds is None:
        query, sums = inputs.query[seqs], None
    else:
        query = torch.cat([inputs.query[bounds[seq] : bounds[seq + 1]] for seq in seqs])
        counts = [int(bounds[seq + 1] - bounds[seq]) for seq in seqs]
        sums = torch.tensor([0, *counts]).cumsum(0).int().to(query.device)
    table, lens = inputs.block_table[seqs], inputs.seq_lens[seqs]
    return (query, inputs.key_cache, inputs.value_cache, table, lens, sums)


@pytest.mark.parametrize("kinds", [(), ("int4", "float", "int8")], ids=["float", "kinds"])
@pytest.mark.parametrize(
    ("sequences", "window"),
    [(DECODES, 0), (DECODES, 150), (MIXED, 0), (MIXED, 30)],
    ids=["decode", "decode_window", "mixed", "mixed_window"],
)
def test_other_sequences_do_not_change_the_bits_where_asked(
    sequences: tuple, window: int, kinds: tuple, device: torch.device, monkeypatch
) -> None:
    monkeypatch.setattr(decode, "_INVARIANT_SPLIT_TOKENS", 128)
    replays = replay.Replays(attention.attention_replays.names)
    monkeypatch.setattr(attention, "attention_replays", replays)
    case = Case("", sequences, heads=(4, 2), window=window)
    inputs = make_inputs(case, torch.bfloat16, device)
    caches = quantize_some(inputs, kinds, 64, 64) if kinds else {}
    scoring = Scoring(0.125, window=window, sinks=torch.randn(4, device=device))

    def attend(seqs: list[int]) -> tuple:
        arguments = (*pick(inputs, seqs), scoring, True)
        return attention.paged_attention(*arguments, **caches, batch_invariant=True)

    count = len(sequences)
    together = attend(list(range(count)))
    bounds = torch.tensor([0, *(queries for queries, _ in sequences)]).cumsum(0).tolist()
    for seqs in ([0], [1, 3], [4], [*range(count), *range(count)]):
        rows = [row for seq in seqs for row in range(bounds[seq], bounds[seq + 1])]
        for got, want in zip(attend(seqs), together, strict=True):
            assert torch.equal(got, want[rows])
    exact = reference.paged_attention(*inputs.tensors(torch.float64), scoring, True, **caches)
    rounded = reference.paged_attention(*inputs.tensors(), scoring, True, **caches)
    assert_as_accurate(together[0], rounded[0], exact[0], "out")
    assert_as_accurate(together[1], rounded[1], exact[1], "lse")


@pytest.mark.parametrize("sees_itself", [True, False])
def test_a_tree_of_one_token_may_not_see_itself(sees_itself: bool, device: torch.device) -> None:
    inputs = make_inputs(Case("", ((1, 33), (1, 1))), torch.float32, device)
    mask = torch.full((2,), int(sees_itself), dtype=torch.int32, device=device)
    scoring = Scoring(0.125, tree_mask=mask)
    exact = reference.paged_attention(*inputs.tensors(torch.float64), scoring, True)
    rounded = reference.paged_attention(*inputs.tensors(), scoring, True)
    out, lse = attention.paged_attention(*inputs.tensors(), scoring, True)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


def test_a_nan_in_float8_stays_one(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    cache = torch.zeros(1, 1, 16, 256, dtype=torch.float8_e4m3fn, device=device)
    cache[0, 0, 0] = codes
    ints = {"dtype": torch.int32, "device": device}
    table, lens = torch.zeros(1, 1, **ints), torch.ones(1, **ints)
    query = torch.zeros(1, 1, 256, dtype=torch.float16, device=device)
    keys = torch.zeros_like(cache)
    out, _ = attention.paged_attention(query, keys, cache, table, lens, None, Scoring(1.0), False)
    torch.testing.assert_close(out[0, 0], codes.half(), rtol=0, atol=0, equal_nan=True)


def test_counters_of_a_stream_are_zero_and_shared(device: torch.device) -> None:
    tensor = torch.empty(1, device=device)
    few = counters.zeroed_counters(10, tensor)
    many = counters.zeroed_counters(5000, tensor)
    assert few.numel() >= 10 and many.numel() >= 5000 and not many.any()
    assert counters.zeroed_counters(20, tensor).data_ptr() == many.data_ptr()


def test_counters_are_allocated_by_another_thread(monkeypatch) -> None:
    """As this one's allocations may go to a pool that is not ours to keep memory in."""
    monkeypatch.setattr(counters, "_buffers", {})
    threads = []
    new_zeros = torch.Tensor.new_zeros

    def noted(*args, **kwargs):
        threads.append(threading.current_thread())
        return new_zeros(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_zeros", noted)
    with torch.inference_mode():
        counter = counters.zeroed_counters(10, torch.empty(1))
    assert not counter.is_inference()
    assert threads and threading.current_thread() not in threads


def test_graphs_that_are_captured_at_once_share_no_counters(monkeypatch) -> None:
    buffer = torch.zeros(1 << 16, dtype=torch.int32)
    monkeypatch.setattr(counters, "_graph_buffers", {0: (buffer, 0)})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            dealt = list(pool.map(lambda _: counters._deal_to_graph(5, 0, buffer), range(4000)))
    finally:
        sys.setswitchinterval(interval)
    assert len({one.data_ptr() for one in dealt}) == len(dealt)


def test_a_length_past_its_table_harms_no_later_call(device: torch.device, monkeypatch) -> None:
    """On a GPU lengths cannot be checked before the kernel runs."""
    monkeypatch.setattr(decode, "_INVARIANT_SPLIT_TOKENS", 128)
    replays = replay.Replays(attention.attention_replays.names)
    monkeypatch.setattr(attention, "attention_replays", replays)
    inputs = make_inputs(Case("", ((1, 600),), heads=(2, 1)), torch.float32, device)
    query, keys, values, table, _, _ = inputs.tensors()

    def attend(length: int) -> torch.Tensor:
        lens = torch.tensor([length], dtype=torch.int32, device=device)
        arguments = (query, keys, values, table[:, :32], lens, None, Scoring(0.125), False)
        return attention.paged_attention(*arguments, batch_invariant=True)[0]

    expected = attend(512)
    attend(513)
    assert not counters.zeroed_counters(1, query).any()
    for _ in range(2):
        assert torch.equal(attend(512), expected)


def test_other_sequences_do_not_change_how_splits_are_joined() -> None:
    one = shapes.Shape("decode", "bf16", 64, group=2, num_kv_heads=1, kinds=("int8",))
    joins = []
    for num_seqs in (1, 8):
        batch = dataclasses.replace(one, num_seqs=num_seqs, batch_invariant=True)
        _, join = shapes.plan(batch, launch.Device(9, 132))
        joins.append({name: value for name, value in join.arguments.items() if name.isupper()})
    assert joins[0] == joins[1]
