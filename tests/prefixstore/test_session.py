"""A session accepts its own tokens and positions, however `generate` passes them."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from cached_models import (
    BLOCK_SIZE,
    VOCABULARY,
    as_row,
    calling_first,
    generate,
    random_tokens,
    run,
)
from dict_tier import DictTier, raises

from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import paged_attention
from prefixstore.cache import PrefixCache
from prefixstore.config import CacheConfig
from prefixstore.errors import TierUnavailable
from prefixstore.store import Store

needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="for transformers 5"
)


def test_commit_refuses_other_tokens(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        generate(model, tokens, session)
        other = tokens.clone()
        other[0, 7] = 1
        with pytest.raises(ValueError, match=r"token_ids: expected to continue .* at 7, got 1"):
            session.commit(other)
    with pytest.raises(ValueError, match="expected an open session, got a released one"):
        session.commit(torch.cat([tokens, tokens], dim=1))


def test_a_session_is_not_copied(model, open_cache):
    with (
        open_cache().session(random_tokens(40)) as session,
        pytest.raises(UnsupportedError, match=r"another session .* from PrefixCache\.session"),
    ):
        copy.deepcopy(session)


def refusal(cache, model, tokens, **inputs):
    """The error of running a session of `tokens` on other inputs; nothing must get cached."""
    with cache.session(tokens) as session, torch.no_grad():
        with pytest.raises((ValueError, UnsupportedError)) as error:
            model(past_key_values=session, **inputs)
        assert session.num_tokens == 0
    assert cache.session(tokens).report.num_reused == 0
    return str(error.value)


def test_a_session_refuses_what_is_not_its_own(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    other = tokens.clone()
    other[0, 7] = 1
    refused = partial(refusal, cache, model, tokens)
    expected = f"input_ids: expected the session's token {tokens[0, 7]} at 7, got 1"
    assert refused(input_ids=other) == expected
    shifted = torch.arange(1, 41, device=tokens.device)[None]
    expected = "position_ids: expected 0 to 39 with a session that holds 0 tokens, got 1 to 40"
    assert refused(input_ids=tokens, position_ids=shifted) == expected
    embeddings = model.get_input_embeddings()(tokens)
    assert refused(inputs_embeds=embeddings).startswith("inputs_embeds: expected input_ids alone")
    assert refused(input_ids=tokens[:, :0]).startswith("input_ids: expected more tokens than the 0")
    both = torch.cat([tokens, tokens])
    assert refused(input_ids=both) == (
        "input_ids: expected one sequence with a session (no beams, no several return sequences),"
        " got shape [2, 40]"
    )


def assert_goes_on(model, session, tokens):
    """Check that the session still works as if nothing had been refused."""
    expected = generate(model, tokens)
    assert generate(model, tokens, session) == expected


def test_a_session_is_not_generated_from_twice(model, open_cache):
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        answer = generate(model, tokens, session)
        with pytest.raises(
            ValueError, match="more tokens than the 51 stored in the session, got 40"
        ):
            generate(model, tokens, session)
        whole = torch.cat([tokens, as_row(answer), random_tokens(5, seed=3)], dim=1)
        assert_goes_on(model, session, whole)


def test_a_second_generation_is_compared_also_where_its_steps_are_not(
    model, open_cache, monkeypatch
):
    """On a GPU tokens are read once per generation; the next generation has others."""
    cache, tokens = open_cache(), random_tokens(40)
    with cache.session(tokens) as session:
        answer = generate(model, tokens, session)
        other = torch.cat([tokens, as_row(answer)], dim=1)
        other[0, 5] = (other[0, 5] + 1) % VOCABULARY
        inputs = {"past_key_values": session, "next_sequence_length": 1}
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        with pytest.raises(ValueError, match=r"input_ids: expected the session's token .* at 5,"):
            cache.served_model.check_prompt(other, {**inputs, "is_first_iteration": True})


def test_what_a_step_costs_does_not_grow_with_the_steps_before(model, open_cache):
    cache, tokens = open_cache(), random_tokens(40)
    with cache.session(tokens) as session:
        whole = torch.cat([tokens, as_row(generate(model, tokens, session, num_new=30))], dim=1)
        assert len(session._steps) == 29
        session.commit(whole)
        assert not session._steps  # none of them is compared again
        steps = session._steps
        more = as_row(generate(model, whole, session, num_new=30))
        assert (
            session._steps is steps and len(steps) == 30
        )  # nor copied; one is the last of `whole`
        assert session.commit(torch.cat([whole, more], dim=1)) == 96
        with pytest.raises(ValueError, match="token_ids: expected to continue"):
            session.commit(torch.cat([tokens, more], dim=1))


def test_a_generation_that_failed_midway_is_not_tried_again_in_its_session(model, open_cache):
    tokens, num_calls = random_tokens(40), 0

    def fail():
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise RuntimeError("cancelled")

    cache = open_cache()
    with cache.session(tokens) as session:
        failing = calling_first(model.model.layers[0], fail)
        with failing, pytest.raises(RuntimeError, match="cancelled"):
            generate(model, tokens, session)
        with pytest.raises(ValueError, match="more tokens than the 43 stored in the session"):
            generate(model, tokens, session)
    assert run(cache, model, tokens)[0] == generate(model, tokens)


def test_a_pass_that_failed_in_the_head_is_run_again(model, open_cache):
    cache, tokens = open_cache(), random_tokens(40)

    def fail():
        raise RuntimeError("cancelled")

    with cache.session(tokens) as session, torch.no_grad():
        with calling_first(model.lm_head, fail), pytest.raises(RuntimeError, match="cancelled"):
            model(tokens, past_key_values=session)
        assert session.num_tokens == 0
        model(tokens, past_key_values=session)
        assert session.commit(tokens) == 32
    out, report = run(cache, model, tokens)
    assert out == generate(model, tokens)
    assert report.num_reused == 32


def test_a_session_that_generates_without_use_of_it_is_refused(model, open_cache):
    tokens = random_tokens(40)
    with (
        open_cache().session(tokens) as session,
        pytest.raises(ValueError, match="position_ids: expected 40 to 80 with a session that"),
    ):
        model.generate(
            tokens, past_key_values=session, use_cache=False, max_new_tokens=4, pad_token_id=0
        )


def test_a_conversation_goes_on_in_its_session_unless_it_was_edited(model, open_cache):
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        answer = as_row(generate(model, tokens, session))
        whole = torch.cat([tokens, answer, random_tokens(9, seed=3)], dim=1)
        for at in (3, 39, 44):
            edited = whole.clone()
            edited[0, at] = (edited[0, at] + 1) % VOCABULARY
            message = f"input_ids: expected the session's token {whole[0, at]} at {at}, got"
            with pytest.raises(ValueError, match=message):
                generate(model, edited, session)
        assert_goes_on(model, session, whole)


def test_an_edited_token_far_back_is_seen_at_the_next_token_too(model, open_cache):
    """Also if a generation begins with one token, like each step of the last one."""
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        answer = as_row(generate(model, tokens, session))
        edited = torch.cat([tokens, answer], dim=1)
        edited[0, 3] = (edited[0, 3] + 1) % VOCABULARY
        with pytest.raises(ValueError, match=r"input_ids: expected the session's token .* at 3"):
            generate(model, edited, session)


def test_a_warm_session_refuses_another_prompt_with_the_same_end(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    other = tokens.clone()
    other[0, 7] = (other[0, 7] + 1) % VOCABULARY
    with cache.session(tokens) as session:
        assert session.report.num_reused == 32
        with pytest.raises(ValueError, match=f"token {tokens[0, 7]} at 7, got {other[0, 7]}"):
            generate(model, other, session)
        assert_goes_on(model, session, tokens)


@needs_transformers_5  # 4.57 runs chunks past the model's hooks, which a session refuses
def test_a_prompt_may_be_run_in_chunks(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(100)
    expected = generate(model, tokens)
    for num_reused in (0, 96):
        with cache.session(tokens) as session:
            out = model.generate(
                tokens,
                past_key_values=session,
                prefill_chunk_size=30,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
            assert session.report.num_reused == num_reused
        assert out[0, 100:].tolist() == expected


@needs_transformers_5  # 4.57 takes whole prompts
def test_new_tokens_may_come_alone(model, open_cache):
    """With an attention mask over all tokens, `generate` passes the new ones in full."""
    tokens, new = random_tokens(40), random_tokens(5, seed=3)
    with open_cache().session(tokens) as session:
        answer = generate(model, tokens, session)
        # The last token of an answer has not been run yet.
        new = torch.cat([as_row(answer[-1:]), new], dim=1)
        whole = torch.cat([tokens, as_row(answer[:-1]), new], dim=1)
        expected = generate(model, whole)
        out = model.generate(
            new,
            past_key_values=session,
            attention_mask=torch.ones_like(whole),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
        assert out[0, new.shape[1] :].tolist() == expected


def test_beams_are_refused_by_name(model, open_cache):
    tokens = random_tokens(40)
    with (
        open_cache().session(tokens) as session,
        pytest.raises(ValueError, match=r"no beams, no several return sequences"),
    ):
        model.generate(
            tokens, past_key_values=session, num_beams=2, max_new_tokens=4, pad_token_id=0
        )


def test_a_session_keeps_its_own_copy_of_the_tokens(model, open_cache):
    cache = open_cache()
    tokens, other = random_tokens(64, seed=1), random_tokens(64, seed=2)
    buffer = tokens[0].cpu().numpy().astype(np.uint32)
    with cache.session(buffer) as session, torch.no_grad():
        model(tokens[:, :40], past_key_values=session)
        buffer[:40] = other[0, :40].cpu()
        model(tokens[:, 40:], past_key_values=session)
    assert cache.session(torch.cat([other[:, :40], tokens[:, 40:]], 1)).report.num_reused == 0
    assert cache.session(tokens).report.num_reused == 48


def test_a_session_passed_to_another_model_caches_nothing(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    torch.manual_seed(2)
    other = type(model)(model.config).eval().to(model.device)
    with (
        paged_attention(other),
        cache.session(tokens) as session,
        torch.no_grad(),
        pytest.raises(ValueError, match="expected a forward pass of the model the cache"),
    ):
        other(tokens, past_key_values=session)
    assert cache.session(tokens).report.num_reused == 0


def test_a_failed_pass_does_not_open_the_session_to_another_model(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    other = type(model)(model.config).eval().to(model.device)

    def fail():
        raise RuntimeError("cancelled")

    with paged_attention(other), cache.session(tokens) as session, torch.no_grad():
        failing = calling_first(model.model.layers[1], fail)
        with failing, pytest.raises(RuntimeError, match="cancelled"):
            model(tokens, past_key_values=session)
        with pytest.raises(ValueError, match="expected a forward pass of the model the cache"):
            other(tokens, past_key_values=session)
        model(tokens, past_key_values=session)
    plain = generate(model, tokens)
    out, report = run(cache, model, tokens)
    assert out == plain
    assert report.num_reused == 32


def test_commit_refuses_what_the_model_was_not_run_on(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        answer = as_row(generate(model, tokens, session, num_new=30))
        made_up = answer.clone()
        made_up[0, 11] = (answer[0, 11] + 1) % VOCABULARY
        with pytest.raises(ValueError, match=r"input_ids: expected the session's token .* at 51"):
            session.commit(torch.cat([tokens, made_up], dim=1))
        assert session.commit(torch.cat([tokens, answer], dim=1)) == 64


def test_what_was_cropped_away_may_be_other_tokens(model, open_cache):
    cache = open_cache()
    tokens, other = random_tokens(30), random_tokens(30, seed=5)
    with cache.session(tokens) as session, torch.no_grad():
        model(tokens, past_key_values=session)
        model(tokens[:, :10], past_key_values=session)
        session.crop(-5)
        model(other[:, :10], past_key_values=session)
        whole = torch.cat([tokens, tokens[:, :5], other[:, :10]], dim=1)
        assert session.commit(whole) == 32
    plain = generate(model, whole)
    assert run(cache, model, whole)[0] == plain


def test_commit_leaves_the_last_token_open(model, open_cache):
    """The last token that `generate` returns has no KV yet."""
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        whole = torch.cat([tokens, as_row(generate(model, tokens, session, num_new=8))], dim=1)
        assert session.num_tokens == whole.shape[1] - 1
        session.commit(whole)
        other = torch.cat([whole[:, :-1], (whole[:, -1:] + 1) % 8], dim=1)
        generate(model, other, session, num_new=3)


@pytest.mark.parametrize("reason", ["new", "evicted", "lost", "unreachable", "quarantined"])
def test_a_session_says_why_blocks_are_computed(model, reason):
    tier, tokens = DictTier("slow"), random_tokens(100)
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=512)
    with PrefixCache.open(model, config, store=Store([tier])) as cache:
        if reason != "new":
            run(cache, model, tokens)
            assert cache.flush(10)
            cache.evict_pool()
        if reason == "unreachable":
            tier.fail = raises(TierUnavailable, "contains")
        if reason == "evicted":
            tier.records.clear()
        if reason == "lost":
            tier.fail = raises(TierUnavailable, "get")
        if reason == "quarantined":
            for keys in cache.blocks.keys(tokens[0].numpy().astype(np.uint32), ""):
                cache.blocks.store.quarantine(keys)
        with cache.session(tokens) as session:
            assert session.report.misses == {reason: 96}


def test_a_session_says_which_blocks_lie_behind_a_gap(model):
    tier, tokens = DictTier("slow"), random_tokens(100)
    config = CacheConfig(block_size=BLOCK_SIZE, pool_tokens=512)
    with PrefixCache.open(model, config, store=Store([tier])) as cache:
        run(cache, model, tokens)
        assert cache.flush(10)
        cache.evict_pool()
        for keys in cache.blocks.keys(tokens[0].numpy().astype(np.uint32), ""):
            del tier.records[keys[2].block_hash]
        behind = "window" if len(cache.blocks.device.windows) > 1 else "gap"
        with cache.session(tokens) as session:
            assert session.report.tokens_by_tier == {"slow": 32}
            assert session.report.misses == {"evicted": 16, behind: 48}
