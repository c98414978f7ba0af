"""The picture of a run: time to first token of each request, and where its tokens came from."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

PHASE_STYLES = {  # label, colour, marker
    "off": ("cache off", "#b03a2e", "o"),
    "empty": ("cache on, empty", "#d68910", "s"),
    "on": ("cache on", "#1f618d", "o"),
    "restart": ("first after a restart", "#1e8449", "D"),
}
TIER_COLOURS = {"device": "#1f618d", "memory": "#7fb3d5", "disk": "#1e8449", "redis": "#7d3c98"}
OTHER_COLOURS = ("#a569bd", "#117a65", "#6e2c00")  # of tiers with another name
COMPUTED_COLOUR = "#e5b8b3"


def plot_requests(summary: dict[str, Any], path: Path) -> None:
    """Draw `summary` into a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    requests = _in_groups(summary["requests"])
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_ttft(upper, requests)
    _draw_tokens(lower, requests)
    shared = summary["prompt"]["num_shared_tokens"]
    model = summary["model"]
    figure.suptitle(
        f"{model['name']}, {model['dtype']}: an agent loop with {shared:,} shared prompt tokens",
        fontsize=12,
    )
    figure.savefig(path, dpi=130)


def _in_groups(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests of one phase side by side; off and empty ran in turns."""
    return [request for phase in PHASE_STYLES for request in requests if request["phase"] == phase]


def _draw_ttft(axes: Any, requests: list[dict[str, Any]]) -> None:
    for phase, (label, colour, marker) in PHASE_STYLES.items():
        at = [x for x, request in enumerate(requests, 1) if request["phase"] == phase]
        ttft = [request["ttft_s"] for request in requests if request["phase"] == phase]
        axes.plot(at, ttft, marker, color=colour, label=label, markersize=6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("time to first token, s")
    axes.grid(axis="y", which="major", alpha=0.4)
    axes.grid(axis="y", which="minor", alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(PHASE_STYLES), loc="lower left", bbox_to_anchor=(0, 1))


def _draw_tokens(axes: Any, requests: list[dict[str, Any]]) -> None:
    tiers = list(requests[0]["tokens_by_tier"])
    parts = {tier: [one["tokens_by_tier"][tier] for one in requests] for tier in tiers}
    others = itertools.cycle(OTHER_COLOURS)
    colours = {tier: TIER_COLOURS.get(tier) or next(others) for tier in tiers}
    parts["computed"] = [one["num_recomputed"] for one in requests]
    colours["computed"] = COMPUTED_COLOUR
    below = [0] * len(requests)
    for name, counts in parts.items():
        label = f"reused from {name}" if name in tiers else "computed by the model"
        axes.bar(
            range(1, len(requests) + 1), counts, bottom=below, color=colours[name], label=label
        )
        below = [a + b for a, b in zip(below, counts, strict=True)]
    axes.set_ylabel("prompt tokens")
    axes.set_xlabel("request, in groups as above")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
