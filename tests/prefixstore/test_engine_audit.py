"""Audits: reused blocks are recomputed, and wrong ones are not used again."""

import logging
import threading
import time

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_gemma3, tiny_llama
from dict_tier import DictTier
from engines import GREEDY, Numbers, answer, expected, open_engine, prompt
from failing_tiers import Gate

from kvkernels import CODECS
from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig, SamplingParams
from prefixstore.engine.audit import divergence_bound, relative_errors
from prefixstore.record import decode, encode
from prefixstore.store import Store

NUM_BLOCKS = 8
LENGTH = NUM_BLOCKS * BLOCK_SIZE + 5
WRONG = 3  # the block that is altered


class LyingTier(DictTier):
    """Returns keys and values other than it was given, with right checksums."""

    def __init__(self):
        super().__init__("lying")
        self.altered = {}  # keys of altered blocks, by hash
        self.num_lies = 0

    def _read(self, name, out):
        num_bytes = super()._read(name, out)
        key = self.altered.get(name.block_hash)
        if num_bytes is None or key is None:
            return num_bytes
        self.num_lies += 1
        block = bytearray(key.layout.block_bytes)
        decode(memoryview(out)[:num_bytes], key, block)
        np.frombuffer(block, np.float32)[:] *= -1
        record = bytearray(key.layout.encode_bytes)
        num_bytes = encode(key, block, record)
        out[:num_bytes] = record[:num_bytes]
        return num_bytes


@pytest.fixture(autouse=True)
def waits_for_tiers(monkeypatch, waits_for_look_ups):
    """Else prompts would be computed instead of restored on a busy machine."""
    monkeypatch.setattr("prefixstore.planner.plan._LEAST_PATIENCE_S", 30.0)


@pytest.fixture
def lying():
    return LyingTier()


@pytest.fixture
def engine(model, lying):
    """An engine with only the lying tier, which audits everything; checked at the end."""
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=1024)
    cache = PrefixCache.open(model, config, store=Store([lying]))
    engine_config = EngineConfig(audit_share=1, restore_policy="load")
    with Engine(model, Numbers(), cache, engine_config) as engine:
        yield engine
        assert engine.drain(60)
    assert engine.check() == []
    stats = cache.stats()
    assert stats.index.num_pinned_runs == 0
    assert stats.pool_free_blocks + stats.index.num_blocks == stats.pool_blocks
    cache.close()


def idle(engine):
    """Wait for all audits to end; returns the counters."""
    ends_at = time.monotonic() + 60
    while engine._loop.auditor.has_work(0.0):
        assert time.monotonic() < ends_at, "an audit hangs"
        time.sleep(0.001)
    return engine.stats()


def keys_of(engine, tokens):
    return engine.cache.blocks.keys(np.array(tokens, np.uint32), "")


def test_a_record_that_lies_is_caught_quarantined_and_computed(engine, lying, caplog):
    tokens = prompt(LENGTH)
    exact = answer(engine, tokens).token_ids
    assert engine.cache.flush()
    # With a sliding window only the last blocks are loaded.
    wrong = NUM_BLOCKS - 1
    lying.altered = {own[wrong].block_hash: own[wrong] for own in keys_of(engine, tokens)}
    with caplog.at_level(logging.ERROR, "prefixstore.engine.audit"):
        engine.cache.evict_pool()
        misled = answer(engine, tokens)
        stats = idle(engine)
    assert lying.num_lies and misled.report.reuse.tokens_by_tier["lying"] >= BLOCK_SIZE
    # The answer's block was computed from the wrong one.
    assert stats.num_quarantined == 2
    (line,) = caplog.messages
    assert f"block {wrong} (" in line and "from lying: relative error 2 in" in line

    again = answer(engine, tokens)
    assert again.token_ids == exact
    assert again.report.reuse.num_reused <= wrong * BLOCK_SIZE
    third = answer(engine, tokens)
    assert third.report.reuse.tokens_by_tier == {"device": NUM_BLOCKS * BLOCK_SIZE}
    assert idle(engine).num_quarantined == 2
    assert len(caplog.messages) == 1


def test_what_is_quarantined_is_deleted_and_never_loaded_again(engine, lying):
    tokens = prompt(LENGTH)
    exact = answer(engine, tokens).token_ids
    assert engine.cache.flush()
    planted, keys = dict(lying.records), keys_of(engine, tokens)
    idle(engine)
    blocks = engine.cache.blocks
    wrong = blocks.quarantine(np.array(tokens, np.uint32), "", keys, WRONG)
    assert blocks.store.delete_many(wrong) == []
    is_kept = [[key.block_hash in lying.records for key in own] for own in keys]
    assert is_kept == [[True] * WRONG + [False] * (NUM_BLOCKS - WRONG)] * len(keys)
    lying.records.update(planted)  # as by another process
    engine.cache.evict_pool()
    output = answer(engine, tokens)
    assert output.token_ids == exact
    assert output.report.reuse.tokens_by_tier.get("lying", 0) <= WRONG * BLOCK_SIZE
    assert blocks.store.load_many(wrong, None) == [None] * len(wrong)
    assert engine.cache.flush()
    engine.cache.evict_pool()


def test_a_run_that_is_detached_while_it_is_read_is_not_cached_again(model):
    tokens = prompt(LENGTH)
    sampling = SamplingParams(max_tokens=5 * BLOCK_SIZE, temperature=0, ignore_eos=True)
    with open_engine(model, audit_share=0, memory_bytes=0) as engine:
        answer(engine, tokens)
        blocks = engine.cache.blocks
        handle = engine.submit(tokens, sampling)
        next(iter(handle))
        with engine._loop.changed:
            array = np.array(tokens, np.uint32)
            blocks.quarantine(array, "", blocks.keys(array, ""), WRONG)
        assert len(handle.result(60).token_ids) == 5 * BLOCK_SIZE
        whole = array[: NUM_BLOCKS * BLOCK_SIZE]
        assert blocks.device.num_cached(whole, "") == WRONG
        assert engine.check() == []
        assert list(answer(engine, tokens).token_ids) == expected(model, tokens)
        assert blocks.device.num_cached(whole, "") == NUM_BLOCKS
        engine.cache.evict_pool()
        assert engine.cache.stats().pool_free_blocks == engine.cache.stats().pool_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["llama", "gemma3"])
def test_honest_blocks_are_never_quarantined(make, codec, dtype, tmp_path):
    if codec == "l12" and dtype == torch.float32:
        pytest.skip("l12 is for 16-bit blocks")
    torch.manual_seed(2)
    model = make().to(dtype)
    settings = {"codec": codec, "audit_share": 1, "restore_policy": "load", "disk_path": tmp_path}
    with open_engine(model, memory_bytes=0, **settings) as engine:
        tokens = prompt(200, seed=7)
        answer(engine, tokens[:120])
        assert engine.cache.flush()
        engine.cache.evict_pool()
        answer(engine, tokens)  # restores the front, computes the rest from it
        answer(engine, tokens)  # reuses both
        stats = idle(engine)
        assert stats.audited_blocks >= 12 and stats.num_quarantined == 0
        assert {"disk", "device"} <= stats.hit_tokens.keys()


def test_a_request_waits_for_one_block_of_an_audit_at_most(model):
    tokens = prompt(1500)
    with open_engine(model, audit_share=1, memory_bytes=0) as engine:
        answer(engine, tokens)
        run, passes, in_audit = engine._loop.runner.run, [], threading.Event()
        is_told = threading.Event()

        def watched(chunks, before_layer=None):
            if not any(chunk.wants_logits for chunk in chunks) and not is_told.is_set():
                passes.append("audit")
                if len(passes) == 3:
                    in_audit.set()
                    assert is_told.wait(30)
            elif is_told.is_set():
                passes.append("audit" if not chunks[0].wants_logits else "request")
            return run(chunks, before_layer)

        answer(engine, tokens)
        engine._loop.runner.run = watched
        assert in_audit.wait(30)
        handle = engine.submit(prompt(10, seed=5), GREEDY)
        is_told.set()
        handle.result(60)
        # The audit goes on only after all twelve tokens of the answer.
        assert passes[3:15] == ["request"] * 12
        engine._loop.runner.run = run
        stats = idle(engine)
        assert (stats.num_audits, stats.num_quarantined) == (1, 0)


def test_an_audit_gives_its_blocks_to_a_request(model):
    tokens = prompt(600)
    with open_engine(model, audit_share=1, memory_bytes=0, pool_tokens=1280) as engine:
        answer(engine, tokens)
        gate, run = Gate("audit"), engine._loop.runner.run
        answer(engine, tokens)

        def watched(chunks, before_layer=None):
            if chunks[0].start == 30 * BLOCK_SIZE:
                gate("audit")
            return run(chunks, before_layer)

        engine._loop.runner.run = watched
        assert gate.entered.wait(30), "no audit"
        handle = engine.submit(prompt(1200, seed=3), SamplingParams(max_tokens=4, temperature=0))
        engine._loop.runner.run = run
        gate.open()
        output = handle.result(60)
        assert len(output.token_ids) == 4 and output.report.num_preemptions == 0
        assert engine.stats().num_audits == 0


def test_closes_while_it_audits(model):
    engine = Engine.open(
        model, Numbers(), block_size=BLOCK_SIZE, pool_tokens=4096, audit_share=1, memory_bytes=0
    )
    tokens, gate, run = prompt(1500), Gate("audit"), engine._loop.runner.run
    answer(engine, tokens)
    answer(engine, tokens)

    def watched(chunks, before_layer=None):
        gate("audit")
        return run(chunks, before_layer)

    engine._loop.runner.run = watched
    assert gate.entered.wait(30), "no audit"
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.open()
    closing.join(30)
    assert not closing.is_alive()
    assert engine.cache.blocks.check() == []
    stats = engine.cache.stats()
    assert stats.index.num_pinned_runs == 0
    assert stats.pool_free_blocks + stats.index.num_blocks == stats.pool_blocks


def test_audits_the_share_that_was_asked_for(model):
    settings = {"memory_bytes": 0, "audit_seed": 1}
    for share, least, most in ((0, 0, 0), (0.5, 3, 17)):
        with open_engine(model, audit_share=share, **settings) as engine:
            chosen = []
            for _ in range(20):
                answer(engine, prompt(40))
                chosen.append(idle(engine).num_audits)
            assert least <= chosen[-1] <= most


def test_nan_and_zeros_are_measured_as_what_they_are():
    exact = torch.ones(1, 2, 1, 4, 8)
    wrong = exact.clone()
    wrong[0, 1, 0, 2, 3] = torch.nan
    assert relative_errors(wrong, exact)[0, 0] == 0 and relative_errors(wrong, exact)[0, 1].isnan()
    assert relative_errors(exact * 0, exact * 0).tolist() == [[0, 0]]
    assert divergence_bound(torch.float32, ["raw"]) < divergence_bound(torch.float32, ["raw", "q8"])
