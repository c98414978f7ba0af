"""`batch_invariant=True` on the CPU: the same bits for a query in any cut of sequence and batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from attention_inputs import DTYPES, Case, Inputs, make_inputs
from implementations import Implementation
from test_attention_features import Feature, make_scoring, quantize_some
from test_attention_properties import on_every_cpu_path

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference

CPU = torch.device("cpu")
# Two sequences: queries from position 0 on, and from the middle of a block on.
SEQUENCES = ((150, 150), (60, 1290))


def feature(name: str, scoring: dict | None = None, **case: object) -> Feature:
    return Feature(name, Case(name, SEQUENCES, **case), **(scoring or {}))


FEATURES = [
    feature("plain", heads=(6, 2)),
    # 500 queries with groups of 9 are more rows than a tile has, and span several chunks.
    Feature("long_prompt", Case("", ((600, 1100),), heads=(9, 1), head_dim=32)),
    feature("window", window=37),
    feature("window_past_a_chunk", window=700, block_size=64),
    feature("heads_of_72", head_dim=72, layout="tokens_first"),
    feature("heads_of_16", head_dim=16, heads=(3, 3)),
    feature("scores", {"soft_cap": 3.0, "sinks": True, "alibi": True}),
    feature("kinds", {"kinds": ("int8", "float", "int4")}, window=81, block_size=32),
]


@dataclass
class Sequences:
    """Sequences whose queries can be asked in any cut."""

    inputs: Inputs
    lengths: list[int]
    counts: list[int]

    def ask(self, pieces: list[tuple[int, int, int]]) -> tuple:
        """Arguments of a call for pieces: each is a sequence and a range of its positions."""
        query, keys, values, table, _, _ = self.inputs.tensors()
        rows, bounds = [], [0]
        for seq, begin, end in pieces:
            rows.append(query[self.rows(seq, begin, end)])
            bounds.append(bounds[-1] + end - begin)
        return (
            *(torch.cat(rows), keys, values),
            table[[seq for seq, _, _ in pieces]],
            torch.tensor([end for _, _, end in pieces], dtype=torch.int32),
            torch.tensor(bounds, dtype=torch.int32),
        )

    def rows(self, seq: int, begin: int, end: int) -> slice:
        """Rows of a sequence's positions among all queries."""
        first = sum(self.counts[:seq]) - (self.lengths[seq] - self.counts[seq])
        return slice(first + begin, first + end)

    def random_cuts(self, rng: random.Random) -> list[tuple[int, int, int]]:
        """Pieces that cover every query once, in any order."""
        pieces = []
        for seq, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
            begin = length - count
            while begin < length:
                end = min(length, begin + rng.choice([1, 1, 2, 3, 5, 16, 17, 64, 100]))
                pieces.append((seq, begin, end))
                begin = end
        rng.shuffle(pieces)
        return pieces


def make_sequences(feature: Feature, dtype: torch.dtype) -> tuple[Sequences, dict]:
    case = feature.case
    inputs = make_inputs(case, dtype, CPU)
    caches = {}
    if feature.kinds:
        caches = quantize_some(inputs, feature.kinds, case.head_dim, case.head_dim)
    lengths, counts = ([pair[i] for pair in case.sequences] for i in (1, 0))
    return Sequences(inputs, lengths, counts), caches


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_any_cut_gives_the_same_bits(
    implementation: Implementation, feature: Feature, dtype: torch.dtype
) -> None:
    sequences, caches = make_sequences(feature, dtype)
    scoring = make_scoring(feature, CPU)

    def attend(pieces: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        return implementation.paged_attention(
            *sequences.ask(pieces), scoring, True, **caches, batch_invariant=True
        )

    whole = attend(
        [
            (seq, length - count, length)
            for seq, (count, length) in enumerate(feature.case.sequences)
        ]
    )
    rng = random.Random(0)
    pieces = sequences.random_cuts(rng)
    while pieces:
        batch = [pieces.pop() for _ in range(min(len(pieces), rng.choice([1, 2, 5])))]
        got = attend(batch)
        rows = [range(*sequences.rows(*piece).indices(len(whole[0]))) for piece in batch]
        for name, actual, expected in zip(("out", "lse"), got, whole, strict=True):
            indices = [row for piece_rows in rows for row in piece_rows]
            assert torch.equal(actual, expected[indices]), (name, batch)


@on_every_cpu_path
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_is_as_accurate_as_the_reference(
    implementation: Implementation, feature: Feature, dtype: torch.dtype
) -> None:
    sequences, caches = make_sequences(feature, dtype)
    tensors, scoring = sequences.inputs.tensors(), make_scoring(feature, CPU)
    wide = sequences.inputs.tensors(torch.float64)
    exact = reference.paged_attention(*wide, scoring, True, **caches)
    rounded = reference.paged_attention(*tensors, scoring, True, **caches)
    got = implementation.paged_attention(*tensors, scoring, True, **caches, batch_invariant=True)
    for what, actual, near, true in zip(("out", "lse"), got, rounded, exact, strict=True):
        assert_as_accurate(actual, near, true, what)


@on_every_cpu_path
def test_any_number_of_threads_gives_the_same_bits(implementation: Implementation) -> None:
    sequences, _ = make_sequences(FEATURES[0], torch.bfloat16)
    arguments = sequences.ask([(1, 1230, 1290), (0, 149, 150)])
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                implementation.paged_attention(
                    *arguments, make_scoring(FEATURES[0], CPU), True, batch_invariant=True
                )
            )
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))
