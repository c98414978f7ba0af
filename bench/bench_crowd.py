"""Time to first token of prompts that arrive together, with planned restores and without.

A real model serves prompts, each with a prefix of its own, all of them behind one link of a chosen
rate. `share` is the planned mean time over the shorter of the two others, in the same round.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.bench_planner import ONE_TOKEN, Subject, open_subjects
from bench.gpu.engine_setup import empty_pool
from bench.harness import print_line
from prefixstore.demo.prompts import load_documents
from prefixstore.models import load_model, load_tokenizer, prepare_smollm2
from prefixstore.planner import POLICIES

RATES_GB = (0.05, 0.2, 1.0, 4.0)
SIZES = (2, 4, 8)
LENGTH = 1024  # of each prefix, in tokens
TAIL = 32  # tokens behind it, which no tier holds
POOL_TOKENS = 16384


@dataclass(frozen=True)
class Cell:
    size: int
    rate_gb: float

    @property
    def name(self) -> str:
        return f"crowd_{self.size}_at_{self.rate_gb:g}"


def ttfts_s(subject: Subject, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Time prompts that arrive together on an empty pool, and leave it empty.

    Raises:
        RuntimeError: If the pool held some of them.
    """
    handles = [subject.engine.submit(prompt, ONE_TOKEN) for prompt in prompts]
    reports = [handle.result().report for handle in handles]
    if num_tokens := sum(one.reuse.tokens_by_tier.get("device", 0) for one in reports):
        raise RuntimeError(f"pool: expected none of the prompts in it, got {num_tokens} tokens")
    empty_pool(subject.engine)
    return [one.times.ttft_s for one in reports]


def measure(
    subjects: dict[str, Subject],
    prompts: Sequence[Sequence[int]],
    cells: Sequence[Cell],
    num_rounds: int,
) -> list[dict[str, Any]]:
    """Print and return a row for each cell; it takes the first of the prompts."""
    for subject in subjects.values():
        for prompt in prompts:  # puts their records into the tier
            subject.ttft_s(prompt)
    rows = []
    for cell in cells:
        crowd = prompts[: cell.size]
        for subject in subjects.values():
            subject.tier.bytes_per_s = cell.rate_gb * 1e9
        for _ in range(2):  # the planner learns how fast the link is now
            ttfts_s(subjects["planned"], crowd)
        means: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for number in range(num_rounds):
            for policy in POLICIES if number % 2 == 0 else reversed(POLICIES):
                means[policy].append(statistics.mean(ttfts_s(subjects[policy], crowd)))
        best = [min(a, b) for a, b in zip(means["load"], means["recompute"], strict=True)]
        shares = [own / other for own, other in zip(means["planned"], best, strict=True)]
        row = {
            "case": cell.name,
            "size": cell.size,
            "rate_gb": cell.rate_gb,
            **{f"{policy}_s": statistics.median(own) for policy, own in means.items()},
            "share": statistics.median(shares),
            "share_low": min(shares),
            "share_high": max(shares),
        }
        print_line(**row)
        rows.append(row)
    return rows


def main(case_filter: str = "", num_rounds: int = 3) -> None:
    cells = [Cell(size, rate) for size in SIZES for rate in RATES_GB]
    cells = [cell for cell in cells if case_filter in cell.name]
    model = load_model(prepare_smollm2(), torch.bfloat16)
    tokenizer = load_tokenizer(prepare_smollm2())
    tokens = tokenizer("\n\n".join(one.text for one in load_documents())).input_ids
    length = LENGTH + TAIL
    prompts = [tokens[i * length : (i + 1) * length] for i in range(max(SIZES))]
    with open_subjects(model, tokenizer, POOL_TOKENS) as subjects:
        measure(subjects, prompts, cells, num_rounds)
