"""The picture of a load test: how times to the first token are distributed, and when they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixstore.loadtest.plan import PHASES

TARGET_COLOURS = ("#1f618d", "#b03a2e", "#1e8449", "#d68910", "#7d3c98", "#566573")
PHASE_STYLES = {"cold": ("--", "o"), "warm": ("-", "s"), "restart": (":", "D")}  # line, marker


def plot_ttft(summary: dict[str, Any], path: Path) -> None:
    """Draw `summary` into a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [target["name"] for target in summary["targets"]]
    for number, name in enumerate(names):
        colour = TARGET_COLOURS[number % len(TARGET_COLOURS)]
        for phase in PHASES:
            _draw(left, right, summary["requests"], name, phase, colour)
    left.set_ylabel("time to first token, s")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_xlabel("share of the requests that came no later")
    right.set_xlabel("sent, s from the beginning of the replay")
    for axes in (left, right):
        axes.grid(axis="y", which="major", alpha=0.4)
        axes.grid(axis="y", which="minor", alpha=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    if left.lines:
        left.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    arguments = summary["arguments"]
    figure.suptitle(
        f"{arguments['workload']}, {arguments['requests']} requests, {_describe_load(arguments)}",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _draw(
    left: Any, right: Any, requests: list[dict[str, Any]], name: str, phase: str, colour: str
) -> None:
    """One server in one phase: the distribution on the left, each request on the right."""
    chosen = [
        (one["sent_s"], one["ttft_s"])
        for one in requests
        if (one["target"], one["phase"]) == (name, phase) and one["ttft_s"] is not None
    ]
    if not chosen:
        return
    line, marker = PHASE_STYLES[phase]
    ordered = sorted(ttft for _, ttft in chosen)
    shares = [(at + 1) / len(ordered) for at in range(len(ordered))]
    left.step([0, *shares], [ordered[0], *ordered], line, color=colour, label=f"{name}, {phase}")
    # Cold requests are hollow, so that one server's phases tell apart.
    face = "none" if phase == "cold" else colour
    right.plot(*zip(*chosen, strict=True), marker, color=colour, markerfacecolor=face, markersize=4)


def _describe_load(arguments: dict[str, Any]) -> str:
    if arguments["rate"] is not None:
        return f"{arguments['rate']:g} a second"
    return f"{arguments['concurrency']} at once"
