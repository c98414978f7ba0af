"""Activations that a forward calls as functions: found wherever they hide, and refused."""

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from kvkernels import UnsupportedError
from kvkernels.nn import batch_invariance
from kvkernels.nn.batch_invariance import batch_invariant


class Named(nn.Module):
    def forward(self, rows):
        return rows * silu(rows)


class OfTheTensor(nn.Module):
    def forward(self, rows):
        return rows * rows.sigmoid()


class InPlace(nn.Module):
    def forward(self, rows):
        return rows.sigmoid_()


class InAMethod(nn.Module):
    def forward(self, rows):
        return self.gate(rows)

    def gate(self, rows):
        return nn.functional.softplus(rows)


class InAFunction(nn.Module):
    def forward(self, rows):
        return gate(rows)


def gate(rows):
    return rows * torch.sigmoid(rows)


class Kept(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.functional.gelu

    def forward(self, rows):
        return self.act(rows)


class Inherited(InAFunction):
    pass


class Wrapped(nn.Module):
    @torch.no_grad()
    def forward(self, rows):
        return silu(rows)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        (Named, "silu"),
        (OfTheTensor, "sigmoid"),
        (InPlace, "sigmoid_"),
        (InAMethod, "softplus"),
        (InAFunction, "sigmoid"),
        (Kept, "gelu"),
        (Inherited, "sigmoid"),
        (Wrapped, "silu"),
    ],
)
def test_is_refused(kind, activation):
    model = nn.Sequential(nn.Linear(3, 3), kind())
    message = rf"calls {activation} as a function: 1 of {kind.__name__}"
    with pytest.raises(UnsupportedError, match=message):
        batch_invariance.install(model)


class OfModules(nn.Module):
    """Modules with the names of functions, and functions that keep an element's bits."""

    def __init__(self):
        super().__init__()
        self.sigmoid, self.gelu = nn.Sigmoid(), nn.GELU()

    def forward(self, rows):
        return torch.tanh(self.sigmoid(rows)) * self.gelu(rows).softmax(dim=-1)


def test_modules_of_the_same_name_are_not_refused():
    model = OfModules()
    rows = torch.randn(40, 37)
    with torch.inference_mode(), batch_invariant(model):
        whole = model(rows)
        for begin, end in ((0, 1), (1, 3), (3, 40)):
            assert torch.equal(model(rows[begin:end]), whole[begin:end])
