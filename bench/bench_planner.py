"""Time to first token with planned restores, against loading all and computing all.

A real model serves prompts whose prefix lies behind a link of a chosen rate. `share` is the planned
time over the shorter of the two others, in the same round; below 1 the plan is faster than either.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu.engine_setup import empty_pool
from bench.harness import describe_machine, print_line
from bench.throttled_tier import ThrottledTier
from prefixstore.cache import PrefixCache
from prefixstore.demo.prompts import load_documents
from prefixstore.engine import Engine, EngineConfig, SamplingParams
from prefixstore.models import load_model, load_tokenizer, prepare_smollm2
from prefixstore.planner import POLICIES
from prefixstore.store import Store, StoreConfig
from prefixstore.tiers.memory import MemoryTierConfig

RATES_GB = (0.01, 0.05, 0.2, 1.0, 5.0, 50.0)
LENGTHS = (256, 512, 1024, 2048, 4096, 7040)  # of the prefix, in tokens
TAIL = 32  # tokens behind it, which no tier holds
ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)


@dataclass(frozen=True)
class Cell:
    length: int
    rate_gb: float

    @property
    def name(self) -> str:
        return f"planner_{self.length}_at_{self.rate_gb:g}"


class Subject:
    """One engine with one way to restore, on a tier of its own behind a link.

    `gives_layers` says whether the last load may bring layer after layer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: str,
        gives_layers: bool = True,
        pool_tokens: int = 8192,
    ) -> None:
        self.tier = ThrottledTier(MemoryTierConfig(1 << 30), gives_layers)
        store = Store([self.tier], StoreConfig(load_timeout_s=120.0))
        self.cache = PrefixCache.open(model, pool_tokens=pool_tokens, store=store)
        config = EngineConfig(restore_policy=policy)
        self.engine = Engine(model, tokenizer, self.cache, config)

    def ttft_s(self, tokens: Sequence[int]) -> tuple[float, Any]:
        """Time one request on an empty pool; RuntimeError if the pool held some of the prompt.

        Afterwards the tier holds all whole blocks of the prompt, and the pool none.
        """
        report = self.engine.submit(tokens, ONE_TOKEN).result().report
        if num_tokens := report.reuse.tokens_by_tier.get("device", 0):
            raise RuntimeError(f"pool: expected none of the prompt in it, got {num_tokens} tokens")
        empty_pool(self.engine)
        return report.times.ttft_s, report

    def close(self) -> None:
        self.engine.close()
        self.cache.close()


@contextmanager
def open_subjects(
    model: Any, tokenizer: Any, pool_tokens: int = 8192
) -> Iterator[dict[str, Subject]]:
    with ExitStack() as stack:
        subjects = {}
        for policy in POLICIES:
            subjects[policy] = Subject(model, tokenizer, policy, pool_tokens=pool_tokens)
            stack.callback(subjects[policy].close)
        yield subjects


def measure(
    subjects: dict[str, Subject], prompts: dict[int, list[int]], cells: Sequence[Cell], rounds: int
) -> list[dict[str, Any]]:
    rows = []
    for length, prompt in prompts.items():
        for subject in subjects.values():  # puts its records into the tier
            subject.tier.bytes_per_s = float("inf")
            subject.ttft_s([*prompt[:length], 1])
    for cell in cells:
        prompt = prompts[cell.length]
        for subject in subjects.values():
            subject.tier.bytes_per_s = cell.rate_gb * 1e9
        for _ in range(2):  # the planner learns how fast the link is now
            subjects["planned"].ttft_s(prompt)
        times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        plans = []
        for number in range(rounds):
            order = list(POLICIES) if number % 2 == 0 else list(reversed(POLICIES))
            for policy in order:
                seconds, report = subjects[policy].ttft_s(prompt)
                times[policy].append(seconds)
                if policy == "planned":
                    plans.append(report.plan)
        medians = {policy: statistics.median(own) for policy, own in times.items()}
        best = [min(a, b) for a, b in zip(times["load"], times["recompute"], strict=True)]
        shares = [own / other for own, other in zip(times["planned"], best, strict=True)]
        row = {
            "case": cell.name,
            "length": cell.length,
            "rate_gb": cell.rate_gb,
            **{f"{policy}_s": value for policy, value in medians.items()},
            "share": medians["planned"] / min(medians["load"], medians["recompute"]),
            "share_low": min(shares),
            "share_high": max(shares),
            "plan": max(set(plans), key=plans.count),
        }
        print_line(**row)
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the grid: how planned restores compare with the better of the two others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    lengths = sorted({row["length"] for row in rows})
    rates = sorted({row["rate_gb"] for row in rows})
    by_cell = {(row["length"], row["rate_gb"]): row for row in rows}
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    shares = [[by_cell[length, rate]["share"] for rate in rates] for length in lengths]
    norm = TwoSlopeNorm(1.0, 0.5, 1.5)
    image = axes.imshow(shares, cmap="RdBu_r", norm=norm, origin="lower", aspect="auto")
    for y, length in enumerate(lengths):
        for x, rate in enumerate(rates):
            row = by_cell[length, rate]
            share = row["share"]
            text = (
                f"{share:.2f}\n{row['plan']}\n{row['planned_s'] * 1e3:.0f} ms"
                f"\n({row['load_s'] * 1e3:.0f} / {row['recompute_s'] * 1e3:.0f})"
            )
            dark = share < 0.65 or share > 1.35
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    axes.set_yticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_xlabel("rate of the tier, GB/s")
    axes.set_ylabel("tokens of the prefix")
    axes.set_title(
        "Time to first token, planned, over the shorter of loading all and computing all\n"
        "(in brackets: loading all / computing all, ms; below 1 both ends together win)",
        fontsize=10,
    )
    figure.colorbar(image, label="planned / best of the two", shrink=0.9)
    figure.savefig(path, dpi=110)


def main(case_filter: str = "", num_rounds: int = 3, plot_dir: Path | None = None) -> None:
    cells = [Cell(length, rate) for rate in RATES_GB for length in LENGTHS]
    cells = [cell for cell in cells if case_filter in cell.name]
    model = load_model(prepare_smollm2(), torch.bfloat16)
    tokenizer = load_tokenizer(prepare_smollm2())
    tokens = tokenizer("\n\n".join(one.text for one in load_documents()[:8])).input_ids
    prompts = {length: tokens[: length + TAIL] for length in {cell.length for cell in cells}}
    with open_subjects(model, tokenizer) as subjects:
        rows = measure(subjects, prompts, cells, num_rounds)
    if plot_dir is not None:
        plot_dir.mkdir(parents=True, exist_ok=True)
        result = {"machine": describe_machine(), "rows": rows}
        (plot_dir / "planner.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(rows, plot_dir / "planner.png")
