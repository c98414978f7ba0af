"""Prompts whose last tokens are computed while the prefix is loaded layer after layer."""

import threading

import pytest
import torch
from cached_models import BLOCK_SIZE, calling_first, tiny_llama
from dict_tier import DictTier
from engines import GREEDY, Numbers, expected, prompt
from test_engine_restoring import warm, watch

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig, SamplingParams
from prefixstore.engine.load_call import LoadCall
from prefixstore.engine.overlap import Overlap
from prefixstore.engine.restoring import Restoring
from prefixstore.planner import Meeting
from prefixstore.planner.outlook import Outlook
from prefixstore.store import Store, StoreConfig

NUM_BLOCKS = 30
TOKENS = prompt(NUM_BLOCKS * BLOCK_SIZE + 5)
NUM_LAYERS = 3
LAYER_BYTES = BLOCK_SIZE * 2 * 2 * 16 * 4  # keys and values, heads, head_dim, float32


class LayerTier(DictTier):
    """A tier that calls a test's function with the offset before it reads parts of records."""

    def __init__(self):
        super().__init__("slow")
        self.before_part = lambda offset: None

    def get_many(self, names, outs, *, offsets=None, deadline=None):
        if offsets is not None:
            self.before_part(offsets[0])
        return super().get_many(names, outs, offsets=offsets, deadline=deadline)


@pytest.fixture
def tier():
    return LayerTier()


@pytest.fixture
def engine(tier, monkeypatch, waits_for_look_ups):
    """An engine with `TOKENS` only in its tier, whose planner believes that loading pays well."""
    # Loads wait for the model here, on a busy machine longer than the plan would allow.
    monkeypatch.setattr("prefixstore.planner.plan._LEAST_PATIENCE", 10.0)
    torch.manual_seed(1)
    store = Store([tier], StoreConfig(load_timeout_s=20.0))
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048)
    model = tiny_llama()
    cache = PrefixCache.open(model, config, store=store)
    engine = Engine(model, Numbers(), cache, EngineConfig(max_batch_tokens=24))
    warm(engine, TOKENS)
    cache.blocks.device.groups[0].pool.data.fill_(float("nan"))
    planner = engine._loop.planner
    for num_tokens in (8, 16, 24) * 10:
        planner.observe_prefill(num_tokens, 100, 5e-3 * num_tokens)
        planner.observe_load("slow", 5000 * num_tokens, 10, 1e-3 + 4e-4 * num_tokens, 0.0)
    yield engine
    tier.before_part = lambda offset: None
    assert engine.drain(60)
    engine.close()
    assert engine.check() == []
    assert cache.flush()
    stats = cache.stats()
    cache.close()
    assert stats.pool_free_blocks + stats.index.num_blocks == stats.pool_blocks


def last_layer_of(tier):
    """Where the last layer begins in a record; all layers have the same length."""
    (length,) = {len(record) for record in tier.records.values()}
    return length - LAYER_BYTES


@pytest.fixture
def voids(monkeypatch):
    """Number of chunks computed for nothing."""
    seen = []
    watch(monkeypatch, Meeting, "chunk_void", lambda *_: seen.append(1))
    return seen


def test_the_first_layer_is_computed_before_the_last_one_has_come(tier, engine, voids):
    is_computed, last = threading.Event(), last_layer_of(tier)
    has_waited = []

    def wait_for_the_model(offset):
        if offset == last:
            has_waited.append(is_computed.wait(10))

    tier.before_part = wait_for_the_model
    # The second load begins once the first chunk is computed.
    with calling_first(engine.model.model.layers[1], is_computed.set):
        output = engine.submit(TOKENS, GREEDY).result(60)
    assert has_waited == [True]
    assert not voids
    assert list(output.token_ids) == expected(engine.model, TOKENS)
    assert output.report.reuse.tokens_by_tier == {"slow": NUM_BLOCKS * BLOCK_SIZE}


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_damaged_layer_spoils_nothing_but_its_block(tier, engine, voids, layer, monkeypatch):
    """Tokens computed from it are computed again; others in the pass are not affected."""
    number, passes = 17, []
    is_submitted, is_asked, is_begun = (threading.Event() for _ in range(3))
    last = last_layer_of(tier)
    watch(
        *(monkeypatch, Overlap, "valid_steps"),
        lambda valid, args, _: passes.append((len(args[0].steps), len(valid))),
    )
    watch(
        *(monkeypatch, Restoring, "next_overlapped_chunk"),
        lambda chunk, *_: is_begun.set() if chunk is not None else None,
    )
    # A chunk beside another's token is begun at once, however long the layers may take.
    monkeypatch.setattr(Outlook, "early_s", lambda *_: 0.0)

    def wait_for_the_pass(offset):
        if offset == last:
            is_asked.set()
            assert is_begun.wait(10)

    def hold_the_other():
        """Keep it from ending before the layers are asked for; one more pass admits the prompt."""
        assert not passes or is_submitted.wait(10)
        assert len(passes) < 2 or is_asked.wait(10)

    tier.before_part = wait_for_the_pass
    ((*_, key),) = engine.cache.blocks.keys(
        *engine.cache.checked_prompt(TOKENS[: (number + 1) * BLOCK_SIZE], None)
    )
    record = bytearray(tier.records[key.block_hash])
    record[last - (NUM_LAYERS - 1 - layer) * LAYER_BYTES + 100] ^= 1
    tier.records[key.block_hash] = bytes(record)
    with calling_first(engine.model.model.layers[0], hold_the_other):
        other = engine.submit(prompt(20, seed=3), SamplingParams(max_tokens=60, temperature=0))
        first_piece = next(iter(other))
        prompted = engine.submit(TOKENS, GREEDY)
        is_submitted.set()
        output = prompted.result(60)
    assert first_piece.text and list(output.token_ids) == expected(engine.model, TOKENS)
    reuse = output.report.reuse
    assert reuse.misses == {"lost": BLOCK_SIZE}
    assert reuse.tokens_by_tier == {"slow": (NUM_BLOCKS - 1) * BLOCK_SIZE}
    assert len(voids) == 1 and (2, 1) in passes
    answer = list(other.result(60).token_ids)
    assert answer == expected(engine.model, prompt(20, seed=3), num_new=60)
    again = engine.submit(TOKENS, GREEDY).result(60)
    assert again.token_ids == output.token_ids


def test_a_layer_that_does_not_come_delays_nobody(tier, engine, voids):
    is_asked, is_over, last = threading.Event(), threading.Event(), last_layer_of(tier)

    def hang(offset):
        if offset == last:
            is_asked.set()
            assert is_over.wait(30)

    tier.before_part = hang
    output = engine.submit(TOKENS, GREEDY).result(60)
    assert is_asked.is_set()
    is_over.set()
    assert len(voids) == 1
    assert list(output.token_ids) == expected(engine.model, TOKENS)
    assert output.report.reuse.num_recomputed == len(TOKENS)


@pytest.mark.parametrize(
    "is_alone, num_behind",
    [(True, 20), (True, 40), (False, 20)],
    ids=["alone", "alone without logits", "beside another"],
)
def test_a_layer_that_comes_after_its_wait_counts_for_nothing(
    tier, engine, voids, is_alone, num_behind, monkeypatch
):
    """Even if it arrives before the pass ends."""
    is_over, last = threading.Event(), last_layer_of(tier)
    tier.before_part = lambda offset: offset == last and is_over.wait(10)
    wait_layer, valid_steps = LoadCall.wait_layer, Overlap.valid_steps

    def wait_for_all_but_the_last(load, layer, until):
        return wait_layer(load, layer, 0.0 if layer == NUM_LAYERS - 1 else until)

    def judge_once_all_is_loaded(overlap):
        for restoring in [step.request.restoring for step in overlap.steps if step.load]:
            is_over.set()
            assert overlap._changed.wait_for(lambda one=restoring: one.load_under_way is None, 10)
        return valid_steps(overlap)

    asked = TOKENS[: NUM_BLOCKS * BLOCK_SIZE] + prompt(num_behind, seed=9)
    if not is_alone:
        other = engine.submit(prompt(20, seed=3), SamplingParams(max_tokens=60, temperature=0))
        assert next(iter(other)).text
    monkeypatch.setattr(LoadCall, "wait_layer", wait_for_all_but_the_last)
    monkeypatch.setattr(Overlap, "valid_steps", judge_once_all_is_loaded)
    output = engine.submit(asked, GREEDY).result(60)
    assert len(voids) == 1
    assert list(output.token_ids) == expected(engine.model, asked)
    assert output.report.reuse.tokens_by_tier == {"slow": NUM_BLOCKS * BLOCK_SIZE}
    again = engine.submit(asked, GREEDY).result(60)
    assert again.token_ids == output.token_ids
