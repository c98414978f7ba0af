"""The device bench compares outputs before it times them; here with no device to time."""

from functools import partial

import pytest
import torch

import kvkernels
from bench import bench_kv_cache
from bench.attention_cases import Case
from bench.gpu import attention_timing, timing

CASE = Case("decode", 2, 256, 1, 4, 2, 128)
WORKS = {
    "decode": partial(attention_timing.time_attention, CASE, {}),
    "decode_fp32": partial(
        attention_timing.time_attention, Case("fp32", 1, 256, 1, 4, 2, 64, torch.float32), {}
    ),
    "extend": partial(attention_timing.time_attention, Case("extend", 2, 256, 40, 8, 2, 64), {}),
    "int8": partial(attention_timing.time_narrow, CASE, "int8", {}),
    "int4": partial(attention_timing.time_narrow, CASE, "int4", {}),
    "invariant": partial(attention_timing.time_invariant, CASE),
    "latent": partial(
        attention_timing.time_latent, attention_timing.LatentCase("latent", 2, 256, num_heads=8)
    ),
    "store": partial(timing.time_store, bench_kv_cache.Case("store", 70, 2, 64)),
}


@pytest.fixture(autouse=True)
def no_device(monkeypatch):
    for module in (attention_timing, timing):
        monkeypatch.setattr(module, "make_cold", lambda make, num_bytes: [make()])
        monkeypatch.setattr(module, "time_both_ways", lambda calls: {"graph_us": 1.0})
    monkeypatch.setattr(attention_timing, "replayed", lambda call: call())
    floor = {"floor_us": 1.0, "floor_by": "copy"}
    monkeypatch.setattr(attention_timing, "find_floor", lambda *_: floor)


@pytest.mark.parametrize("name", WORKS)
def test_what_is_right_is_timed(name):
    assert WORKS[name]()


@pytest.mark.parametrize("name", WORKS)
def test_what_does_nothing_is_refused(name, monkeypatch):
    monkeypatch.setattr(
        kvkernels, "paged_attention", lambda query, keys, values, *_, **__: torch.zeros(
            *query.shape[:2], values.shape[3]
        )
    )  # fmt: skip
    monkeypatch.setattr(kvkernels, "store_kv", lambda *_: None)
    with pytest.raises(RuntimeError, match="kvkernels: expected to agree"):
        WORKS[name]()


def test_what_a_graph_does_not_do_is_refused(monkeypatch):
    monkeypatch.setattr(
        attention_timing, "replayed", lambda call: torch.full_like(call(), torch.nan)
    )
    with pytest.raises(RuntimeError, match="kvkernels: expected to agree"):
        WORKS["decode"]()
