"""The quick interpreter still notices overflow, and restores Triton afterwards."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is only on Linux")
tl = triton.language

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels are compiled here"
)


@triton.jit
def _combine(first, second, OPERATION: tl.constexpr):
    if OPERATION == "add":
        return first + second
    if OPERATION == "sub":
        return first - second
    return first * second


@triton.jit
def _kernel(first_ptr, second_ptr, out_ptr, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    first, second = tl.load(first_ptr + lanes), tl.load(second_ptr + lanes)
    tl.store(out_ptr + lanes, _combine(first, second, OPERATION))


def combine(operation: str, first: int, second: int, dtype: torch.dtype) -> int:
    """The operation's result in the second of two lanes; the first lane holds ones."""
    numbers = [torch.tensor([1, value], dtype=dtype) for value in (first, second)]
    out = torch.zeros(2, dtype=dtype)
    _kernel[(1,)](*numbers, out, operation, 2)
    return int(out[1])


@pytest.mark.parametrize(
    ("operation", "first", "second", "dtype", "result"),
    [
        ("add", 2**31 - 2, 1, torch.int32, 2**31 - 1),
        ("sub", -(2**31) + 1, 1, torch.int32, -(2**31)),
        ("mul", 46340, 46340, torch.int32, 46340**2),
        ("add", 127, 1, torch.int16, 128),
        ("mul", 2**31, 2**31, torch.int64, 2**62),
        # Like on a GPU: Triton does not check 64 bits.
        ("add", 2**63 - 1, 1, torch.int64, -(2**63)),
    ],
)
def test_a_result_that_fits_its_type_is_computed(operation, first, second, dtype, result) -> None:
    assert combine(operation, first, second, dtype) == result


@pytest.mark.parametrize(
    ("operation", "first", "second", "dtype"),
    [
        ("add", 2**31 - 1, 1, torch.int32),
        ("sub", -(2**31), 1, torch.int32),
        ("mul", 46341, 46341, torch.int32),
        ("add", 2**15 - 1, 1, torch.int16),
        ("sub", 0, 1, torch.uint8),
    ],
)
def test_a_result_past_its_type_is_an_error(operation, first, second, dtype) -> None:
    with pytest.raises(Exception, match=f"overflow detected for operation {operation}"):
        combine(operation, first, second, dtype)


def test_nothing_stays_replaced_behind_a_launch() -> None:
    before = {name: getattr(tl, name) for name in ("load", "store", "arange", "static_range")}
    combine("add", 1, 1, torch.int32)
    with pytest.raises(Exception, match="overflow"):
        combine("add", 2**31 - 1, 1, torch.int32)
    assert {name: getattr(tl, name) for name in before} == before
    assert combine("add", 1, 1, torch.int32) == 2
