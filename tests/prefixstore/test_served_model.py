"""A session takes the KV of its own tokens, of its own model, and nothing else."""

import copy
import threading
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from cached_models import VOCABULARY, generate, random_tokens, run

from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import paged_attention
from prefixstore.cache import PrefixCache
from prefixstore.errors import ConfigError, TierUnavailable

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


def refusal(cache, model, tokens, **inputs):
    """What the model says to a session of `tokens` run on other inputs; nothing gets cached."""
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
    shifted = torch.arange(1, 41)[None]
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
    """The session can still be used as if nothing had been refused."""
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
        whole = torch.cat([tokens, torch.tensor([answer]), random_tokens(5, seed=3)], dim=1)
        assert_goes_on(model, session, whole)


def test_a_generation_that_failed_midway_is_not_tried_again_in_its_session(model, open_cache):
    tokens, num_calls = random_tokens(40), 0

    def fail(*_):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 5:
            raise RuntimeError("cancelled")

    cache = open_cache()
    hook = model.model.layers[0].register_forward_pre_hook(fail)
    with cache.session(tokens) as session:
        with pytest.raises(RuntimeError, match="cancelled"):
            generate(model, tokens, session)
        hook.remove()
        with pytest.raises(ValueError, match="more tokens than the 43 stored in the session"):
            generate(model, tokens, session)
    assert run(cache, model, tokens)[0] == generate(model, tokens)


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
        answer = torch.tensor([generate(model, tokens, session)])
        whole = torch.cat([tokens, answer, random_tokens(9, seed=3)], dim=1)
        for at in (3, 39, 44):
            edited = whole.clone()
            edited[0, at] = (edited[0, at] + 1) % VOCABULARY
            message = f"input_ids: expected the session's token {whole[0, at]} at {at}, got"
            with pytest.raises(ValueError, match=message):
                generate(model, edited, session)
        assert_goes_on(model, session, whole)


def test_an_edited_token_far_back_is_seen_at_the_next_token_too(model, open_cache):
    """Also where a generation goes on by one token, as each step of the last one did."""
    tokens = random_tokens(40)
    with open_cache().session(tokens) as session:
        answer = torch.tensor([generate(model, tokens, session)])
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
    """With an attention mask over all tokens, `generate` leaves none out."""
    tokens, new = random_tokens(40), random_tokens(5, seed=3)
    with open_cache().session(tokens) as session:
        answer = generate(model, tokens, session)
        # The last token of an answer has not been run yet.
        new = torch.cat([torch.tensor([answer[-1:]]), new], dim=1)
        whole = torch.cat([tokens, torch.tensor([answer[:-1]]), new], dim=1)
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


def test_a_served_model_can_be_copied(model, open_cache):
    open_cache()
    tokens = random_tokens(40)
    copied = copy.deepcopy(model)
    assert copied.prepare_inputs_for_generation.prepare.__self__ is copied
    assert generate(copied, tokens) == generate(model, tokens)


def test_a_session_keeps_its_own_copy_of_the_tokens(model, open_cache):
    cache = open_cache()
    tokens, other = random_tokens(64, seed=1), random_tokens(64, seed=2)
    buffer = tokens[0].numpy().astype(np.uint32)
    with cache.session(buffer) as session, torch.no_grad():
        model(tokens[:, :40], past_key_values=session)
        buffer[:40] = other[0, :40]
        model(tokens[:, 40:], past_key_values=session)
    assert cache.session(torch.cat([other[:, :40], tokens[:, 40:]], 1)).report.num_reused == 0
    assert cache.session(tokens).report.num_reused == 48


def test_a_session_passed_to_another_model_caches_nothing(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    torch.manual_seed(2)
    other = type(model)(model.config).eval()
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
    other = type(model)(model.config).eval()

    def fail(*_):
        raise RuntimeError("cancelled")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with paged_attention(other), cache.session(tokens) as session, torch.no_grad():
        with pytest.raises(RuntimeError, match="cancelled"):
            model(tokens, past_key_values=session)
        hook.remove()
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
        answer = torch.tensor([generate(model, tokens, session, num_new=30)])
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


def key_weight(model):
    return model.model.layers[1].self_attn.k_proj.weight


def scale(model):
    with torch.no_grad():
        key_weight(model).mul_(1.5)


def scale_data(model):
    # leaves the version counter as it is; adapters are merged so
    key_weight(model).data.mul_(1.5)


def replace_data(model):
    key_weight(model).data = key_weight(model).data * 1.5


def replace_parameter(model):
    model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(key_weight(model) * 1.5)


def replace_module(model):
    model.model.layers[1] = type(model.model.layers[1])(model.config, 1)


def assign_state(model):
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def scale_frequencies(model):
    next(model.model.rotary_emb.buffers()).mul_(2)  # not saved with the weights


CHANGES = [
    scale,
    scale_data,
    replace_data,
    replace_parameter,
    replace_module,
    assign_state,
    scale_frequencies,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_need_another_cache(model, open_cache, change):
    cache = open_cache()
    tokens = random_tokens(40)
    run(cache, model, tokens)
    change(model)
    with pytest.raises(ValueError, match="model: expected the weights the cache was opened with"):
        cache.session(tokens)
    assert run(open_cache(), model, tokens)[1].num_reused == 0


def test_weights_changed_during_a_session_cache_nothing(model, open_cache):
    cache = open_cache()
    tokens = random_tokens(40)
    with cache.session(tokens) as session:
        scale_data(model)
        with pytest.raises(ValueError, match="model: expected the weights the cache was opened"):
            generate(model, tokens, session)
    assert cache.stats().index.num_blocks == 0


def test_a_closed_cache_gives_the_model_back(model, open_cache):
    before = model.config._attn_implementation
    first, second = open_cache(), open_cache()
    tokens = random_tokens(40)
    first.close()
    with pytest.raises(ValueError, match="session: expected an open cache, got a closed one"):
        first.session(tokens)
    run(second, model, tokens)
    second.close()
    second.close()
    assert model.config._attn_implementation == before
    assert "prepare_inputs_for_generation" not in vars(model)
    generate(model, tokens)


def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    bloom = transformers.BloomForCausalLM(config).eval()
    before, threads = bloom.config._attn_implementation, threading.active_count()
    with pytest.raises((UnsupportedError, ConfigError)):
        PrefixCache.open(bloom, disk_path=tmp_path)
    with pytest.raises(UnsupportedError):
        PrefixCache.open(bloom, pool_tokens=64, disk_path=tmp_path)
    assert bloom.config._attn_implementation == before
    assert threading.active_count() == threads
    assert not list(tmp_path.iterdir())


def test_a_tier_that_cannot_be_opened_leaves_the_model_alone(model, tmp_path):
    before = model.config._attn_implementation
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(TierUnavailable):
        PrefixCache.open(model, pool_tokens=64, disk_path=tmp_path / "file")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "token_ids: expected at least one token, got none"),
        ([[1, 2], [3, 4]], r"token_ids: expected one sequence, .* got shape \[2, 2\]"),
        ([1.5, 2.5], "token_ids: expected integers, got float64"),
        ([1, -2], r"token_ids: expected token ids 0 to 2\*\*32 - 1, got -2 to 1"),
        ("hello", "token_ids: expected a tensor, an array or a list of token ids, got str"),
        (b"hello", "token_ids: expected a tensor, an array or a list of token ids, got bytes"),
        (None, "token_ids: expected a tensor, an array or a list of token ids, got NoneType"),
        (7, "token_ids: expected a tensor, an array or a list of token ids, got int"),
        (
            transformers.BatchEncoding({"input_ids": [[1, 2]]}),
            "token_ids: expected a tensor, an array or a list of token ids, got BatchEncoding",
        ),
    ],
)
def test_refuses_tokens_that_are_none(open_cache, tokens, message):
    with pytest.raises(ValueError, match=message):
        open_cache().session(tokens)


@pytest.mark.parametrize("salt", [b"x", 3])
def test_refuses_a_salt_that_is_no_string(open_cache, salt):
    with pytest.raises(ValueError, match=f"salt: expected a string or None, got {salt!r}"):
        open_cache().session([1, 2, 3], salt=salt)


def test_opens_with_the_smallest_tiers(open_cache, tmp_path):
    open_cache(memory_bytes=4096, disk_path=str(tmp_path), disk_bytes=4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 24}, "block_size: expected one of 16, 32, 64, 128, 256, got 24"),
        ({"pool_tokens": 8}, "pool_tokens: expected at least one block of 16, got 8"),
        ({"pool_tokens": 64.5}, "pool_tokens: expected an integer, got 64.5"),
        ({"salt": 3}, "salt: expected a string, got 3"),
        ({"memory_bytes": -1}, "memory_bytes: expected 0 or at least 4096, got -1"),
        ({"memory_bytes": 1}, "memory_bytes: expected 0 or at least 4096, got 1"),
        (
            {"disk_path": "x", "disk_bytes": 0},
            "disk_bytes: expected an integer of at least 4096, got 0",
        ),
        (
            {"disk_path": "x", "disk_bytes": 1},
            "disk_bytes: expected an integer of at least 4096, got 1",
        ),
        ({"disk_path": ""}, "disk_path: expected a directory, got ''"),
        ({"disk_path": 3}, "disk_path: expected a directory, got 3"),
    ],
)
def test_refuses_a_config_out_of_range(open_cache, options, message):
    with pytest.raises(ConfigError, match=message):
        open_cache(**options)
