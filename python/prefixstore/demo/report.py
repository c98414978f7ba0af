"""The table and the lines that the demo ends with, made from the summary."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixstore.demo.summary import ROWS

MIB = 1 << 20


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Print the table, one real answer, and what was compared."""
    console.print(ttft_table(summary))
    console.print(bytes_table(summary))
    for line in report_lines(summary):
        console.print(Text(line), soft_wrap=True)


def ttft_table(summary: dict[str, Any]) -> Table:
    """Time to first token and tokens reused, a row for each way of running."""
    prompt = summary["prompt"]
    table = Table(
        title=f"{prompt['num_shared_tokens']:,} shared prompt tokens, {summary['model']['name']}",
        caption="Median and 90th percentile: time to first token, from token ids. Total: median,"
        " to the last token. n: requests; tokens are per request. Off: transformers' own cache"
        " and sdpa.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # so that it fits 80 columns
    )
    table.add_column("", no_wrap=True)
    for name in ("n", "median", "p90", "faster", "total", "reused", "computed"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, name in ROWS.items():
        row = summary["rows"].get(key)
        if row is None:
            continue
        ttft = row["ttft_s"]
        reused = [f"{count:,} {tier}" for tier, count in row["tokens_by_tier"].items() if count]
        table.add_row(
            name,
            str(row["num_requests"]),
            *(format_seconds(ttft[figure]) for figure in ("median", "p90")),
            f"{row['speedup']:.1f} x",
            format_seconds(row["total_s"]["median"]),
            "\n".join(reused) or "none",
            f"{row['num_recomputed']:,}",
        )
    return table


def bytes_table(summary: dict[str, Any]) -> Table:
    """What each tier holds when the loop is over."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for tier in summary["tier_bytes"]:
        table.add_column(tier, justify="right")
    held = (f"{num_bytes / MIB:,.0f} MiB" for num_bytes in summary["tier_bytes"].values())
    table.add_row("held at the end", *held)
    return table


def report_lines(summary: dict[str, Any]) -> list[str]:
    """What the table does not say, a sentence a line."""
    loop, answers, example = summary["loop"], summary["answers"], summary["example"]
    how = (
        "measured"
        if loop["num_off_measured"] == loop["num_requests"]
        else f"reckoned from {loop['num_off_measured']} measured"
    )
    lines = [
        f"Whole loop of {loop['num_requests']} requests: {format_seconds(loop['on_s'])} with the"
        f" cache, {format_seconds(loop['off_s'])} without ({how}): {loop['speedup']:.1f} x.",
        f"An empty cache costs {summary['empty_over_off']:.2f} x the time of no cache.",
        f"Greedy answers equal to those without the cache: {answers['num_equal']} of"
        f" {answers['num_compared']}.",
    ]
    lines += [
        f"  differs after {one['num_equal_tokens']} equal tokens ({one['phase']}):"
        f" {one['question']}"
        for one in answers["differences"]
    ]
    if answers["differences"]:
        lines.append(
            "  Rounding differs between the two ways; where two tokens are almost equally likely"
            f" the other one may win. Model dtype: {summary['model']['dtype']}."
        )
    if not summary["is_flushed"]:
        lines.append("The background writer did not finish in time: the disk holds less.")
    lines += [f"check: {problem}" for problem in summary["problems"]]
    lines += [f"Question: {example['question']}", f"Answer:   {example['answer'].strip()} ..."]
    return lines


def format_seconds(seconds: float) -> str:
    """Seconds with three significant digits, in ms below one second."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
