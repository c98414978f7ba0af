"""Remembered launches: calls that need other kernels or arguments never share one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvkernels.quantized_cache import QuantizedCache
from kvkernels.reference import attention as reference
from kvkernels.scoring import Scoring

triton = pytest.importorskip("triton", reason="Triton is only on Linux")
attention = pytest.importorskip("kvkernels.triton_kernels.attention")
kv_cache = pytest.importorskip("kvkernels.triton_kernels.kv_cache")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")
replay = pytest.importorskip("kvkernels.triton_kernels.replay")
scratch = pytest.importorskip("kvkernels.triton_kernels.scratch")

NUM_BLOCKS, NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM = 8, 4, 2, 16, 32
Arguments = dict[str, Any]


def make_call(device: torch.device, num_seqs: int = 2, width: int = 64) -> Arguments:
    """A decode call whose sequences are long enough to be split."""
    shape = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    table = torch.randint(NUM_BLOCKS, (num_seqs, width), device=device, dtype=torch.int32)
    return {
        "query": torch.randn(num_seqs, NUM_HEADS, HEAD_DIM, device=device),
        "key_cache": torch.randn(shape, device=device),
        "value_cache": torch.randn(shape, device=device),
        "block_table": table,
        "seq_lens": torch.full((num_seqs,), width * BLOCK_SIZE, device=device).int(),
        "cu_seqlens_q": None,
        "scoring": Scoring(0.125),
        "return_lse": True,
    }


def quantized(device: torch.device, codes_per_byte: int) -> QuantizedCache:
    codes = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM // codes_per_byte)
    groups = (NUM_BLOCKS, NUM_KV_HEADS, 1, HEAD_DIM, 2)
    rows = (NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 1, 2)
    floats = {"dtype": torch.float16, "device": device}
    return QuantizedCache(
        torch.zeros(codes, dtype=torch.uint8, device=device),
        torch.ones(groups, **floats),
        torch.zeros(codes, dtype=torch.uint8, device=device),
        torch.ones(rows, **floats),
    )


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor at an address four bytes after a multiple of 16."""
    space = tensor.new_empty(tensor.numel() + 8)
    start = (4 - space.data_ptr() % 16) % 16 // tensor.element_size()
    place = space[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
    assert place.data_ptr() % 16 == 4
    return place


def spread(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same tensor, with the first stride longer by so many elements."""
    length = tensor[0].numel()
    space = tensor.new_empty(len(tensor), length + by)
    return space[:, :length].view(tensor.shape).copy_(tensor)


def with_scoring(call: Arguments, **rules: Any) -> Arguments:
    return {"scoring": call["scoring"]._replace(**rules)}


# Calls that differ from `make_call` in one thing that a kernel is compiled or planned for.
CHANGES = {
    "alignment_of_query": lambda call: {"query": moved(call["query"])},
    "alignment_of_keys": lambda call: {"key_cache": moved(call["key_cache"])},
    "alignment_of_values": lambda call: {"value_cache": moved(call["value_cache"])},
    "stride_times_16": lambda call: {"query": spread(call["query"], 16)},
    "stride_not_times_16": lambda call: {"query": spread(call["query"], 1)},
    "stride_of_table": lambda call: {"block_table": spread(call["block_table"], 3)},
    "stride_of_keys": lambda call: {"key_cache": spread(call["key_cache"], 8)},
    "one_column": lambda call: {"block_table": call["block_table"][:, :1].contiguous()},
    "one_sequence": lambda call: {
        name: call[name][:1] for name in ("query", "block_table", "seq_lens")
    },
    "dtype": lambda call: {
        name: call[name].half() for name in ("query", "key_cache", "value_cache")
    },
    "dtype_of_caches": lambda call: {
        name: call[name].to(torch.float8_e4m3fn) for name in ("key_cache", "value_cache")
    },
    "values_in_keys": lambda call: {"value_cache": call["key_cache"]},
    "sinks": lambda call: with_scoring(call, sinks=call["query"].new_zeros(NUM_HEADS)),
    "alibi": lambda call: with_scoring(call, alibi_slopes=call["query"].new_zeros(NUM_HEADS)),
    "tree": lambda call: with_scoring(call, tree_mask=torch.ones_like(call["seq_lens"])),
    "window": lambda call: with_scoring(call, window=7),
    "soft_cap": lambda call: with_scoring(call, soft_cap=3.0),
    "sm_scale": lambda call: with_scoring(call, sm_scale=0.25),
    "int8": lambda call: {"int8_cache": quantized(call["query"].device, 1)},
    "int4": lambda call: {"int4_cache": quantized(call["query"].device, 2)},
    "no_lse": lambda call: {"return_lse": False},
    "batch_invariant": lambda call: {"batch_invariant": True},
    "queries": lambda call: {
        "cu_seqlens_q": torch.arange(3, dtype=torch.int32, device=call["query"].device)
    },
}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[replay.Signature]:
    """Collect the signatures that are looked up; none is found."""
    found: list[replay.Signature] = []

    def find(self: replay.Replays, signature: replay.Signature) -> None:
        hash(signature)
        found.append(signature)

    monkeypatch.setattr(replay.Replays, "find", find)
    monkeypatch.setattr(replay.Replays, "run", lambda *_: None)
    return found


def test_calls_that_differ_in_one_thing_share_no_signature(keys, device: torch.device) -> None:
    call = make_call(device)
    for change in (lambda _: {}, *CHANGES.values()):
        attention.paged_attention(**call | change(call))
    assert len(set(keys)) == len(keys) == 1 + len(CHANGES)


def test_other_layers_of_a_model_share_a_signature(keys, device: torch.device) -> None:
    pool = torch.zeros(NUM_BLOCKS, 3, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, device=device)
    for layer in range(3):
        key_cache, value_cache = pool[:, layer].unbind(1)
        caches = {"key_cache": key_cache, "value_cache": value_cache}
        attention.paged_attention(**make_call(device) | caches)
        new = torch.zeros(5, NUM_KV_HEADS, HEAD_DIM, device=device)
        slots = torch.arange(5, device=device)
        kv_cache.store_kv(new, new.clone(), key_cache, value_cache, slots)
    assert len(set(keys[::2])) == len(set(keys[1::2])) == 1


def test_a_store_of_other_alignment_or_strides_has_another_signature(
    keys, device: torch.device
) -> None:
    call = make_call(device)
    new = torch.zeros(5, NUM_KV_HEADS, HEAD_DIM, device=device)
    caches = (call["key_cache"], call["value_cache"])
    slots = torch.arange(6, device=device)
    for key, value, place in (
        (new, new, slots[:5]),
        (moved(new), new, slots[:5]),
        (new, moved(new), slots[:5]),
        (new, spread(new, 1), slots[:5]),
        (new, new, slots[1:]),
        (new, new, slots.repeat_interleave(2)[:10:2]),
        (new[:1], new[:1], slots[:1]),
    ):
        kv_cache.store_kv(key, value, *caches, place)
    assert len(set(keys)) == len(keys)


class CompiledKernel:
    """Stands for a kernel that only a GPU could run, and keeps its arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.launches.append((grid, arguments))


@pytest.mark.parametrize("change", ["query", *CHANGES])
def test_a_replay_is_given_what_its_plan_says(change, device: torch.device, monkeypatch) -> None:
    planned: list[Any] = []
    checked: list[tuple] = []
    kernel = CompiledKernel()

    def run(launches: list, tensor: torch.Tensor) -> list:
        planned.extend(launches)
        return [kernel] * len(launches)

    monkeypatch.setattr(launch, "_INTERPRETED_DEVICE", launch.Device(9, 132))
    monkeypatch.setattr(replay, "CompiledKernel", CompiledKernel)
    monkeypatch.setattr(replay, "run", run)
    replays = replay.Replays(attention.attention_replays.names)
    monkeypatch.setattr(attention, "attention_replays", replays)

    first, second = (make_call(device) for _ in range(2))
    first |= CHANGES.get(change, lambda _: {})(first)
    second |= CHANGES.get(change, lambda _: {})(second)
    attention.paged_attention(**first, check=lambda *inputs: checked.append(inputs))
    assert not kernel.launches
    out, lse = attention.paged_attention(**second, check=lambda *inputs: checked.append(inputs))
    assert len(checked) == 1
    num_launches = len(kernel.launches)
    assert len(planned) == num_launches == (2 if change == "queries" else 1)
    monkeypatch.setattr(replay, "_is_watched", lambda: True)
    attention.paged_attention(**second)
    for one, (grid, arguments) in zip(planned[num_launches:], kernel.launches, strict=True):
        assert grid == (*one.grid, 1, 1)[:3]
        given = dict(zip(one.kernel.arg_names, arguments, strict=True))
        # Each call allocates its own tensors; scratch is laid out as planned.
        own = {name: given.pop(name, 0) for name in scratch.SCRATCH_NAMES}
        check_scratch(own, one.arguments)
        assert (given.pop("out_ptr"), given.pop("lse_ptr")) == (out.data_ptr(), lse.data_ptr())
        assert given == {name: as_given(one.arguments[name]) for name in given}


def check_scratch(given: dict[str, int], planned: Arguments) -> None:
    """Parts follow each other as planned, with the planned alignment."""
    begin = given["partial_out_ptr"]
    for name, tensor in planned.items():
        if name in given and name != "counters_ptr":
            offset = tensor.data_ptr() - planned["partial_out_ptr"].data_ptr()
            assert given[name] - begin == offset and offset % 16 == 0
            assert (given[name] == 0) == (tensor.numel() == 0)
    if "counters_ptr" in planned:
        # One buffer, shared by the stream's calls.
        assert given["counters_ptr"] == planned["counters_ptr"].data_ptr()


def as_given(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(as_given(part) for part in value)
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def test_later_calls_compute_what_they_are_given(device: torch.device) -> None:
    """On a GPU the first call launches a planned kernel and the others repeat that launch."""
    for shift in (False, False, True, True):
        call = make_call(device, width=4)
        if shift:
            call["query"] = moved(call["query"])
        out, lse = attention.paged_attention(**call)
        want, want_lse = reference.paged_attention(**call)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
        merged = attention.merge_attention(out, lse, out.clone(), lse.clone())
        torch.testing.assert_close(merged[0], out)


def test_what_a_check_refuses_is_not_launched(device: torch.device, keys) -> None:
    def refuse(*inputs: Any) -> None:
        raise ValueError("query: no")

    call = make_call(device)
    with pytest.raises(ValueError, match="query: no"):
        attention.paged_attention(**call, check=refuse)
    with pytest.raises(ValueError, match="query: no"):
        attention.merge_attention(*[call["query"]] * 4, check=refuse)
    new = torch.zeros(5, NUM_KV_HEADS, HEAD_DIM, device=device)
    with pytest.raises(ValueError, match="query: no"):
        kv_cache.store_kv(new, new, call["key_cache"], call["value_cache"], new, check=refuse)


def test_what_triton_is_told_to_look_at_is_planned_anew(monkeypatch, device) -> None:
    planned: list[Any] = []

    def run(launches: list, tensor: torch.Tensor) -> list:
        planned.extend(launches)
        return [CompiledKernel()] * len(launches)

    monkeypatch.setattr(replay, "CompiledKernel", CompiledKernel)
    monkeypatch.setattr(replay, "run", run)
    replays = replay.Replays(attention.attention_replays.names)
    monkeypatch.setattr(attention, "attention_replays", replays)
    call = make_call(device)
    for is_debug, num_planned in ((True, 1), (True, 2), (False, 3), (False, 3), (True, 4)):
        monkeypatch.setattr(triton.knobs.runtime, "debug", is_debug)
        attention.paged_attention(**call)
        assert len(planned) == num_planned
    monkeypatch.setattr(triton.knobs.runtime, "debug", False)
    replays.clear()
    attention.paged_attention(**call)
    assert len(planned) == 5


def test_as_many_signatures_are_kept_as_there_is_room_for(monkeypatch, device) -> None:
    monkeypatch.setattr(replay, "CompiledKernel", CompiledKernel)
    monkeypatch.setattr(replay, "MAX_SIGNATURES", 3)
    monkeypatch.setattr(replay, "run", lambda launches, _: [CompiledKernel()] * len(launches))
    replays = replay.Replays(attention.attention_replays.names)
    monkeypatch.setattr(attention, "attention_replays", replays)
    for num_seqs in range(1, 9):
        attention.paged_attention(**make_call(device, num_seqs))
        assert 1 <= len(replays._replays) <= 3
