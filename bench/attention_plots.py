"""Plots of the attention bench: the roofline, and how decode time grows. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]

STYLES = {  # label, colour, marker
    "kvkernels": ("kvkernels, blocks", "#1f618d", "o"),
    "sdpa_grouped": ("PyTorch sdpa, grouped queries", "#d68910", "s"),
    "sdpa_contiguous": ("PyTorch sdpa, contiguous", "#b03a2e", "D"),
}
ROOF_COLOUR = "#555555"

# Dtypes that share a roof: the CPU multiplies float16 in float32.
PANELS = {
    "bfloat16": ("bfloat16",),
    "float32 and float16": ("float32", "float16"),
}
# Of a label, as factors on the axes: where it begins right of its point, how wide a letter is, and
# how far the next label above must be.
LABEL_GAP, LETTER_WIDTH, LABEL_HEIGHT = 1.25, 1.09, 1.12


def _make_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _describe(machine: Row) -> str:
    return f"{machine['machine']}, {machine['threads']} threads, PyTorch {machine['torch']}"


def _tidy(axes: Any) -> None:
    axes.grid(which="major", alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)


# ---- the roofline -------------------------------------------------------------------------------


def plot_roofline(rows: Sequence[Row], machine: Row, path: Path) -> None:
    """Draw kvkernels and PyTorch's fastest sdpa in each case, under the machine's rates."""
    groups = {}
    for title, dtypes in PANELS.items():
        chosen = [row for row in rows if row["provider"] in STYLES and row["dtype"] in dtypes]
        if chosen:
            groups[title] = _best_sdpa(chosen)
    figure = _make_figure(6 + 4.5 * len(groups), 7)
    ratios = [3, 2][: len(groups)]
    panels = figure.subplots(1, len(groups), squeeze=False, width_ratios=ratios)[0]
    for axes, (title, chosen) in zip(panels, groups.items(), strict=True):
        _draw_roof(axes, chosen)
        _draw_points(axes, chosen)
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("arithmetic intensity, FLOP per byte of keys, values, queries and output")
        axes.set_ylabel("attention, GFLOP/s")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(frameon=False, loc="lower right")
        _tidy(axes)
    figure.suptitle(f"Attention under the roofline: {_describe(machine)}")
    figure.savefig(path, dpi=130)


def _best_sdpa(rows: Sequence[Row]) -> list[Row]:
    """kvkernels' rows, and for each case the faster of the sdpa rows."""
    best: dict[tuple[str, bool], Row] = {}
    for row in rows:
        key = (row["case"], row["provider"] == "kvkernels")
        if key not in best or row["median_ms"] < best[key]["median_ms"]:
            best[key] = row
    return list(best.values())


def _middle(rows: Sequence[Row], name: str) -> float:
    return sorted(row[name] for row in rows)[len(rows) // 2]


def _draw_roof(axes: Any, rows: Sequence[Row]) -> None:
    intensities = [row["flops_per_byte"] for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 5
    peak = 1e3 * _middle(rows, "matmul_tflops")
    read = _middle(rows, "read_gbytes_per_s")
    ridge = peak / read
    axes.plot(
        [left, ridge, max(right, ridge)],
        [left * read, peak, peak],
        color=ROOF_COLOUR,
        label=f"roof: {read:.3g} GB/s read, {peak:.3g} GFLOP/s torch.matmul",
    )


def _draw_points(axes: Any, rows: Sequence[Row]) -> None:
    for provider, (label, colour, marker) in STYLES.items():
        own = [row for row in rows if row["provider"] == provider]
        if own:
            x, y = _points(own)
            axes.plot(x, y, marker, color=colour, label=label, markersize=5)
    heights = _free_heights(rows)
    ours = [row for row in rows if row["provider"] == "kvkernels"]
    for row, (x, y) in zip(ours, zip(*_points(ours), strict=True), strict=True):
        axes.annotate(
            row["case"].replace("_", " "),
            (x, y),
            xytext=(x * LABEL_GAP, heights[row["case"]]),
            fontsize=7,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )


def _points(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["flops_per_byte"] for row in rows], [1e3 * row["tflops"] for row in rows]


def _free_heights(rows: Sequence[Row]) -> dict[str, float]:
    """The height of each kvkernels label: the nearest to its point that covers nothing."""
    taken = [(x, x, y) for x, y in zip(*_points(rows), strict=True)]  # from, to, at height
    heights = {}
    for row in rows:
        if row["provider"] != "kvkernels":
            continue
        ((x,), (y,)) = _points([row])
        left, right = x * LABEL_GAP, x * LABEL_GAP * LETTER_WIDTH ** len(row["case"])
        nearest_first = sorted(range(-100, 100), key=abs)
        beside = [other for begin, end, other in taken if begin <= right and left <= end]
        free = (
            y * 1.02**step
            for step in nearest_first
            if not any(_are_close(y * 1.02**step, other) for other in beside)
        )
        heights[row["case"]] = height = next(free, y)
        taken.append((left, right, height))
    return heights


def _are_close(height: float, other: float) -> bool:
    return max(height, other) < LABEL_HEIGHT * min(height, other)


# ---- how decode grows ---------------------------------------------------------------------------


def plot_scaling(series: Mapping[str, Sequence[Row]], machine: Row, path: Path) -> None:
    """Draw decode time over the tokens per sequence and over the number of sequences."""
    figure = _make_figure(14, 5)
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(panels, series.items(), strict=True):
        quantity = "seq_len" if len({row["seq_len"] for row in rows}) > 1 else "num_seqs"
        _draw_series(axes, rows, quantity)
        axes.set(title=title, xscale="log", yscale="log")
        axes.set_xlabel("tokens in a sequence" if quantity == "seq_len" else "sequences")
        ticks = sorted({row[quantity] for row in rows})
        axes.set_xticks(ticks, [f"{n >> 10}k" if n >= 1024 else str(n) for n in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        _tidy(axes)
    panels[0].set_ylabel("time of one call, ms")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    dtype = next(iter(series.values()))[0]["dtype"]
    figure.suptitle(
        f"Decode in {dtype}, 32 query heads, 8 KV heads, head_dim 128: median, 10th to 90th"
        f" percentile\n{_describe(machine)}"
    )
    figure.savefig(path, dpi=130)


def _draw_series(axes: Any, rows: Sequence[Row], quantity: str) -> None:
    for provider, (label, colour, marker) in STYLES.items():
        own = [row for row in rows if row["provider"] == provider]
        medians = [row["median_ms"] for row in own]
        spread = [
            [row["median_ms"] - row["p10_ms"] for row in own],
            [row["p90_ms"] - row["median_ms"] for row in own],
        ]
        x = [row[quantity] for row in own]
        axes.errorbar(
            x, medians, spread, color=colour, marker=marker, markersize=5, capsize=2, label=label
        )
    ours = [row for row in rows if row["provider"] == "kvkernels"]
    axes.plot(
        [row[quantity] for row in ours],
        [row["read_floor_ms"] for row in ours],
        "--",
        color=ROOF_COLOUR,
        label="floor: bytes / read rate",
    )
