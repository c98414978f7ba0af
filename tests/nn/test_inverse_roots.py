"""Inverse roots and sums with a factor are refused in 16-bit floats, not in float32."""

import math

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kvkernels import UnsupportedError
from kvkernels.nn import batch_invariance
from kvkernels.nn.batch_invariance import batch_invariant

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WIDTH = 48


class OwnNorm(nn.Module):
    def __init__(self, invert_root):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.invert_root = invert_root

    def forward(self, rows):
        squares = rows.pow(2).mean(-1, keepdim=True)
        return rows * self.invert_root(squares + 1e-6) * self.weight


class NormInAttention(nn.Module):
    """An attention that normalises by itself, so that it cannot be tried on rows alone."""

    def __init__(self):
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, query, key):
        return self.o_proj(query * torch.rsqrt(query.pow(2).mean(-1, keepdim=True)) * key)


class Scaling(nn.Module):
    """Takes inverse roots of plain Python numbers only."""

    def forward(self, query, key):
        width = query.shape[-1]
        return query * width**-0.5 * key * math.pow(width, -0.5) * math.pow(width, 0.3)


REFUSED = {
    "rsqrt": lambda: OwnNorm(torch.rsqrt),
    "method": lambda: OwnNorm(lambda squares: squares.rsqrt()),
    "power": lambda: OwnNorm(lambda squares: torch.pow(squares, -0.5)),
    "operator": lambda: OwnNorm(lambda squares: squares**-0.5),
    "not_of_rows": NormInAttention,
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in REFUSED), ("rsqrt", torch.float16)],
    ids=str,
)
def test_of_half_numbers_are_refused(name, dtype):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), REFUSED[name]()).to(dtype)
    with pytest.raises(UnsupportedError, match=r"inverse roots .*, got .* in 1 of "):
        batch_invariance.install(model)
    with batch_invariant(model.float()):
        pass


class Scaled(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.up, self.add = nn.Linear(WIDTH, WIDTH), add

    def forward(self, rows):
        return self.add(rows, self.up(rows))


SUMS = {
    "function": lambda a, b: torch.add(a, b, alpha=0.37),
    "method": lambda a, b: a.sub(b, alpha=0.37),
    "in_place": lambda a, b: b.add_(a, alpha=0.37),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_half_numbers_with_a_factor_are_refused(name):
    model = Scaled(SUMS[name]).bfloat16()
    with pytest.raises(UnsupportedError, match=r"got add\(alpha\) in the model of Scaled"):
        batch_invariance.install(model)
    rows = torch.randn(200, WIDTH)
    with torch.inference_mode(), batch_invariant(model.float()):
        assert torch.equal(model(rows[:7]), model(rows)[:7])


SERVED = {
    "sum": lambda: Scaled(lambda a, b: torch.add(a, b * 0.37)),
    "llama": lambda: LlamaRMSNorm(WIDTH),
    "gemma": lambda: Gemma2RMSNorm(WIDTH),
    "pytorch": lambda: nn.RMSNorm(WIDTH),
    "root": lambda: OwnNorm(lambda squares: 1 / squares.sqrt()),
    "in_float32": lambda: OwnNorm(lambda squares: squares.float().rsqrt().to(squares.dtype)),
}


@HALVES
@pytest.mark.parametrize("name", SERVED)
def test_others_have_the_same_bits(name, dtype):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), SERVED[name]()).to(dtype)
    rows = torch.randn(200, WIDTH).to(dtype)
    with torch.inference_mode(), batch_invariant(model):
        whole = model(rows)
        for begin, end in ((0, 1), (1, 32), (32, 95), (95, 200)):
            assert torch.equal(model(rows[begin:end]), whole[begin:end])


@HALVES
def test_powers_of_plain_numbers_are_none(dtype):
    with batch_invariant(nn.Sequential(nn.Linear(3, 3), Scaling()).to(dtype)):
        pass
