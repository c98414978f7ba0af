"""Time to first token with and without a last load that brings layer after layer.

A real model serves prompts whose prefix lies behind a link of a chosen rate. No tier holds what
follows: each prompt has its own tail. `share` is the median over rounds of the overlapped
time over the other one.
"""

import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.bench_planner import Subject
from bench.harness import print_line
from prefixstore.demo.prompts import load_documents
from prefixstore.models import load_model, load_tokenizer, prepare_smollm2

RATES_GB = (0.05, 0.1, 0.2)
PREFIXES = (1024, 2048)
TAILS = (64, 128, 256)
WAYS = ("blocks", "layers")


@dataclass(frozen=True)
class Cell:
    prefix: int
    tail: int
    rate_gb: float

    @property
    def name(self) -> str:
        return f"overlap_{self.prefix}_{self.tail}_at_{self.rate_gb:g}"


@contextmanager
def open_subjects(model: Any, tokenizer: Any) -> Iterator[dict[str, Subject]]:
    with ExitStack() as stack:
        subjects = {}
        for way in WAYS:
            subjects[way] = Subject(model, tokenizer, "planned", gives_layers=way == "layers")
            stack.callback(subjects[way].close)
        yield subjects


def make_prompt(tokens: Sequence[int], cell: Cell, number: int) -> list[int]:
    """The cell's prefix, and a tail that is unique to the cell and round."""
    drawn = random.Random(f"{cell.name} {number}")
    return [*tokens[: cell.prefix], *drawn.choices(tokens, k=cell.tail)]


def ttft_s(subject: Subject, prompt: Sequence[int], cell: Cell) -> tuple[float, Any]:
    """Time one request while the tier holds the cell's prefix and nothing else, and leave it so."""
    blocks, store = subject.cache.blocks, subject.cache.blocks.store
    assert store is not None
    (keys,) = blocks.keys(np.asarray(prompt, np.uint32), subject.cache.config.salt)
    held = blocks.block_size * sum(name is not None for name in store.contains_many(keys))
    if held != cell.prefix:
        raise RuntimeError(f"{cell.name}: expected {cell.prefix} tokens in the tier, got {held}")
    timed = subject.ttft_s(prompt)
    store.delete_many(keys[cell.prefix // blocks.block_size :])  # no room for all tails
    return timed


def measure(subjects: dict[str, Subject], tokens: list[int], cell: Cell, rounds: int) -> None:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    plans: dict[str, list[str]] = {way: [] for way in WAYS}
    for subject in subjects.values():
        subject.tier.bytes_per_s = cell.rate_gb * 1e9
    for number in range(-2, rounds):  # the planner learns the link's speed in the first two
        prompt = make_prompt(tokens, cell, number)
        for way in WAYS if number % 2 else reversed(WAYS):
            seconds, report = ttft_s(subjects[way], prompt, cell)
            if number >= 0:
                times[way].append(seconds)
                plans[way].append(report.plan)
    shares = [a / b for a, b in zip(times["layers"], times["blocks"], strict=True)]
    print_line(
        case=cell.name,
        **{f"{way}_s": statistics.median(times[way]) for way in WAYS},
        share=statistics.median(shares),
        share_low=min(shares),
        share_high=max(shares),
        **{f"{way}_plan": max(set(plans[way]), key=plans[way].count) for way in WAYS},
    )


def main(case_filter: str = "", num_rounds: int = 5) -> None:
    cells = [Cell(p, t, rate) for rate in RATES_GB for p in PREFIXES for t in TAILS]
    model = load_model(prepare_smollm2(), torch.bfloat16)
    tokenizer = load_tokenizer(prepare_smollm2())
    tokens = tokenizer("\n\n".join(one.text for one in load_documents()[:8])).input_ids
    with open_subjects(model, tokenizer) as subjects:
        for subject in subjects.values():  # puts the prefixes into its tier
            subject.tier.bytes_per_s = float("inf")
            subject.ttft_s([*tokens[: max(PREFIXES)], 1])
        for cell in cells:
            if case_filter in cell.name:
                measure(subjects, tokens, cell, num_rounds)
