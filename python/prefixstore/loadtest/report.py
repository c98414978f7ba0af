"""The table and the lines that a load test ends with, made from the summary."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixstore.demo.report import format_seconds

NOT_TOLD = "-"
FIGURES = {
    "first_ttft_s": "request 1",
    "ttft_s": "first token",
    "inter_token_s": "between",
    "total_s": "whole",
    "output_tokens_per_s": "tokens/s",
}


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Print the tables, and what went wrong."""
    console.print(times_table(summary))
    console.print(tokens_table(summary))
    if summary["faster_when_warm"] or summary["faster_than"]:
        console.print(ratios_table(summary))
    for line in error_lines(summary):
        console.print(Text(line), soft_wrap=True)


def times_table(summary: dict[str, Any]) -> Table:
    """Times by server and phase."""
    table = _table(
        caption="First token: until the first text. Between: one piece of text and the next. Whole:"
        " until the end. Medians and percentiles of requests without error. Request 1: first token"
        " of the request that was sent first."
    )
    table.add_column("", no_wrap=True)
    for name in (
        "n",
        "errors",
        "request 1",
        "first token",
        "p90",
        "p99",
        "between",
        "p99",
        "whole",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(
            f"{row['target']}, {row['phase']}",
            str(row["num_requests"]),
            str(sum(row["errors"].values())),
            NOT_TOLD if row["first_ttft_s"] is None else format_seconds(row["first_ttft_s"]),
            *(_seconds(row["ttft_s"], share) for share in ("p50", "p90", "p99")),
            *(_seconds(row["inter_token_s"], share) for share in ("p50", "p99")),
            _seconds(row["total_s"], "p50"),
        )
    return table


def tokens_table(summary: dict[str, Any]) -> Table:
    """Throughput and reuse by server and phase."""
    table = _table(
        caption="Cached: prompt tokens that the server says it did not compute"
        f" (usage.prompt_tokens_details); {NOT_TOLD}: it does not say."
    )
    table.add_column("", no_wrap=True)
    for name in ("tokens/s", "requests/s", "prompt tokens", "cached", "answered tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["rows"]:
        table.add_row(
            f"{row['target']}, {row['phase']}",
            _number(row["output_tokens_per_s"], ".1f"),
            _number(row["requests_per_s"], ".2f"),
            _number(row["prompt_tokens"], ",d"),
            _cached(row),
            _number(row["output_tokens"], ",d"),
        )
    return table


def ratios_table(summary: dict[str, Any]) -> Table:
    """How many times faster: when warm than cold, and than the other servers."""
    table = _table(
        caption="Times faster, compared round by round: the median over the rounds; below it the"
        " least and most of them."
    )
    table.add_column("", no_wrap=True)
    for name in FIGURES.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary["faster_when_warm"]:
        table.add_row(f"{row['target']}, {row['phase']} than cold", *_ratio_cells(row))
    for row in summary["faster_than"]:
        table.add_row(f"{row['target']} than {row['than']}, {row['phase']}", *_ratio_cells(row))
    return table


def error_lines(summary: dict[str, Any]) -> list[str]:
    """Errors by server and phase, each kind with what the first of them said."""
    lines = []
    for row in summary["rows"]:
        for kind, count in row["errors"].items():
            said = next(
                one["error_text"]
                for one in summary["requests"]
                if (one["target"], one["phase"], one["error"])
                == (row["target"], row["phase"], kind)
            )
            lines.append(f"{row['target']}, {row['phase']}: {count} x {kind}: {said}")
        if row["num_without_text"]:
            lines.append(
                f"{row['target']}, {row['phase']}: {row['num_without_text']} answers without text;"
                " they have no time to a first token"
            )
    return lines


def _table(caption: str) -> Table:
    return Table(caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _seconds(spread: dict[str, float] | None, share: str) -> str:
    return NOT_TOLD if spread is None else format_seconds(spread[share])


def _number(value: float | None, form: str) -> str:
    return NOT_TOLD if value is None else format(value, form)


def _cached(row: dict[str, Any]) -> str:
    if row["cached_tokens"] is None or not row["prompt_tokens"]:
        return NOT_TOLD
    return f"{row['cached_tokens'] / row['prompt_tokens']:.1%}"


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for figure in FIGURES:
        ratio = row.get(figure)
        if ratio is None:
            cells.append(NOT_TOLD)
        elif ratio["num_rounds"] == 1:
            cells.append(f"{ratio['median']:.3g} x")
        else:
            cells.append(f"{ratio['median']:.3g} x\n{ratio['low']:.3g} to {ratio['high']:.3g}")
    return cells
