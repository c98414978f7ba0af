"""The paged cache: preloaded blocks, block counts, cropping, copies, failures."""

import copy

import pytest
import torch
from tiny_models import BLOCK_SIZE, WINDOW, gemma3, generate, llama, make_groups

from kvkernels import PoolFullError, UnsupportedError
from kvkernels.nn.fused_model import fused_model
from kvkernels.nn.transformers import PagedCache, paged_attention


def share_prefix(cache, num_tokens):
    """Block tables for the first tokens of a cache's sequences, as an index would return them.

    Without blocks that the window never reaches again.
    """
    tables = []
    for index, group in enumerate(cache.groups):
        first = 0
        if group.window is not None:
            first = max(0, num_tokens - group.window + 1) // BLOCK_SIZE
        rows = []
        for sequence in range(cache.batch_size):
            ids = cache.block_ids(index, sequence)[: -(-num_tokens // BLOCK_SIZE)]
            group.allocator.share(ids[first:])
            rows.append([-1] * first + ids[first:])
        tables.append(rows)
    return tables


@pytest.fixture(params=[llama, gemma3])
def model(request):
    model = request.param()
    with paged_attention(model):
        yield model


@pytest.mark.parametrize("num_cached", [16, 48, 64, 69, 50], ids="{} cached".format)
def test_preloaded_blocks_give_the_same_tokens(model, num_cached):
    """Whole blocks, and a shared last block that is partly used, so it is copied before writing."""
    ids = torch.randint(1, 128, (2, 70))
    groups = make_groups(model)
    steps = []
    with PagedCache(groups, batch_size=2) as cold:
        want = generate(model, ids, past_key_values=cold)
        tables = share_prefix(cold, num_cached)
        before = [group.pool.data[: group.pool.num_blocks].clone() for group in groups]
        with PagedCache(
            groups,
            batch_size=2,
            num_cached_tokens=num_cached,
            block_tables=tables,
            on_step=lambda cache: steps.append(cache.num_tokens),
        ) as warm:
            assert torch.equal(generate(model, ids, past_key_values=warm), want)
        assert steps == list(range(70, 70 + 24))
        for index, group in enumerate(groups):  # the first cache's blocks have not changed
            held = [block for row in range(2) for block in cold.block_ids(index, row)]
            # Compared as bytes, since unused slots may hold NaN.
            now = group.pool.data[held].view(torch.uint8)
            assert torch.equal(now, before[index][held].view(torch.uint8))
    for group in groups:
        assert group.allocator.num_free == 32
        assert group.allocator.check() == []


def test_model_sees_only_the_uncached_tokens(model):
    ids = torch.randint(1, 128, (1, 70))
    seen = []
    groups = make_groups(model)
    embedding = model.get_input_embeddings()
    with PagedCache(groups) as cold:
        generate(model, ids, past_key_values=cold)
        hook = embedding.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
        warm = PagedCache(groups, num_cached_tokens=64, block_tables=share_prefix(cold, 64))
        generate(model, ids, past_key_values=warm, num_new=3)
        hook.remove()
    assert seen == [6, 1, 1]


def test_compiled_model_stores_and_computes_the_same(model):
    ids = torch.randint(1, 128, (1, 42))

    def run(forward):
        groups = make_groups(model)
        for group in groups:
            group.pool.data.zero_()
        with PagedCache(groups) as cache, torch.no_grad():
            steps = ids.split([40, 1, 1], dim=1)
            logits = [forward(step, past_key_values=cache).logits[:, -1] for step in steps]
            return torch.stack(logits), [group.pool.data for group in groups]

    want, stored = run(model)
    torch._dynamo.reset()
    got, stored_compiled = run(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(stored_compiled, stored, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_sliding_window_ignores_what_it_cannot_reach():
    """Blocks before the window may be missing; one inside it may not."""
    model = gemma3()
    groups = make_groups(model)
    sliding = groups[1]
    full_ids = groups[0].allocator.allocate(4)
    sliding_ids = sliding.allocator.allocate(4)
    first = (64 - WINDOW + 1) // BLOCK_SIZE
    kept = [-1] * first + sliding_ids[first:]
    PagedCache(groups, num_cached_tokens=64, block_tables=[[full_ids], [kept]])
    one_short = [-1] * (first + 1) + sliding_ids[first + 1 :]
    with pytest.raises(ValueError, match=f"block {first} of sequence 0 to be held"):
        PagedCache(groups, num_cached_tokens=64, block_tables=[[full_ids], [one_short]])


def test_block_ids_cover_the_stored_tokens(model):
    with PagedCache(make_groups(model)) as cache:
        generate(model, torch.randint(1, 128, (1, 31)), past_key_values=cache, num_new=2)
        assert cache.num_tokens == 32
        assert all(len(cache.block_ids(group, 0)) == 2 for group in range(len(cache.groups)))
        generate(model, torch.randint(1, 128, (1, 40)), past_key_values=cache, num_new=1)
        assert cache.num_tokens == 40
        assert all(len(cache.block_ids(group, 0)) == 3 for group in range(len(cache.groups)))


def test_reserve_hands_out_the_blocks(model):
    groups = make_groups(model)
    calls = []

    def reserve(index, num_blocks):
        calls.append((index, num_blocks))
        return groups[index].allocator.allocate(num_blocks)

    with PagedCache(groups, batch_size=2, reserve=reserve) as cache:
        ids = torch.randint(1, 128, (2, 33))
        generate(model, ids, past_key_values=cache, num_new=2)
    assert calls == [(index, 6) for index in range(len(groups))]  # 3 blocks for 2 sequences, once


def test_reserve_that_gives_too_few_is_refused():
    model = llama()
    cache = PagedCache(make_groups(model), reserve=lambda index, num_blocks: [])
    with (
        torch.no_grad(),
        paged_attention(model),
        pytest.raises(ValueError, match="reserve: expected 1 block ids, got 0"),
    ):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)


def test_full_pool_loses_nothing(model):
    """After making room the same call succeeds, with the right tokens."""
    ids = torch.randint(1, 128, (1, 60))
    with PagedCache(make_groups(model)) as cache:
        want = generate(model, ids, past_key_values=cache)
    groups = make_groups(model, num_blocks=6)
    others = [group.allocator.allocate(4) for group in groups]
    cache = PagedCache(groups)
    with pytest.raises(PoolFullError):
        generate(model, ids, past_key_values=cache)
    assert cache.num_tokens == 0
    for group, ids_of_others in zip(groups, others, strict=True):
        group.allocator.release(ids_of_others)
    assert torch.equal(generate(model, ids, past_key_values=cache), want)
    cache.release()
    assert all(group.allocator.num_free == 6 for group in groups)


def test_forward_that_fails_midway_starts_over():
    model = gemma3()
    ids = torch.randint(1, 128, (1, 40))
    fail = True

    def break_once(*_):
        nonlocal fail
        if fail:
            fail = False
            raise KeyboardInterrupt

    with paged_attention(model), PagedCache(make_groups(model)) as cache, torch.no_grad():
        want = model(ids, use_cache=False).logits[:, -1]
        hook = model.model.layers[2].register_forward_hook(break_once)
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        hook.remove()
        assert cache.num_tokens == 0
        got = model(ids, past_key_values=cache).logits[:, -1]
        assert cache.num_tokens == 40
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["model.layers.3.mlp", "lm_head"])
@pytest.mark.parametrize("serve", [paged_attention, fused_model])
def test_forward_that_fails_after_the_last_layer_was_stored_starts_over(serve, part):
    model = gemma3()
    ids = torch.randint(1, 128, (1, 41))

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), serve(model), PagedCache(make_groups(model)) as cache:
        want = model(ids, use_cache=False).logits[:, -1]
        for begin, end in ((0, 40), (40, 41)):
            hook = model.get_submodule(part).register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, begin:end], past_key_values=cache)
            hook.remove()
            assert cache.num_tokens == begin
            got = model(ids[:, begin:end], past_key_values=cache).logits[:, -1]
        assert cache.num_tokens == 41
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 5, 16, 33])
def test_a_cropped_cache_gives_its_blocks_back_and_can_be_gone_on_from(model, keep):
    ids = torch.randint(1, 128, (1, 40))
    groups = make_groups(model)
    with PagedCache(groups) as cache, torch.no_grad():
        want = model(ids, past_key_values=cache).logits[:, -1]
        cache.crop(keep - 40)
        assert cache.num_tokens == keep
        assert len(cache.block_ids(0, 0)) == -(-keep // BLOCK_SIZE)
        got = model(ids[:, keep:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert all(group.allocator.num_free == 32 for group in groups)


def test_crop_into_a_shared_block_leaves_it_as_it_was():
    model = llama()
    groups = make_groups(model)
    allocator, pool = groups[0].allocator, groups[0].pool
    with paged_attention(model), torch.no_grad(), PagedCache(groups, batch_size=2) as cache:
        model(torch.randint(1, 128, (2, 40)), past_key_values=cache)
        shared = [cache.block_ids(0, row)[0] for row in range(2)]
        allocator.share(shared)  # as an index that cached the first block
        before = pool.data[shared].clone()
        cache.crop(-30)
        model(torch.randint(1, 128, (2, 20)), past_key_values=cache)
        assert torch.equal(pool.data[shared], before)
        assert [allocator.ref_count(block) for block in shared] == [1, 1]


def test_a_copy_goes_on_by_itself_from_shared_blocks(model):
    ids = torch.randint(1, 128, (2, 70))
    groups = make_groups(model)

    def go_on(cache, num_tokens):
        return generate(model, ids[:, :num_tokens], past_key_values=cache, num_new=10)

    with paged_attention(model), torch.no_grad(), PagedCache(groups, batch_size=2) as cache:
        want = [go_on(PagedCache(make_groups(model), batch_size=2), length) for length in (60, 70)]
        model(ids[:, :40], past_key_values=cache)
        num_free = [group.allocator.num_free for group in groups]
        with copy.deepcopy(cache) as copied:
            assert copied.num_tokens == 40
            assert [group.allocator.num_free for group in groups] == num_free
            assert torch.equal(go_on(copied, 60), want[0])
            assert cache.num_tokens == 40
            assert torch.equal(go_on(cache, 70), want[1])
        with pytest.raises(ValueError, match="got a released one"):
            go_on(copy.deepcopy(copied), 60)
    assert all(group.allocator.num_free == 32 for group in groups)


def test_full_pool_while_copying_a_shared_block_changes_nothing():
    model = llama()
    groups = make_groups(model, num_blocks=3)
    allocator = groups[0].allocator
    ids = torch.randint(1, 128, (1, 40))
    with paged_attention(model), torch.no_grad(), PagedCache(groups) as cache:
        want = model(ids, past_key_values=cache).logits[:, -1]
        shared = cache.block_ids(0, 0)
        allocator.share(shared)
        with pytest.raises(PoolFullError):
            model(ids[:, :1], past_key_values=cache)
        assert cache.num_tokens == 40
        assert cache.block_ids(0, 0) == shared
        allocator.release(shared)
        cache.crop(-1)
        got = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert allocator.num_free == 3


def test_crop_keeps_a_positive_number_and_refuses_more_than_there_is():
    model = llama()
    with paged_attention(model), torch.no_grad(), PagedCache(make_groups(model)) as cache:
        model(torch.ones(1, 20, dtype=torch.int64), past_key_values=cache)
        cache.crop(7)
        assert cache.num_tokens == 7
        for wrong in (-8, 8):
            with pytest.raises(ValueError, match="at most 7"):
                cache.crop(wrong)


def test_crop_behind_the_held_window_is_refused():
    model = gemma3()
    groups = make_groups(model)
    tables = [[groups[0].allocator.allocate(4)], [[-1, -1, *groups[1].allocator.allocate(2)]]]
    cache = PagedCache(groups, num_cached_tokens=64, block_tables=tables)
    with pytest.raises(ValueError, match="the window reaches it"):
        cache.crop(-32)
    assert cache.num_tokens == 64


def test_reset_forgets_everything(model):
    ids = torch.randint(1, 128, (1, 20))
    groups = make_groups(model)
    with PagedCache(groups) as cache:
        want = generate(model, ids, past_key_values=cache)
        cache.reset()
        assert cache.num_tokens == 0
        assert all(group.allocator.num_free == 32 for group in groups)
        assert torch.equal(generate(model, ids, past_key_values=cache), want)


def test_released_cache_is_refused():
    model = llama()
    cache = PagedCache(make_groups(model))
    cache.release()
    cache.release()
    with (
        torch.no_grad(),
        paged_attention(model),
        pytest.raises(ValueError, match="got a released one"),
    ):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected a positive integer"),
        ({"num_cached_tokens": -1}, "num_cached_tokens: expected 0 or more"),
        ({"num_cached_tokens": 16}, "block_tables: expected 1 blocks for 16 tokens, got 0"),
        ({"block_tables": []}, "block_tables: expected 1 groups, got 0"),
        ({"block_tables": [[[], []]]}, "block_tables: expected 1 sequences, got 2"),
        ({"block_tables": [[[0]]]}, "block_tables: expected 0 blocks for 0 tokens, got 1"),
    ],
)
def test_refuses_a_cache_with_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PagedCache(make_groups(llama()), **options)


def test_constructor_refuses_layers_that_make_no_model():
    full, sliding = make_groups(gemma3())
    for groups in ([], [sliding], [full, full]):
        with pytest.raises(ValueError, match="groups: expected every layer from 0 once"):
            PagedCache(groups)


def test_other_batch_than_the_caches_is_refused():
    model = llama()
    with (
        torch.no_grad(),
        paged_attention(model),
        pytest.raises(ValueError, match="a batch of 1"),
    ):
        model(torch.ones(2, 3, dtype=torch.int64), past_key_values=PagedCache(make_groups(model)))


def test_layers_out_of_order_are_refused():
    cache = PagedCache(make_groups(llama()))
    states = torch.zeros(1, 2, 3, 16)
    cache.update(states, states, 0)
    with pytest.raises(UnsupportedError, match="layer_idx: expected 1"):
        cache.update(states, states, 2)


def test_model_that_looks_further_back_than_its_group_is_refused():
    model = gemma3()
    groups = make_groups(model)
    groups[1].window = WINDOW - 1
    with (
        torch.no_grad(),
        paged_attention(model),
        pytest.raises(ValueError, match=f"sliding_window: expected at most {WINDOW - 1}"),
    ):
        model(torch.ones(1, 3, dtype=torch.int64), past_key_values=PagedCache(groups))
