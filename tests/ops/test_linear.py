"""The linear layer: as accurate as PyTorch's, and a row's bits depend on nothing else."""

import pytest
import torch
from attention_inputs import DTYPES

import kvkernels
from accuracy import assert_as_accurate
from kvkernels import UnsupportedError
from kvkernels.reference import linear as reference

# in_features, out_features
SHAPES = {
    "no features": (0, 3),
    "smallest": (1, 1),
    "odd": (33, 5),
    "almost a vector": (31, 17),
    "one vector": (32, 16),
    "a vector and a rest": (33, 49),
    "less than half a vector": (5, 9),
    "more than rows are widened of at once": (4107, 9),
    "chunks of features, and a rest": (2100, 70),
    "several rectangles": (96, 97),
    "SmolLM2 up": (576, 1536),
    "SmolLM2 down": (1536, 576),
}
NUM_ROWS = 150  # more than one rectangle of the kernel


def make_layer(shape, dtype, num_rows=NUM_ROWS):
    in_features, out_features = SHAPES[shape]
    return (
        torch.randn(num_rows, in_features).to(dtype),
        torch.randn(out_features, in_features).to(dtype),
        torch.randn(out_features).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("_isa")
def test_is_as_accurate_as_the_reference(shape, dtype):
    layer = make_layer(shape, dtype, num_rows=7)
    exact = reference.linear(*(tensor.double() for tensor in layer))
    assert_as_accurate(kvkernels.linear(*layer), reference.linear(*layer), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("_isa", "_one_thread")
def test_a_row_is_the_same_bits_in_any_batch(shape, dtype):
    rows, weight, bias = make_layer(shape, dtype)
    whole = kvkernels.linear(rows, weight, bias)
    torch.set_num_threads(3)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 16, 17, 33, 129, NUM_ROWS):
        for first in {0, 1, NUM_ROWS - count}:
            part = kvkernels.linear(rows[first : first + count], weight, bias)
            assert torch.equal(part, whole[first : first + count]), (count, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_isa", "_one_thread")
def test_a_row_is_the_same_bits_among_very_many(dtype):
    rows, weight, bias = make_layer("odd", dtype, num_rows=1100)  # more than are packed at a time
    whole = kvkernels.linear(rows, weight, bias)
    torch.set_num_threads(2)
    assert torch.equal(kvkernels.linear(rows, weight, bias), whole)
    for first in (0, 1000, 1020, 1099):
        part = kvkernels.linear(rows[first : first + 30], weight, bias)
        assert torch.equal(part, whole[first : first + 30]), first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 17, 150])
@pytest.mark.parametrize("shape", ["odd", "a vector and a rest", "several rectangles"])
@pytest.mark.usefixtures("_isa")
def test_what_is_not_finite_stays_in_its_row_and_column(shape, num_rows, dtype):
    rows, weight, bias = make_layer(shape, dtype, num_rows)
    expected = kvkernels.linear(rows, weight, bias)
    for value in (torch.nan, torch.inf):
        odd_rows, odd_weight = rows.clone(), weight.clone()
        odd_rows[num_rows // 2] = value
        odd_weight[3] = value
        got = kvkernels.linear(odd_rows, odd_weight, bias)
        assert not got[num_rows // 2].isfinite().any()
        assert not got[:, 3].isfinite().any()
        others = [row for row in range(num_rows) if row != num_rows // 2]
        columns = [column for column in range(len(weight)) if column != 3]
        assert torch.equal(got[others][:, columns], expected[others][:, columns])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["odd", "a vector and a rest"])
@pytest.mark.usefixtures("_isa")
def test_takes_views_and_more_dimensions(shape, dtype):
    rows, weight, _ = make_layer(shape, dtype, num_rows=12)
    out_features = len(weight)
    expected = kvkernels.linear(rows, weight)
    wide = torch.full((12, 40), torch.nan, dtype=dtype)
    wide[:, :33] = rows
    assert torch.equal(kvkernels.linear(wide[:, :33], weight), expected)
    columns = torch.full((33, 12, 2), torch.nan, dtype=dtype)
    columns[..., 0] = rows.T
    assert torch.equal(kvkernels.linear(columns[..., 0].T, weight), expected)
    assert torch.equal(kvkernels.linear(rows.view(3, 4, 33), weight), expected.view(3, 4, -1))
    wide_weight = torch.full((out_features, 40), torch.nan, dtype=dtype)
    wide_weight[:, :33] = weight
    assert torch.equal(kvkernels.linear(rows, wide_weight[:, :33]), expected)
    assert kvkernels.linear(rows[:0], weight).shape == (0, out_features)


@pytest.mark.parametrize("gradients", [True, False])  # calls take another way without
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.zeros(5)}),
        ("weight", {"weight": torch.zeros(5, 33, dtype=torch.float16)}),
        ("weight", {"weight": torch.zeros(33, 5).T}),
        ("weight", {"weight": torch.zeros(5, 33, requires_grad=True)}),
        ("input", {"input": torch.zeros(7, 32)}),
        ("input", {"input": torch.zeros(())}),
        ("input", {"input": torch.zeros(7, 33, dtype=torch.float64)}),
        ("bias", {"bias": torch.zeros(6)}),
        ("bias", {"bias": torch.zeros(10)[::2]}),
        ("bias", {"bias": torch.zeros(5, dtype=torch.bfloat16)}),
    ],
)
def test_refuses_what_does_not_fit(name, change, gradients):
    if change[name].requires_grad and not gradients:
        pytest.skip("is accepted then")
    layer = {"input": torch.zeros(7, 33), "weight": torch.zeros(5, 33), "bias": torch.zeros(5)}
    match = f"^{name}: expected"
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=match):
        kvkernels.linear(**(layer | change))


def test_refuses_another_device():
    with pytest.raises(UnsupportedError, match="CPU"):
        kvkernels.linear(torch.zeros(7, 33, device="meta"), torch.zeros(5, 33, device="meta"))


def test_linear_is_registered_as_pytorch_expects():
    layer = make_layer("odd", torch.float32, num_rows=7)
    torch.library.opcheck(torch.ops.kvkernels.linear.default, layer)
    torch.library.opcheck(torch.ops.kvkernels.linear.default, (*layer[:2], None))
