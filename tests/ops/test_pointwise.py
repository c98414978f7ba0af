"""Norms, rotations and activations: as accurate as PyTorch's, each row on its own."""

import pytest
import torch
from attention_inputs import DTYPES

import kvkernels
from accuracy import assert_as_accurate
from kvkernels import UnsupportedError
from kvkernels.reference import pointwise as reference

SIZES = (1, 7, 16, 100, 576)
ACTIVATIONS = ("silu", "gelu_tanh")
NUM_ROWS = 150


def assert_rows_alone(function, *rows):
    """Other cuts of the rows and several threads give the same bits."""
    whole = function(*rows)
    torch.set_num_threads(3)
    assert torch.equal(function(*rows), whole)
    for first, count in ((0, 1), (3, 2), (NUM_ROWS - 17, 17), (1, NUM_ROWS - 1)):
        part = function(*(tensor[first : first + count] for tensor in rows))
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize("is_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("_isa")
def test_rms_norm_is_as_accurate_as_the_reference(size, dtype, is_offset):
    input = (torch.randn(9, size) * torch.logspace(-3, 3, 9)[:, None]).to(dtype)
    weight = torch.randn(size).to(dtype)
    exact = reference.rms_norm(input.double(), weight.double(), 1e-6, is_offset)
    rounded = reference.rms_norm(input, weight, 1e-6, is_offset)
    actual = kvkernels.rms_norm(input, weight, 1e-6, is_offset=is_offset)
    assert_as_accurate(actual, rounded, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 24, 64, 256])
@pytest.mark.usefixtures("_isa")
def test_rotary_embedding_has_the_references_bits(head_dim, dtype):
    input = torch.randn(2, 5, 3, head_dim).to(dtype).transpose(1, 2)
    cos, sin = (torch.randn(2, 5, head_dim).to(dtype) for _ in range(2))
    actual = kvkernels.rotary_embedding(input, cos, sin)
    assert torch.equal(actual, reference.rotary_embedding(input, cos, sin))
    assert actual.transpose(1, 2).is_contiguous()
    shared = kvkernels.rotary_embedding(input, cos[:1], sin[:1])
    assert torch.equal(shared[0], actual[0])
    wide = torch.full((2, 5, head_dim + 3), torch.nan, dtype=dtype)
    wide[..., :head_dim] = sin
    assert torch.equal(kvkernels.rotary_embedding(input, cos, wide[..., :head_dim]), actual)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.usefixtures("_isa")
def test_gated_activation_is_as_accurate_as_the_reference(size, dtype, activation):
    # One magnitude at a time, as errors of large values would hide those of small ones.
    for scale in (1e-3, 1.0, 30.0):
        gate, up = (torch.randn(9, size) * scale).to(dtype), torch.randn(9, size).to(dtype)
        exact = reference.gated_activation(gate.double(), up.double(), activation)
        rounded = reference.gated_activation(gate, up, activation)
        assert_as_accurate(kvkernels.gated_activation(gate, up, activation), rounded, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.usefixtures("_isa")
def test_gated_activation_of_what_is_not_finite(activation):
    gate = torch.tensor([torch.nan, torch.inf, 200.0, -200.0, 0.0])
    out = kvkernels.gated_activation(gate, torch.ones(5), activation)
    assert out[0].isnan()
    assert out[1:].tolist() == [torch.inf, 200.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("_isa", "_one_thread")
def test_a_row_is_the_same_bits_in_any_batch(dtype):
    rows, others = (torch.randn(NUM_ROWS, 1000).to(dtype) for _ in range(2))
    weight = torch.randn(1000).to(dtype)
    assert_rows_alone(lambda part: kvkernels.rms_norm(part, weight, 1e-5), rows)
    torch.set_num_threads(1)
    for activation in ACTIVATIONS:
        assert_rows_alone(
            lambda gate, up, name=activation: kvkernels.gated_activation(gate, up, name),
            rows,
            others,
        )
        torch.set_num_threads(1)
    heads = rows.view(NUM_ROWS, 5, 1, 200)

    def rotate(part, cos, sin):
        tokens = part.transpose(0, 2)  # [1, 5, num_rows, 200]
        return kvkernels.rotary_embedding(tokens, cos[None], sin[None])[0].transpose(0, 1)

    assert_rows_alone(rotate, heads, others[:, :200], others[:, 200:400])


def test_takes_views_and_more_dimensions():
    rows = torch.randn(6, 4, 40)
    weight = torch.randn(33)
    expected = kvkernels.rms_norm(rows[..., :33].contiguous(), weight, 1e-6)
    assert torch.equal(kvkernels.rms_norm(rows[..., :33], weight, 1e-6), expected)
    assert kvkernels.rms_norm(rows[:0, :, :33], weight, 1e-6).shape == (0, 4, 33)
    turned = rows[..., :33].transpose(0, 1)
    assert torch.equal(kvkernels.rms_norm(turned, weight, 1e-6), expected.transpose(0, 1))
    gate, up = rows[..., :20], rows[..., 20:]
    expected = kvkernels.gated_activation(gate.contiguous(), up.contiguous(), "silu")
    assert torch.equal(kvkernels.gated_activation(gate, up, "silu"), expected)
    assert kvkernels.gated_activation(gate[0, 0, 0], up[0, 0, 0], "silu").shape == ()


ROWS = torch.zeros(7, 32)
HEADS, ANGLES = torch.zeros(2, 3, 5, 8), torch.zeros(2, 5, 8)


@pytest.mark.parametrize("gradients", [True, False])  # calls take another way without
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda: kvkernels.rms_norm(ROWS, torch.zeros(31), 0)),
        ("weight", lambda: kvkernels.rms_norm(ROWS, torch.zeros(32).half(), 0)),
        ("input", lambda: kvkernels.rms_norm(ROWS.double(), torch.zeros(32).double(), 0)),
        ("input", lambda: kvkernels.rms_norm(torch.zeros(()), torch.zeros(1), 0)),
        ("input", lambda: kvkernels.rotary_embedding(ROWS, ANGLES, ANGLES)),
        ("input", lambda: kvkernels.rotary_embedding(HEADS[..., :7], ANGLES, ANGLES)),
        ("input", lambda: kvkernels.rotary_embedding(HEADS.mT, ANGLES, ANGLES)),
        ("cos", lambda: kvkernels.rotary_embedding(HEADS, ANGLES[:, :4], ANGLES)),
        ("cos", lambda: kvkernels.rotary_embedding(HEADS, torch.ones(()), torch.zeros(()))),
        ("sin", lambda: kvkernels.rotary_embedding(HEADS, ANGLES, ANGLES[:1])),
        ("sin", lambda: kvkernels.rotary_embedding(HEADS, ANGLES, ANGLES.half())),
        ("up", lambda: kvkernels.gated_activation(ROWS, ROWS[:6], "silu")),
        ("up", lambda: kvkernels.gated_activation(ROWS, ROWS.half(), "silu")),
        ("up", lambda: kvkernels.gated_activation(ROWS, ROWS[None], "silu")),
        ("gate", lambda: kvkernels.gated_activation(ROWS.double(), ROWS.double(), "silu")),
        ("activation", lambda: kvkernels.gated_activation(ROWS, ROWS, "relu")),
    ],
)
def test_refuses_what_does_not_fit(name, call, gradients):
    match = f"^{name}: expected"
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    rows = torch.ones(shape)
    assert kvkernels.rms_norm(rows, torch.ones(shape[1]), 1e-6).shape == shape
    assert kvkernels.gated_activation(rows, rows, "silu").shape == shape


def test_refuses_to_be_differentiated():
    with pytest.raises(ValueError, match="input: expected a tensor that needs no gradient"):
        kvkernels.rms_norm(ROWS.clone().requires_grad_(), torch.zeros(32), 0)


@pytest.mark.parametrize(
    ("name", "cos", "sin", "message"),
    [
        ("cos", ANGLES[..., :4], ANGLES[..., :4], r"\[2, 5, 8\], got \[2, 5, 4\]"),
        ("cos", ANGLES[:1, :4], ANGLES[:1, :4], r"\[1, 5, 8\], got \[1, 4, 8\]"),
        ("cos", ANGLES.repeat(2, 1, 1), ANGLES, r"\[2, 5, 8\], got \[4, 5, 8\]"),
        ("sin", ANGLES, ANGLES[:1], r"\[2, 5, 8\], got \[1, 5, 8\]"),
        ("sin", ANGLES, ANGLES[..., :4], r"\[2, 5, 8\], got \[2, 5, 4\]"),
    ],
)
def test_the_kernel_itself_refuses_angles_that_do_not_fit(name, cos, sin, message):
    """It would read past their end; layers call it without the public function's checks."""
    with pytest.raises(ValueError, match=f"^{name}: expected shape {message}"):
        torch.ops.kvkernels.rotary_embedding.default(HEADS, cos, sin)


def test_refuses_another_device():
    rows, heads = torch.zeros(7, 32, device="meta"), torch.zeros(1, 3, 5, 8, device="meta")
    with pytest.raises(UnsupportedError, match="CPU"):
        kvkernels.rms_norm(rows, rows[0], 0)
    with pytest.raises(UnsupportedError, match="CPU"):
        kvkernels.rotary_embedding(heads, heads[:, 0], heads[:, 0])
    with pytest.raises(UnsupportedError, match="CPU"):
        kvkernels.gated_activation(rows, rows, "silu")


def test_pointwise_ops_are_registered_as_pytorch_expects():
    rows = torch.randn(7, 32)
    ops = torch.ops.kvkernels
    torch.library.opcheck(ops.rms_norm.default, (rows, rows[0].clone(), 1e-6, True))
    torch.library.opcheck(ops.gated_activation.default, (rows, rows + 1, "silu"))
    heads, angles = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 5, 8)
    torch.library.opcheck(ops.rotary_embedding.default, (heads, angles, angles + 1))
