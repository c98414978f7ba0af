"""After a request with NaN logits the engine keeps nothing that would spoil another."""

import logging

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, tiny_gemma3
from dict_tier import DictTier
from engines import Numbers, answer, expected, open_engine, prompt

from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.engine import Engine, EngineConfig, FinishReason
from prefixstore.engine.sequence import SequenceBlocks
from prefixstore.store import Store

BAD_TOKEN = 1  # no prompt has it
NUM_CLEAN = 2  # blocks before it
CHUNK = 4 * BLOCK_SIZE


@pytest.fixture
def overflowing(model):
    """A model whose KV becomes NaN after one token."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # Gemma ties it to the embedding
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD_TOKEN] = torch.inf
    return model


def bad_prompt():
    """A prompt of three chunks; the first two are published before there are logits."""
    clean = prompt(NUM_CLEAN * BLOCK_SIZE)
    return clean, [*clean, BAD_TOKEN, *prompt(3 * CHUNK - len(clean) - 5, seed=1)]


def num_cached(engine, tokens):
    blocks = engine.cache.blocks
    whole = np.array(tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE], np.uint32)
    match, ids = blocks.device.find(whole, "")
    for group, own in zip(blocks.device.groups, ids.T, strict=True):
        assert group.pool.data[own[own >= 0]].isfinite().all()
    blocks.device.release(ids)
    blocks.device.unpin(match)
    return len(ids)


def test_blocks_that_hold_no_numbers_are_offered_to_nobody(overflowing, caplog):
    clean, bad = bad_prompt()
    question = [*clean, *prompt(9, seed=2)]
    with open_engine(overflowing, memory_bytes=0, max_batch_tokens=CHUNK) as engine:
        with caplog.at_level(logging.ERROR, "prefixstore.engine.loop"):
            output = answer(engine, bad)
        assert output.finish_reason == FinishReason.ERROR
        assert output.error == "logits: expected a finite largest one, got nan"
        assert num_cached(engine, bad) <= NUM_CLEAN
        assert engine.stats().num_quarantined >= len(bad) // BLOCK_SIZE - NUM_CLEAN
        (line,) = caplog.messages
        assert "got nan" in line and "blocks quarantined" in line
        assert list(answer(engine, question).token_ids) == expected(overflowing, question)


def test_records_that_hold_no_numbers_are_deleted_from_the_tiers(overflowing):
    _, bad = bad_prompt()
    tier = DictTier("memory")
    cache = PrefixCache.open(
        overflowing, CacheConfig(block_size=BLOCK_SIZE, pool_tokens=2048), store=Store([tier])
    )
    config = EngineConfig(max_batch_tokens=CHUNK, audit_share=0)
    with Engine(overflowing, Numbers(), cache, config) as engine:
        assert answer(engine, bad).finish_reason == FinishReason.ERROR
    assert cache.flush()
    wrong = cache.blocks.keys(np.array(bad, np.uint32), "")
    assert not {key.block_hash for own in wrong for key in own[NUM_CLEAN:]} & set(tier.records)
    cache.close()


def test_a_pass_that_came_to_no_numbers_publishes_nothing(model):
    """Even if its keys and values are finite."""
    tokens = prompt(CHUNK + BLOCK_SIZE)
    with open_engine(model, memory_bytes=0, max_batch_tokens=CHUNK) as engine:
        run = engine._loop.runner.run

        def spoil(chunks, *arguments):
            logits = run(chunks, *arguments)
            return None if logits is None else torch.full_like(logits, torch.nan)

        engine._loop.runner.run = spoil
        assert answer(engine, tokens).finish_reason == FinishReason.ERROR
        engine._loop.runner.run = run
        assert 0 < num_cached(engine, tokens) < CHUNK // BLOCK_SIZE  # the first pass's blocks
        assert engine.stats().num_quarantined == 0
        assert list(answer(engine, tokens).token_ids) == expected(model, tokens)


def test_a_block_that_is_read_after_its_eviction_stays_quarantined():
    """A running request no longer pins blocks that its sliding window has passed."""
    torch.manual_seed(1)
    tokens = np.array(prompt(10 * BLOCK_SIZE), np.uint32)
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=64 * BLOCK_SIZE)
    with PrefixCache.open(tiny_gemma3(), config) as cache:
        blocks = cache.blocks
        keys = blocks.keys(tokens, "")
        sequence = SequenceBlocks(blocks, tokens, "", keys, len(tokens))

        def advance(number):
            start, stop = number * BLOCK_SIZE, (number + 1) * BLOCK_SIZE
            sequence.grow(start, stop)
            sequence.note_computed(start, stop)
            sequence.publish(tokens[:stop], stop)
            sequence.drop_passed(stop)

        for number in range(8):
            advance(number)
        blocks.quarantine(tokens, "", keys, 3)
        assert blocks.device.num_cached(tokens, "") == 3
        advance(8)
        assert blocks.device.evict_all() > 0
        advance(9)
        match, ids = blocks.device.find(tokens, "")
        assert len(ids) <= 3
        blocks.device.release(ids)
        blocks.device.unpin(match)

        sequence.release()
        again = SequenceBlocks(blocks, tokens, "", keys, len(tokens))
        again.grow(0, len(tokens))
        again.publish(tokens, len(tokens))
        assert blocks.device.num_cached(tokens, "") == 10  # its block ids are reused by now
        again.release()
        assert cache.check() == []
