"""The table, the figures and the picture of a run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prefixstore.quality.measure import OWN

NO_KL = 1e-8  # where a logarithmic axis puts none


def print_table(console: Console, summary: dict[str, Any]) -> None:
    """A row for each codec."""
    settings, plan = summary["model"], summary["plan"]
    table = Table(
        title=f"{settings['name']}, {settings['dtype']}: {plan['num_chunks']} x"
        f" {plan['prefix_tokens']} tokens restored, {plan['scored_tokens']} behind them scored",
        caption="KL against the model's own KV, in nats a token. Greedy: tokens before the first"
        " other one, the mean of the chunks. Found: needles. Own: the KV as it is. Ratio: of 16"
        " bits a number to what is stored.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for name in ("ratio", "perplexity", "change", "KL", "p99", "top-1", "greedy", "found"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary["codecs"].items():
        table.add_row(
            name,
            f"{row['ratio']:.2f}",
            f"{row['perplexity']:.3f}",
            "" if name == OWN else f"{100 * row['perplexity_change']:+.2f} %",
            f"{row['kl_mean']:.1e}",
            f"{row['kl_p99']:.1e}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{statistics.mean(row['greedy_divergence']):.0f}",
            f"{row['needles_found']}/{len(plan['depths'])}",
        )
    console.print(table)
    for name, row in summary["codecs"].items():
        if row["raw_blocks"]:
            console.print(f"{name}: {row['raw_blocks']} of {row['num_blocks']} blocks written raw")


def write_figures(summary: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(summary, indent=2) + "\n")


def plot_codecs(summary: dict[str, Any], path: Path) -> None:
    """Draw what a codec costs over what it saves, as a PNG at `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: row for name, row in summary["codecs"].items() if name != OWN}
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, row in rows.items():
        mean, p99 = (max(row[key], NO_KL) for key in ("kl_mean", "kl_p99"))
        axes.plot([row["ratio"]] * 2, [mean, p99], color="#7fb3d5", linewidth=2)
        axes.plot(row["ratio"], mean, "o", color="#1f618d")
        axes.plot(row["ratio"], p99, "_", color="#7fb3d5", markersize=14)
        if mean == NO_KL:
            label, offset, side = name, (0, 10), "center"
        else:
            label = f"{name}\nperplexity {100 * row['perplexity_change']:+.2f} %"
            offset, side = (8, -4), "left"
        axes.annotate(
            label, (row["ratio"], mean), xytext=offset, textcoords="offset points", ha=side
        )
    axes.set_yscale("log")
    axes.set_xlim(0.4, 1.3 * max(row["ratio"] for row in rows.values()))
    axes.set_xlabel("times smaller than with 16 bits a number")
    axes.set_ylabel(f"KL from the model's own KV, nats a token\n({NO_KL:g}: none)")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    model = summary["model"]
    axes.set_title(f"{model['name']}, {model['dtype']}: mean (dot) and 99th percentile (bar)")
    figure.savefig(path, dpi=130)
