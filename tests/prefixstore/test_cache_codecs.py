"""What a cache's codec changes: the bytes in the tiers, and if lossy the output."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_models import BLOCK_SIZE, generate, random_tokens, run, tiny_gemma3, tiny_llama

from prefixstore.cache import PrefixCache
from prefixstore.errors import ConfigError
from prefixstore.record import read_header
from prefixstore.records.places import open_store, read_record

OPTIONS = {"block_size": BLOCK_SIZE, "pool_tokens": 1024, "memory_bytes": 0}
LENGTH = 6 * BLOCK_SIZE + 5


@pytest.fixture(params=[tiny_llama, tiny_gemma3])
def bfloat16_model(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return request.param().to(torch.bfloat16)


def fill(model, path: Path, **options):
    """Answer a prompt with a cache that writes to disk; returns the answer."""
    with PrefixCache.open(model, **OPTIONS, disk_path=path, **options) as cache:
        out, _ = run(cache, model, random_tokens(LENGTH))
        assert cache.flush()
        assert cache.check() == []
    return out


def reopen(model, path: Path, **options):
    with PrefixCache.open(model, **OPTIONS, disk_path=path, **options) as cache:
        out, report = run(cache, model, random_tokens(LENGTH))
        assert cache.check() == []
    return out, report.tokens_by_tier


def layouts_in(path: Path):
    """Layouts of all records in a store, by group, then by block."""
    found = []
    with open_store(path) as tier:
        for name, num_bytes in tier.list_records():
            record = read_record(tier, name, num_bytes)
            assert record is not None
            found.append(read_header(record).key)
    order = {bytes(16): -1}
    while len(order) <= len(found):
        order |= {k.block_hash: order[k.parent_hash] + 1 for k in found if k.parent_hash in order}
    found.sort(key=lambda key: (key.layout.layer_group, order[key.block_hash]))
    return [key.layout for key in found]


@pytest.mark.parametrize("codec", ["raw", "l12"])
def test_without_loss_restored_output_is_the_same(bfloat16_model, codec, tmp_path):
    model = bfloat16_model
    cold = fill(model, tmp_path, codec=codec)
    assert {layout.codecs for layout in layouts_in(tmp_path)} == {(codec,)}
    for reader in ("raw", "l12"):  # each uses what the other wrote
        out, by_tier = reopen(model, tmp_path, codec=reader)
        assert out == cold
        assert by_tier == {"disk": 6 * BLOCK_SIZE}


@pytest.mark.parametrize("codec", ["q8", "k8v4", "q4", "k4v2", "q2"])
def test_with_loss_blocks_come_back_small(bfloat16_model, codec, tmp_path):
    model = bfloat16_model
    fill(model, tmp_path, codec=codec)
    out, by_tier = reopen(model, tmp_path, codec=codec)
    assert by_tier == {"disk": 6 * BLOCK_SIZE}
    assert len(out) == 12
    for layout in layouts_in(tmp_path):
        assert layout.codecs == (codec,)
        assert layout.payload_bytes < layout.block_bytes
    again, by_tier = reopen(model, tmp_path, codec=codec)
    assert again == out and by_tier == {"disk": 6 * BLOCK_SIZE}


def test_exact_caches_never_see_what_was_written_with_a_loss(bfloat16_model, tmp_path):
    model = bfloat16_model
    fill(model, tmp_path, codec="q2")
    assert reopen(model, tmp_path, codec="q4")[1] == {}
    cold, by_tier = reopen(model, tmp_path, codec="l12")
    assert by_tier == {}
    out, by_tier = reopen(model, tmp_path, codec="raw")
    assert out == cold and by_tier == {"disk": 6 * BLOCK_SIZE}
    # Exact first blocks do not help: blocks computed after lossy ones are not exact.
    assert reopen(model, tmp_path, codec="q2", exact_blocks=2)[1] == {}


def test_a_codec_for_each_layer_and_exact_first_blocks(bfloat16_model, tmp_path):
    model = bfloat16_model
    num_layers = model.config.num_hidden_layers
    codec = ["l12", *["q4"] * (num_layers - 2), "q8"]
    fill(model, tmp_path, codec=codec, exact_blocks=2)
    _, by_tier = reopen(model, tmp_path, codec=codec, exact_blocks=2)
    assert by_tier == {"disk": 6 * BLOCK_SIZE}
    layouts = layouts_in(tmp_path)
    groups = {layout.layer_group: [] for layout in layouts}
    for layout in layouts:
        groups[layout.layer_group].append(layout)
    written = []
    for of_group in groups.values():
        assert [layout.codecs for layout in of_group[:2]] == [("l12",)] * 2
        assert len({layout.codecs for layout in of_group[2:]}) == 1
        written += of_group[2].block_format.codecs
    assert sorted(written) == sorted(codec)


def test_what_a_codec_does_not_hold_is_kept_raw(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight *= 1e7  # exceeds float16
    fill(model, tmp_path, codec="q8")
    out, by_tier = reopen(model, tmp_path, codec="q8")
    assert out == generate(model, random_tokens(LENGTH))
    assert by_tier == {"disk": 6 * BLOCK_SIZE}
    assert {layout.codecs for layout in layouts_in(tmp_path)} == {("raw",)}


def test_float16_stays_float16(tmp_path):
    torch.manual_seed(0)
    model = tiny_llama().to(torch.float16)
    plain = generate(model, random_tokens(LENGTH))
    fill(model, tmp_path, codec="raw")
    out, by_tier = reopen(model, tmp_path, codec="raw")
    assert out == plain and by_tier == {"disk": 6 * BLOCK_SIZE}
    assert {layout.dtype for layout in layouts_in(tmp_path)} == {"float16"}
    _, by_tier = reopen(model.to(torch.bfloat16), tmp_path, codec="raw")
    assert by_tier == {}


def test_memory_and_disk_hold_the_same_records(bfloat16_model, tmp_path):
    options = OPTIONS | {"memory_bytes": 1 << 24, "pool_tokens": 12 * BLOCK_SIZE}
    model = bfloat16_model
    prompts = [random_tokens(LENGTH, seed=seed) for seed in range(4)]
    with PrefixCache.open(model, **options, disk_path=tmp_path, codec="q4") as cache:
        for tokens in prompts:
            run(cache, model, tokens)
        assert cache.flush()
        answers = [run(cache, model, tokens) for tokens in prompts]
        assert all("memory" in report.tokens_by_tier for _, report in answers[:2])
        stats = {use.name: use for use in cache.stats().store.tiers}
        assert stats["memory"].written_bytes == stats["disk"].written_bytes
        assert all(use.num_corrupted == 0 for use in stats.values())
        assert cache.check() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "q9"}, "codec: expected one of ('raw', 'l12', 'q8', 'k8v4', 'q4', 'k4v2', 'q2'"),
        ({"codec": ["q8", "q8"]}, "codec: expected one name or 3, one a layer, got 2"),
        ({"codec": ["q8", 4, "q8"]}, "codec: expected one of ('raw'"),
        ({"codec": "l12"}, "codec: codecs: expected blocks of bfloat16 for l12, got torch.float32"),
        ({"exact_blocks": -1}, "exact_blocks: expected 0 or more, got -1"),
    ],
)
def test_refuses_codecs_that_do_not_fit(options, message):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=re.escape(message)):
        PrefixCache.open(model, **OPTIONS, **options)


def test_nothing_is_mixed_up_while_blocks_are_reused(tmp_path):
    """The writer reads blocks in the pool while sessions reuse them, as the pool is small."""
    torch.manual_seed(0)
    model = tiny_llama()
    options = OPTIONS | {"pool_tokens": 10 * BLOCK_SIZE}
    rng = np.random.default_rng(1)
    prompts = [random_tokens(int(rng.integers(30, 120)), seed=seed) for seed in range(12)]
    plain = [generate(model, tokens) for tokens in prompts]
    with PrefixCache.open(model, **options, disk_path=tmp_path) as cache:
        for _ in range(2):
            for tokens, expected in zip(prompts, plain, strict=True):
                assert run(cache, model, tokens)[0] == expected
        assert cache.flush() and cache.check() == []


def test_a_salt_is_forgotten_for_the_settings_of_the_cache(tmp_path: Path) -> None:
    """Lossless codecs share an identity; a lossy one has its own, whose records stay."""
    torch.manual_seed(0)
    model, tokens = tiny_llama().to(torch.bfloat16), random_tokens(LENGTH)

    def open_with(codec: str) -> PrefixCache:
        return PrefixCache.open(model, **OPTIONS, disk_path=tmp_path, salt="tenant", codec=codec)

    for codec in ("raw", "q8"):
        with open_with(codec) as cache:
            run(cache, model, tokens)
    with open_with("l12") as cache:
        assert cache.forget("tenant") == []
    with open_with("raw") as cache, cache.session(tokens) as session:
        assert session.report.num_reused == 0
    with open_with("q8") as cache:
        with cache.session(tokens) as session:
            assert session.report.num_reused == 6 * BLOCK_SIZE
        assert cache.forget() == []
    with open_with("q8") as cache, cache.session(tokens) as session:
        assert session.report.num_reused == 0


@pytest.mark.parametrize("salt", [5, b"tenant", "\ud800"])
def test_only_text_is_forgotten(tmp_path: Path, salt) -> None:
    with (
        PrefixCache.open(tiny_llama(), **OPTIONS, disk_path=tmp_path) as cache,
        pytest.raises(ValueError, match="salt: expected"),
    ):
        cache.forget(salt)
