"""The demo: its prompts, its phases on a tiny model, its figures, its table and its plot."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("transformers")

from demo_stand_ins import StandInCache, byte_tokenizer, tiny_model

from prefixstore.demo.machine import choose_dtype, describe_machine, describe_versions
from prefixstore.demo.measure import Measured
from prefixstore.demo.plot import plot_requests
from prefixstore.demo.prompts import AgentLoop, build_agent_loop, load_documents, load_questions
from prefixstore.demo.report import format_seconds, print_report
from prefixstore.demo.run import Outcome, Plan, check_context, disk_url, forget, run_phases
from prefixstore.demo.summary import compare_answers, percentile, summarise, write_summary
from prefixstore.errors import ConfigError, TierUnavailable

SETTINGS = {"model": {"name": "a model", "dtype": "float32"}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def small_loop(tokenizer: Any, num_requests: int = 5) -> AgentLoop:
    return build_agent_loop(tokenizer, num_requests=num_requests, prefix_tokens=600)


def made_up(phase: str, question: str, ttft_s: float, answer: tuple[int, ...] = (1, 2)) -> Measured:
    reused = {"off": {}, "empty": {}, "on": {"device": 640}, "restart": {"disk": 640}}[phase]
    return Measured(
        phase=phase,
        question=question,
        num_prompt_tokens=700,
        ttft_s=ttft_s,
        total_s=ttft_s + 1,
        tokens_by_tier=reused,
        num_recomputed=700 - sum(reused.values()),
        answer=answer,
    )


@pytest.fixture
def outcome() -> Outcome:
    on = [made_up("on", f"q{at}", ttft_s) for at, ttft_s in enumerate([8.5, 0.2, 0.1, 0.4])]
    return Outcome(
        measured=(
            made_up("off", "q0", 8.0),
            made_up("empty", "q0", 9.0),
            made_up("off", "q1", 10.0),
            made_up("empty", "q1", 9.0),
            *on,
            made_up("restart", "q0", 0.5, answer=(1, 3)),
        ),
        open_s=0.5,
        flush_s=0.25,
        is_flushed=True,
        tier_bytes={"device": 3 << 20, "memory": 2 << 20, "disk": 1 << 20},
        problems=(),
    )


@pytest.fixture
def summary(tokenizer: Any, outcome: Outcome) -> dict[str, Any]:
    return summarise(small_loop(tokenizer, 4), outcome, SETTINGS, lambda ids: f"text of {ids}")


# ---- prompts ---------------------------------------------------------------------------------


def test_ships_the_documents_and_questions() -> None:
    assert len(load_documents()) == 40
    questions = load_questions()
    assert len(questions) == 100
    assert len({question.text for question in questions}) == 100


@pytest.mark.parametrize("prefix_tokens", [400, 7000, 30000])
def test_prompts_share_about_as_many_tokens_as_asked_for(
    tokenizer: Any, prefix_tokens: int
) -> None:
    loop = build_agent_loop(tokenizer, num_requests=3, prefix_tokens=prefix_tokens)
    assert prefix_tokens - 100 <= loop.num_shared_tokens <= prefix_tokens
    prefixes = {tuple(one.token_ids[: loop.num_shared_tokens]) for one in loop.requests}
    assert len(prefixes) == 1
    assert len({tuple(one.token_ids) for one in loop.requests}) == 3
    text = tokenizer.decode(loop.requests[0].token_ids)
    assert loop.sources and all(f": {source}\n" in text for source in loop.sources)


def test_prompts_end_with_their_question(tokenizer: Any) -> None:
    loop = small_loop(tokenizer)
    for request in loop.requests:
        text = tokenizer.decode(request.token_ids[loop.num_shared_tokens :])
        assert text == f"{request.question}</><assistant>"


def test_prompts_depend_on_the_seed_and_nothing_else(tokenizer: Any) -> None:
    arguments = {"num_requests": 2, "prefix_tokens": 2000}
    first = build_agent_loop(tokenizer, **arguments, seed=1)
    assert build_agent_loop(tokenizer, **arguments, seed=1) == first
    assert build_agent_loop(tokenizer, **arguments, seed=2).sources != first.sources


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_requests": 0, "prefix_tokens": 600}, "requests: expected 1 to 100, got 0"),
        ({"num_requests": 101, "prefix_tokens": 600}, "requests: expected 1 to 100, got 101"),
        ({"num_requests": 1, "prefix_tokens": 64}, "prefix-tokens: expected at least .* got 64"),
        ({"num_requests": 1, "prefix_tokens": 10**6}, "prefix-tokens: expected at most .* got 1"),
    ],
)
def test_refuses_loops_it_cannot_build(
    tokenizer: Any, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_agent_loop(tokenizer, **arguments)


def test_refuses_prompts_longer_than_the_context(tokenizer: Any) -> None:
    loop = build_agent_loop(tokenizer, num_requests=1, prefix_tokens=1900)
    check_context(tiny_model(), loop, max_new_tokens=4)
    with pytest.raises(ConfigError, match=r"at most 2048 tokens .* got 2"):
        check_context(tiny_model(), loop, max_new_tokens=200)


# ---- phases, on a tiny model -----------------------------------------------------------------


def test_phases_fill_reuse_and_restore_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    loop, steps = small_loop(tokenizer), []
    tiers = (disk_url(tmp_path / "blocks"),)
    plan = Plan(max_new_tokens=3, num_cold=2, tiers=tiers, scratch=tmp_path)
    outcome = run_phases(tiny_model(), loop, plan, StandInCache, steps.append)
    assert [one.phase for one in outcome.measured] == (
        ["off", "empty"] * 2 + ["on"] * 5 + ["restart"] * 3
    )
    assert len(steps) == plan.num_steps(loop) == len(outcome.measured)
    first, *later = (one for one in outcome.measured if one.phase == "on")
    assert first.tokens_by_tier == {}
    assert all(one.tokens_by_tier["device"] >= 512 for one in later)
    assert all(one.tokens_by_tier["disk"] >= 512 for one in outcome.measured[-3:])
    for one in outcome.measured:
        assert sum(one.tokens_by_tier.values()) + one.num_recomputed == one.num_prompt_tokens
        assert 0 < one.ttft_s < one.total_s
        assert len(one.answer) == 3
    answers = compare_answers(outcome.measured)
    assert answers == {"num_compared": 6, "num_equal": 6, "differences": []}
    assert outcome.is_flushed and outcome.problems == ()
    # 6 blocks of 2 layers, K and V, 1 head, 64 tokens, 16 wide, float32
    assert outcome.tier_bytes["device"] == 6 * 2 * 2 * 64 * 16 * 4
    assert outcome.tier_bytes["memory"] == 5000
    assert outcome.tier_bytes["disk"] > 0 == outcome.tier_bytes["away"]
    assert list(tmp_path.iterdir()) == [tmp_path / "blocks"]


def test_a_second_run_starts_from_disk(tokenizer: Any, tmp_path: Path) -> None:
    loop, tiers = small_loop(tokenizer, 1), (disk_url(tmp_path / "blocks"),)
    plan = Plan(max_new_tokens=1, num_cold=1, tiers=tiers, scratch=tmp_path)
    firsts = []
    for _ in range(2):
        outcome = run_phases(tiny_model(), loop, plan, StandInCache, lambda _: None)
        firsts.append(next(one for one in outcome.measured if one.phase == "on"))
    assert firsts[0].tokens_by_tier == {}
    assert firsts[1].tokens_by_tier["disk"] >= 512
    forget(tiny_model(), tiers, StandInCache)
    outcome = run_phases(tiny_model(), loop, plan, StandInCache, lambda _: None)
    assert next(one for one in outcome.measured if one.phase == "on").tokens_by_tier == {}
    with pytest.raises(TierUnavailable, match=r"fresh: .* got none from \['away'\]"):
        forget(tiny_model(), (disk_url(tmp_path / "away"),), StandInCache)


# ---- figures, table, plot --------------------------------------------------------------------


def test_summary_holds_every_figure(summary: dict[str, Any]) -> None:
    rows = summary["rows"]
    assert {row: one["num_requests"] for row, one in rows.items()} == {
        "off": 2,
        "empty": 2,
        "first": 1,
        "warm": 3,
        "restart": 1,
    }
    assert rows["warm"]["ttft_s"] == {"median": 0.2, "p90": 0.4, "min": 0.1}
    assert rows["off"]["ttft_s"] == {"median": 9.0, "p90": 10.0, "min": 8.0}
    assert rows["warm"]["speedup"] == pytest.approx(45)
    assert rows["restart"]["tokens_by_tier"] == {"device": 0, "memory": 0, "disk": 640}
    assert rows["restart"]["num_recomputed"] == 60
    assert summary["empty_over_off"] == 1.0
    # off: 9 and 11 s, so 4 requests would take 40; on: 9.5 + 1.2 + 1.1 + 1.4
    assert summary["loop"]["off_s"] == pytest.approx(40)
    assert summary["loop"]["on_s"] == pytest.approx(13.2)
    assert summary["loop"]["num_off_measured"] == 2
    assert len(summary["requests"]) == 9
    assert summary["example"] == {"question": "q3", "answer": "text of [1, 2]"}


def test_summary_of_one_request_has_no_row_for_later_ones(tokenizer: Any) -> None:
    measured = tuple(made_up(phase, "q", 1.0) for phase in ("off", "empty", "on", "restart"))
    outcome = Outcome(measured, 0.1, 0.1, True, {}, ())
    summary = summarise(small_loop(tokenizer, 1), outcome, SETTINGS, str)
    assert list(summary["rows"]) == ["off", "empty", "first", "restart"]
    assert summary["example"]["question"] == "q"


def test_names_the_answers_that_differ(summary: dict[str, Any]) -> None:
    assert summary["answers"] == {
        "num_compared": 5,
        "num_equal": 4,
        "differences": [{"phase": "restart", "question": "q0", "num_equal_tokens": 1}],
    }


def test_writes_the_summary_as_json(summary: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(summary, path)
    assert json.loads(path.read_text()) == summary


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.9, 3.0), ([2.0, 1.0], 0.9, 2.0), ([float(n) for n in range(1, 21)], 0.9, 18.0)],
)
def test_a_percentile_is_one_of_the_values(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_report_shows_rows_and_what_differs(summary: dict[str, Any]) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    print_report(console, summary)
    text = console.export_text()
    assert "after a restart" in text
    assert "45.0 x" in text
    assert "640 disk" in text
    assert "…" not in text
    assert "13.2 s with the cache, 40 s without (reckoned from 2 measured)" in text
    assert re.search(r"held at the end +3 MiB +2 MiB +1 MiB", text)
    assert "equal to those without the cache: 4 of 5" in text
    assert "differs after 1 equal tokens (restart): q0" in text
    assert "text of [1, 2]" in text


def test_report_says_what_went_wrong(summary: dict[str, Any]) -> None:
    console = Console(record=True, width=140, file=io.StringIO())
    print_report(console, summary | {"is_flushed": False, "problems": ["disk: a lost record"]})
    text = console.export_text()
    assert "did not finish in time" in text
    assert "check: disk: a lost record" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (0.5, "500 ms"), (4.7612, "4.76 s"), (612.3, "612 s")],
)
def test_formats_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_plots_a_png(summary: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "demo.png"
    plot_requests(summary, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 20_000


def test_describes_the_machine() -> None:
    assert describe_machine()["num_cpus"] >= 1
    assert set(describe_versions()) == {"python", "kvkernels", "torch", "transformers", "numpy"}


def test_chooses_the_dtype_that_is_asked_for() -> None:
    assert str(choose_dtype("bfloat16")) == "torch.bfloat16"
    assert str(choose_dtype("auto")) in ("torch.float32", "torch.bfloat16")
