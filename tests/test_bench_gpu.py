"""The parts of the device bench that need no device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bench.attention_cases import Case, make_inputs
from bench.attention_providers import attend_paged
from bench.gpu import flashinfer_peers, peers, tune
from bench.gpu.attention_timing import CASES, INVARIANT_CASE, LATENT_CASES, make_latent_inputs
from bench.gpu.peer import Peer
from bench.gpu.summary import MAX_COLUMNS, MAX_ERROR_CHARS, MAX_LINES, summarise
from bench.gpu.timing import time_cases
from bench.gpu.torch_peers import FLEX_CASES, SDPA_PEERS, prepare_flex
from bench.gpu.transfer_timing import time_evict, time_restore
from kvkernels import KVLayout
from kvkernels.triton_kernels.launch import Device

SMALL_CASES = [
    Case("decode", 3, 192, 1, 8, 2, 64),
    Case("prefill", 1, 192, 192, 8, 2, 64),
    Case("extend", 2, 256, 40, 8, 2, 64),
]
# Without compiling, which takes minutes; the function is the same.
TORCH_PEERS = SDPA_PEERS | {"flex": Peer(partial(prepare_flex, lambda: flex_attention), "")}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (case, name)
        for case in SMALL_CASES
        for name, peer in TORCH_PEERS.items()
        if peer.serves(case)
    ],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.inference_mode()
def test_peers_of_pytorch_agree_with_ours(case: Case, name: str) -> None:
    inputs = make_inputs(case)
    out = TORCH_PEERS[name].prepare(case, inputs)()
    torch.testing.assert_close(out, attend_paged(inputs), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_page_table_and_layout_name_the_same_tokens(layout: str) -> None:
    inputs = make_inputs(SMALL_CASES[0])
    sums, ids, last_lens = flashinfer_peers.page_table(inputs)
    keys, values = flashinfer_peers.lay_out(inputs, layout)
    for seq, (key, value) in enumerate(zip(inputs.key, inputs.value, strict=True)):
        blocks = ids[sums[seq] : sums[seq + 1]]
        length = 64 * (len(blocks) - 1) + int(last_lens[seq])
        for cache, expected in ((keys, key), (values, value)):
            heads = cache[blocks.long()].transpose(0, 1 if layout == "HND" else 2)
            heads = heads if layout == "HND" else heads.transpose(1, 2)
            assert torch.equal(heads.flatten(1, 2)[:, :length], expected)


def test_every_name_that_a_table_picks_is_a_case() -> None:
    names = [case.name for case in CASES]
    assert set(FLEX_CASES) <= set(names)
    assert INVARIANT_CASE.name in names
    steps = [name for name, _ in time_cases()]
    assert len(steps) == len(set(steps))


def test_latent_values_are_the_first_channels_of_the_keys() -> None:
    with torch.device("meta"):
        query, keys, values, table, lens = make_latent_inputs(LATENT_CASES[1])
    assert keys.numel() * keys.element_size() == LATENT_CASES[1].num_kv_bytes
    assert (query.shape, values.shape[3], values.stride()) == ((1, 128, 576), 512, keys.stride())
    assert table.shape == (1, 128) and lens.shape == (1,)


@pytest.mark.parametrize("codec", ["raw", "l12", "q4"])
def test_blocks_leave_and_come_back_at_some_rate(codec: str) -> None:
    layout = KVLayout(12, 1, 64, 16)
    for row in (time_restore(layout, codec, 3, "cpu"), time_evict(layout, codec, 3, "cpu")):
        assert min(row.values()) > 0


def test_a_build_that_takes_too_long_is_ended() -> None:
    assert peers.prepare(limit_s=0.0)["flex"] == "not done within 0 s"


def _attention_row(name: str, peer_error: str) -> dict[str, Any]:
    peer = {"eager_us": 9.0, "graph_us": 50.0, "graph_over_ours": 1.25, "form": "blocks"}
    return {
        "name": name,
        "ok": True,
        "floor_us": 20.0,
        "floor_by": "copy",
        "share_of_floor": 0.5,
        "kvkernels": {"graph_us": 40.0},
        "peers": {"slower": peer, "faster": peer | {"graph_over_ours": 0.75}}
        | {"broken": {"error": peer_error}},
    }


def test_summary_shows_the_best_peer_and_what_failed() -> None:
    rows = [
        _attention_row("decode", "RuntimeError: no\nkernel"),
        _attention_row("decode_flex", "late") | {"case": "decode", "peers": {}},
        {"name": "prefill", "ok": False, "error": "x" * 300},
    ]
    lines = summarise({"timings": rows, "is_complete": True}).splitlines()
    assert lines[1] == "complete; succeeded: timings 2/3"
    assert lines[2] == "peer broken decode: RuntimeError: no kernel"
    assert lines[3] == "FAILED timings prefill: " + "x" * MAX_ERROR_CHARS
    [line] = [line for line in lines[4:] if line.startswith("decode")]
    assert " ".join(line.split()) == "decode 40.0 20.0 copy 0.50 faster 50.0 0.75; slower 1.25"


def test_tuning_forgets_what_was_planned_with_another_table(monkeypatch) -> None:
    kept: dict[Any, Any] = {"before": None}
    monkeypatch.setattr(tune.attention_replays, "_replays", kept)
    table = {"row": 1}
    with tune.replaced(table, "row", 2):
        assert table == {"row": 2} and not kept
        kept["with the other"] = None
    assert table == {"row": 1} and not kept


@pytest.mark.parametrize("arch", [8, 9, 10])
@pytest.mark.parametrize("tuning", list(tune.tunings()), ids=lambda tuning: tuning.name)
def test_each_candidate_is_what_is_timed(tuning: tune.Tuning, arch: int) -> None:
    device = Device(arch, num_multiprocessors={8: 108, 9: 132, 10: 148}[arch])
    for tiles in tuning.candidates:
        with tuning.choose(device, tiles):
            tuning.check_plan(device, tiles)


def test_a_candidate_that_is_not_timed_is_refused() -> None:
    tuning = next(tune.tunings())
    with pytest.raises(ValueError, match=r"decode_1x1k: expected .* to be planned, got"):
        tuning.check_plan(Device(9, 132), (16, 2, 6, 3))


def test_summary_shows_what_calls_take_of_the_processor() -> None:
    row = {"name": "overhead", "ok": True, "decode_1x1k": {"remembered_us": 31.4}}
    lines = summarise({"timings": [row | {"store_1": {"remembered_us": 12.0}}]}).splitlines()
    assert lines[-1].endswith(": decode_1x1k 31; store_1 12")


def test_summary_stays_within_its_size() -> None:
    rows = [_attention_row(f"case_{i}" * 8, f"error {i} " * 30) for i in range(80)]
    rows += [{"name": f"late_{i}", "ok": False, "error": "no time left"} for i in range(80)]
    lines = summarise({"timings": rows}).splitlines()
    assert len(lines) == MAX_LINES
    assert max(map(len, lines)) <= MAX_COLUMNS


def test_summary_of_a_result_that_has_nothing_yet() -> None:
    assert summarise({}).splitlines() == ["unknown device", "cut short; succeeded: nothing ran"]
