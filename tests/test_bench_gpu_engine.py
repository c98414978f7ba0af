"""The engine's rows for a GPU are measured, on a tiny model, whatever the times are."""

import math

import pytest

from bench.gpu.engine import engine_cases
from bench.gpu.engine_setup import Case, llama_config

CASE = Case(
    "tiny",
    llama_config(2, 64, (2, 1), intermediate_size=64, vocab_size=97),
    prompt_lens=(200,),
    context=128,
    batches=(1, 3),
    num_new=8,
    chunk_tokens=128,
    memory_bytes=8 << 20,
    num_rounds=1,
)


@pytest.mark.parametrize("name", [name for name, _ in engine_cases("cpu", [CASE])])
def test_every_row_is_measured(name, device):
    row = dict(engine_cases(device, [CASE]))[name]()
    assert row
    assert row.pop("graph_shapes", "") == ""  # a CPU has none
    assert all(math.isfinite(value) for value in row.values())
