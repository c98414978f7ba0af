"""The engine's GPU rows can be measured on a tiny model; times do not matter."""

import math

import pytest
import torch

from bench.gpu import engine
from bench.gpu.engine import engine_cases
from bench.gpu.engine_setup import Case, llama_config, make_model

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


def test_evictions_that_end_early_are_told(monkeypatch):
    class Failing(engine.BlockTransfer):
        num_evictions = 0

        def evict(self, *args, **kwargs):
            self.num_evictions += 1
            if self.num_evictions == 2:  # the first one compiles
                raise RuntimeError("an illegal memory access")
            return super().evict(*args, **kwargs)

    monkeypatch.setattr(engine, "BlockTransfer", Failing)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        engine.time_beside_evictions(CASE, make_model(CASE, torch.device("cpu")))
