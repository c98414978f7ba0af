"""Benches of restoring time what they claim: an empty pool, and loading or not."""

import contextlib
import json
import threading

import pytest
import torch

from bench import bench_crowd, bench_overlap, bench_planner
from bench.gpu.engine_setup import Numbers


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture
def subject(model):
    with contextlib.closing(bench_planner.Subject(model, Numbers(), "load")) as subject:
        yield subject


PROMPT = list(range(3, 3 + 200))
TOKENS = torch.randint(3, 1000, (512,), generator=torch.Generator().manual_seed(0)).tolist()
CELLS = [bench_overlap.Cell(*cell, 50.0) for cell in ((256, 128), (128, 192), (128, 128))]


def test_each_request_leaves_an_empty_pool(subject):
    allocator = subject.cache.blocks.device.groups[0].allocator
    blocks = allocator.allocate(1)  # like blocks that the engine gives back only after the answer
    threading.Timer(0.5, allocator.release, [blocks]).start()
    subject.ttft_s(PROMPT)
    stats = subject.cache.stats()
    assert stats.pool_free_blocks == stats.pool_blocks
    _, report = subject.ttft_s(PROMPT)
    assert report.reuse.tokens_by_tier == {"memory": 192}


def test_refuses_a_prompt_out_of_the_pool(subject):
    subject.engine.submit(PROMPT, bench_planner.ONE_TOKEN).result()
    with pytest.raises(RuntimeError, match="pool: expected none of the prompt in it, got 192"):
        subject.ttft_s(PROMPT)


@pytest.fixture
def subjects(model):
    with bench_overlap.open_subjects(model, Numbers()) as subjects:
        for subject in subjects.values():
            subject.ttft_s([*TOKENS[:256], 1])
        yield subjects


def test_no_tier_holds_what_follows_the_prefix(subjects, capsys, monkeypatch):
    tails = []
    plain = bench_planner.Subject.ttft_s

    def noted(subject, prompt):
        seconds, report = plain(subject, prompt)
        tails.append(report.reuse.misses.get("new", 0))
        return seconds, report

    monkeypatch.setattr(bench_planner.Subject, "ttft_s", noted)
    for cell in CELLS:
        bench_overlap.measure(subjects, TOKENS, cell, 3)
        # All whole blocks but the last token's: that token is always computed.
        assert set(tails) == {cell.tail - 64}
        tails.clear()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == [cell.name for cell in CELLS]


def test_refuses_a_tail_that_the_tier_holds(subjects):
    prompt = bench_overlap.make_prompt(TOKENS, CELLS[0], 0)
    subjects["layers"].ttft_s(prompt)
    with pytest.raises(RuntimeError, match="expected 256 tokens in the tier, got 384"):
        bench_overlap.ttft_s(subjects["layers"], prompt, CELLS[0])


def test_a_crowd_has_prompts_of_its_own(model, capsys):
    prompts = [[number, *PROMPT] for number in (3, 4)]
    with bench_planner.open_subjects(model, Numbers()) as subjects:
        bench_crowd.measure(subjects, prompts, [bench_crowd.Cell(2, 50.0)], 1)
        assert len(bench_crowd.ttfts_s(subjects["load"], prompts)) == 2
        subjects["load"].engine.submit(prompts[1], bench_planner.ONE_TOKEN).result()
        with pytest.raises(RuntimeError, match="pool: expected none of the prompts in it, got 192"):
            bench_crowd.ttfts_s(subjects["load"], prompts)
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["case"] == "crowd_2_at_50"
    assert row["load_s"] > 0 and row["share_low"] <= row["share"] <= row["share_high"]
