"""The figures of a load test: percentiles, sums, ratios, the JSON, the tables and the picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

pytest.importorskip("httpx")

from prefixstore.loadtest.client import Answer
from prefixstore.loadtest.plot import plot_ttft
from prefixstore.loadtest.replay import Request
from prefixstore.loadtest.report import print_report
from prefixstore.loadtest.run import Replay
from prefixstore.loadtest.summary import describe_spread, summarise, write_summary

SETTINGS: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00",
    "arguments": {"workload": "agent", "requests": 3, "rate": None, "concurrency": 2},
}
# Every key of a row and of a request, which readers of the JSON rely on.
ROW_KEYS = {
    *("target", "phase", "num_requests", "num_answered", "errors", "num_without_text"),
    *("duration_s", "first_ttft_s", "ttft_s", "inter_token_s", "time_per_token_s", "total_s"),
    *("late_s", "requests_per_s", "output_tokens", "output_tokens_per_s", "prompt_tokens"),
    "cached_tokens",
}
REQUEST_KEYS = {
    *("target", "round", "phase", "conversation", "turn", "sent_s", "late_s", "ttft_s", "total_s"),
    *("inter_token_s", "num_pieces", "prompt_tokens", "cached_tokens", "output_tokens"),
    *("is_usage_reported", "finish_reason", "error", "error_text"),
}


def request(ttft_s: float = 1.0, sent_s: float = 0.0, **answer: Any) -> Request:
    """A request of five tokens in three pieces, 0.1 s and 0.3 s apart."""
    told = {
        "piece_s": [ttft_s, ttft_s + 0.1, ttft_s + 0.4],
        "end_s": ttft_s + 0.5,
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "output_tokens": 5,
        **answer,
    }
    return Request("a conversation", 0, sent_s, 0.0, Answer(sent_at=0.0, **told))


def failed(kind: str = "http 500") -> Request:
    return request(
        piece_s=[],
        end_s=9.0,
        error=kind,
        error_text="why",
        **dict.fromkeys(("prompt_tokens", "cached_tokens", "output_tokens")),
    )


def replayed(
    *requests: Request,
    target: str = "ours",
    phase: str = "cold",
    round_number: int = 0,
    duration_s: float = 10.0,
) -> Replay:
    return Replay(target, "a model", round_number, phase, duration_s, requests)


def summary_of(*replays: Replay, **options: Any) -> dict[str, Any]:
    return summarise(replays, SETTINGS, **options)


def test_percentiles_are_values_that_were_measured() -> None:
    assert describe_spread([float(n) for n in range(1, 101)]) == {
        "p50": 50.0,
        "p90": 90.0,
        "p95": 95.0,
        "p99": 99.0,
    }
    assert describe_spread([3.0, 1.0, 2.0]) == {"p50": 2.0, "p90": 3.0, "p95": 3.0, "p99": 3.0}
    assert describe_spread([7.0]) == dict.fromkeys(("p50", "p90", "p95", "p99"), 7.0)
    assert describe_spread([]) is None


def test_a_row_has_the_figures_of_its_requests() -> None:
    requests = [request(2.0, sent_s=1.0), request(3.0, sent_s=0.0), request(1.0, sent_s=2.0)]
    (row,) = summary_of(replayed(*requests))["rows"]
    assert (row["num_requests"], row["num_answered"], row["errors"]) == (3, 3, {})
    assert row["first_ttft_s"] == 3.0  # of the request sent first, not answered first
    assert (row["ttft_s"]["p50"], row["ttft_s"]["p90"]) == (2.0, 3.0)
    assert row["inter_token_s"]["p50"] == pytest.approx(0.1)
    assert row["inter_token_s"]["p99"] == pytest.approx(0.3)
    assert row["time_per_token_s"]["p50"] == pytest.approx(0.4 / 4)
    assert row["total_s"]["p50"] == 2.5
    assert (row["prompt_tokens"], row["cached_tokens"], row["output_tokens"]) == (300, 180, 15)
    assert (row["output_tokens_per_s"], row["requests_per_s"]) == (1.5, 0.3)


def test_failed_requests_are_counted_by_kind_and_not_timed() -> None:
    replay = replayed(request(), failed(), failed(), failed("timeout"))
    (row,) = summary_of(replay)["rows"]
    assert (row["num_requests"], row["num_answered"]) == (4, 1)
    assert row["errors"] == {"http 500": 2, "timeout": 1}
    assert row["total_s"]["p99"] == 1.5
    assert row["requests_per_s"] == 0.1


def test_figures_of_nothing_but_failures_are_absent() -> None:
    (row,) = summary_of(replayed(failed()))["rows"]
    for name in ("first_ttft_s", "ttft_s", "inter_token_s", "total_s", "output_tokens_per_s"):
        assert row[name] is None
    assert row["requests_per_s"] == 0


def test_requests_of_all_rounds_count_together() -> None:
    replays = [replayed(request(ttft), round_number=n) for n, ttft in enumerate((1.0, 5.0, 2.0))]
    (row,) = summary_of(*replays)["rows"]
    assert (row["num_requests"], row["duration_s"]) == (3, 30.0)
    assert row["first_ttft_s"] == row["ttft_s"]["p50"] == 2.0


def test_tokens_that_a_server_does_not_tell_are_not_made_up() -> None:
    untold = request(**dict.fromkeys(("cached_tokens", "output_tokens")))
    summary = summary_of(replayed(request(), untold))
    (row,) = summary["rows"]
    assert row["cached_tokens"] is None
    assert row["output_tokens"] is row["output_tokens_per_s"] is None
    assert [one["is_usage_reported"] for one in summary["requests"]] == [True, False]


def test_a_tokenizer_counts_what_a_server_does_not_tell() -> None:
    untold = request(text="three more tokens", output_tokens=None)
    summary = summary_of(replayed(request(), untold), count_tokens=lambda text: len(text.split()))
    assert summary["rows"][0]["output_tokens"] == 5 + 3
    assert [one["output_tokens"] for one in summary["requests"]] == [5, 3]


def test_compares_servers_round_by_round() -> None:
    times = {"ours": (1.0, 2.0, 1.0), "theirs": (2.0, 12.0, 3.0)}
    replays = [
        replayed(request(ttft), target=target, round_number=n, duration_s=10 * ttft)
        for target, all_of_them in times.items()
        for n, ttft in enumerate(all_of_them)
    ]
    (ratios,) = summary_of(*replays)["faster_than"]
    assert (ratios["target"], ratios["than"], ratios["phase"]) == ("ours", "theirs", "cold")
    expected = {"median": 3.0, "low": 2.0, "high": 6.0, "num_rounds": 3}
    assert ratios["ttft_s"] == ratios["first_ttft_s"] == pytest.approx(expected)
    assert ratios["output_tokens_per_s"] == pytest.approx(expected)  # higher is faster
    assert ratios["inter_token_s"]["median"] == pytest.approx(1.0)


def test_compares_warm_with_cold() -> None:
    replays = [replayed(request(8.0)), replayed(request(2.0), phase="warm")]
    (ratios,) = summary_of(*replays)["faster_when_warm"]
    assert (ratios["target"], ratios["phase"]) == ("ours", "warm")
    assert ratios["ttft_s"] == {"median": 4.0, "low": 4.0, "high": 4.0, "num_rounds": 1}


def test_a_round_without_answers_is_not_compared() -> None:
    replays = [replayed(request(1.0)), replayed(failed(), target="theirs")]
    assert summary_of(*replays)["faster_than"] == []


def full_summary() -> dict[str, Any]:
    return summary_of(
        replayed(request(8.0), request(1.0), failed()),
        replayed(request(0.5), phase="warm"),
        replayed(request(9.0), request(piece_s=[]), target="theirs"),
    )


def test_writes_json_with_a_schema(tmp_path: Path) -> None:
    summary = full_summary()
    write_summary(summary, tmp_path / "serve.json")
    read = json.loads((tmp_path / "serve.json").read_text())
    assert read == summary
    assert set(read) == {
        *("version", "date", "arguments", "targets", "rows"),
        *("faster_than", "faster_when_warm", "requests"),
    }
    assert read["targets"] == [
        {"name": "ours", "model": "a model"},
        {"name": "theirs", "model": "a model"},
    ]
    assert len(read["rows"]) == 3
    assert all(set(row) == ROW_KEYS for row in read["rows"])
    assert len(read["requests"]) == 6
    assert all(set(one) == REQUEST_KEYS for one in read["requests"])


def test_the_report_says_what_was_measured() -> None:
    stream = io.StringIO()
    print_report(Console(file=stream, width=120), full_summary())
    text = stream.getvalue()
    for line in (
        ("ours, cold", "3", "1", "8 s", "1 s", "8 s", "8 s", "100 ms", "300 ms", "1.5 s"),
        ("ours, warm", "1", "0", "500 ms"),
        ("ours, cold", "1.0", "0.20", "200", "60.0%", "10"),
        ("ours, warm than cold", "16 x"),
        ("ours than theirs, cold", "1.12 x"),
    ):
        assert any(all(part in row for part in line) for row in text.splitlines()), (line, text)
    assert "ours, cold: 1 x http 500: why" in text
    assert "theirs, cold: 1 answers without text" in text


def test_draws_what_was_measured(tmp_path: Path) -> None:
    plot_ttft(full_summary(), tmp_path / "serve.png")
    plot_ttft(summary_of(replayed(failed())), tmp_path / "empty.png")
    drawn, empty = ((tmp_path / f"{name}.png").read_bytes() for name in ("serve", "empty"))
    assert drawn.startswith(b"\x89PNG") and empty.startswith(b"\x89PNG")
    assert len(drawn) > len(empty)
