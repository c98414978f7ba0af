"""Activations and linear layers that a forward calls as functions are found and refused."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import linear as imported_linear
from torch.nn.functional import silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

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


class InAFunctionWithin(nn.Module):
    def forward(self, rows):
        def gate(rows):
            return silu(rows)

        return gate(rows)


class Held(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, rows):
        return self.act(rows)


def as_a_closure(act):
    return lambda rows: act(rows)


HELD = {
    "function": (nn.functional.gelu, "gelu"),
    "partial": (functools.partial(nn.functional.gelu, approximate="tanh"), "gelu"),
    "lambda": (lambda rows: torch.special.expit(rows), "expit"),
    "lambda_of_one_held": (as_a_closure(torch.sigmoid), "sigmoid"),
    "of_halves": (lambda rows: nn.functional.glu(rows), "glu"),
    "by_another_name": (lambda rows: torch.arctanh(rows), "arctanh"),
    "in_place": (lambda rows: rows.exp2_(), "exp2_"),
    "of_two": (lambda rows: torch.logaddexp(rows, -rows), "logaddexp"),
    "power": (lambda rows: torch.pow(rows.abs().add(0.5), 1.7), r"pow\(1.7\)"),
    "power_by_name": (lambda rows: torch.pow(rows, exponent=0.3), r"pow\(0.3\)"),
    "power_into": (lambda rows: torch.pow(rows, 0.3, out=torch.empty(0)), r"pow\(0.3\)"),
    "power_of_a_number": (lambda rows: torch.pow(10, rows - 1), r"pow\(number, ...\)"),
    "power_of_two": (lambda rows: torch.pow(rows, -rows), r"pow\(..., ...\)"),
    "power_of_two_in_place": (lambda rows: rows.abs_().pow_(rows), r"pow\(..., ...\)"),
    "operator_of_two": (lambda rows: (rows + 9) ** rows, r"pow\(..., ...\)"),
    "operator": (lambda rows: rows**2.5, r"pow\(2.5\)"),
    "operator_of_a_number": (lambda rows: 1 + 2 ** (rows + 1).neg(), r"pow\(number, ...\)"),
}


class HeldExponent(nn.Module):
    def __init__(self):
        super().__init__()
        self.exponent = 1.5

    def forward(self, rows):
        return rows.pow(self.exponent)


class LearntExponent(nn.Module):
    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.full((37,), 1.5))

    def forward(self, rows):
        return rows**self.exponent


class ForInheritedForward(Gemma2RMSNorm):
    """Inherits a forward from another file."""

    def __init__(self):
        super().__init__(3)

    def _norm(self, x):
        return x.sigmoid()


class Inherited(InAFunction):
    pass


class Above(InAMethod):
    def forward(self, rows):
        return -super().forward(rows)


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
        (InAFunctionWithin, "silu"),
        (HeldExponent, r"pow\(1.5\)"),
        (LearntExponent, r"pow\(..., ...\)"),
        (ForInheritedForward, "sigmoid"),
        (Inherited, "sigmoid"),
        (Above, "softplus"),
        (Wrapped, "silu"),
    ],
)
def test_an_activation_called_as_a_function_is_refused(kind, activation):
    model = nn.Sequential(nn.Linear(3, 3), kind())
    message = rf"calls {activation} as a function: 1 of {kind.__name__}"
    with pytest.raises(UnsupportedError, match=message):
        batch_invariance.install(model)


@pytest.mark.parametrize("name", HELD)
def test_an_activation_that_a_module_holds_as_a_function_is_refused(name):
    act, called = HELD[name]
    with pytest.raises(UnsupportedError, match=rf"calls {called} as a function: the model of Held"):
        batch_invariance.install(Held(act))


class Tied(nn.Module):
    """Its last layer is a function call with the first layer's weights."""

    def __init__(self, apply):
        super().__init__()
        self.embed, self.apply_linear = nn.Embedding(9, 3), apply

    def forward(self, rows):
        return self.apply_linear(rows, self.embed.weight)


LINEARS = {
    "named": lambda *args: nn.functional.linear(*args),
    "held": nn.functional.linear,
    "imported": lambda *args: imported_linear(*args),
    "operator": lambda *args: torch.ops.aten.linear(*args),
    "overload": lambda *args: torch.ops.aten.linear.default(*args),
    "binding": lambda *args: torch._C._nn.linear(*args),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear_layers_as_functions_are_refused(name):
    with pytest.raises(UnsupportedError, match=r"calls linear as a function: 1 of Tied"):
        batch_invariance.install(nn.Sequential(nn.Identity(), Tied(LINEARS[name])))


PRODUCTS = {
    "@": lambda rows: rows @ rows.transpose(-1, -2),
    "matmul": lambda rows: torch.matmul(rows, rows.mT),
    "bmm": lambda rows: rows.bmm(rows.mT),
    "baddbmm_": lambda rows: torch.zeros(1, 3, 3).baddbmm_(rows, rows.mT),
    "einsum": lambda rows: torch.einsum("bij,bkj->bik", rows, rows),
    "inner": lambda rows: torch.inner(rows, rows),
    "chain_matmul": lambda rows: torch.chain_matmul(rows[0], rows[0].T),
    "conv1d": lambda rows: nn.functional.conv1d(rows, rows),
    "cdist": lambda rows: torch.cdist(rows, rows),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_matrices_are_refused(name):
    message = f"in linear layers and attention only, got {name} in the model of Held"
    with pytest.raises(UnsupportedError, match=message):
        batch_invariance.install(Held(PRODUCTS[name]))


class Angles(nn.Module):
    """Of rotations, as models make them: products of single numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.rand(9))

    def forward(self, rows):
        return self.inv_freq[:, None] @ rows[None]


def test_products_of_single_numbers_are_not_refused():
    with batch_invariant(nn.Sequential(Angles())) as model:
        assert torch.equal(model(torch.ones(5))[:, 0], model[0].inv_freq)


class OfModules(nn.Module):
    """Uses modules named like the functions, and functions that round alike everywhere."""

    def __init__(self):
        super().__init__()
        self.sigmoid, self.gelu, self.linear = nn.Sigmoid(), nn.GELU(), nn.Linear(37, 37)
        self.matmul, self.num_bits = nn.Identity(), 5

    exponent = 2

    def forward(self, rows):
        rows = torch.tanh(self.sigmoid(self.linear(rows))) * self.gelu(rows).softmax(dim=-1)
        rows = self.matmul(rows) * 2**self.num_bits
        cubes = torch.pow(nn.functional.leaky_relu(rows, 0.3), 3) * rows.shape[-1] ** -0.5
        return (cubes * rows**self.exponent).abs().add(1e-6).pow(-0.5)


def test_modules_of_the_same_name_are_not_refused():
    model = OfModules()
    rows = torch.randn(40, 37)
    with torch.inference_mode(), batch_invariant(model):
        whole = model(rows)
        for begin, end in ((0, 1), (1, 3), (3, 40)):
            assert torch.equal(model(rows[begin:end]), whole[begin:end])
