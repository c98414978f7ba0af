"""Calls that C++ checks and does at once give what the long way through PyTorch gives."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from attention_inputs import DTYPES
from hypothesis import given
from hypothesis import strategies as st
from test_attention_checks import good_inputs, merge_inputs, quantized_cache
from test_attention_properties import draw_some, features, make_call, seeds

import kvkernels
from kvkernels import native

pytestmark = pytest.mark.skipif(
    not native.reads_tensors, reason="needs the C++ extension, and PyTorch 2.10"
)


class WentTheLongWay(Exception):
    pass


@pytest.fixture
def only_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes PyTorch's dispatcher refuse what gets there where no gradients are recorded."""
    call = torch._ops.OpOverload.__call__

    def refuse(op: object, *args: object, **options: object) -> object:
        if not torch.is_grad_enabled() and str(op).startswith("kvkernels."):
            raise WentTheLongWay(op)
        return call(op, *args, **options)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", refuse)


def in_both_ways(call: Callable[[], object]) -> tuple[object, object]:
    long = call()
    with torch.no_grad():
        return long, call()


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention_is_the_same(return_lse: bool, batch_invariant: bool) -> None:
    @draw_some
    @given(feature=features(), dtype=st.sampled_from(DTYPES), seed=seeds)
    def check(feature, dtype, seed) -> None:
        inputs, scoring, caches = make_call(feature, dtype, seed)

        def attend() -> object:
            return kvkernels.paged_attention(
                *inputs.tensors(),
                sm_scale=scoring.sm_scale if seed % 2 else None,
                causal=scoring.causal,
                window=scoring.window or None,
                soft_cap=scoring.soft_cap or None,
                sinks=scoring.sinks,
                alibi_slopes=scoring.alibi_slopes,
                tree_mask=scoring.tree_mask,
                **caches,
                return_lse=return_lse,
                batch_invariant=batch_invariant,
            )

        long, at_once = in_both_ways(attend)
        torch.testing.assert_close(at_once, long, rtol=0, atol=0, equal_nan=True)

    check()


@pytest.mark.usefixtures("only_at_once")
def test_attention_over_float8_is_the_same() -> None:
    inputs = good_inputs()
    for name in ("key_cache", "value_cache"):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
    long, at_once = in_both_ways(lambda: kvkernels.paged_attention(**inputs))
    assert torch.equal(long, at_once)


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "block_table"])
def test_every_tensor_has_strides_of_its_own(name: str) -> None:
    inputs = good_inputs()
    tensor = inputs[name]
    room = tensor.new_zeros([size + i + 1 for i, size in enumerate(tensor.shape)])
    inputs[name] = room[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
    expected = kvkernels.paged_attention(**inputs | {name: tensor})
    long, at_once = in_both_ways(lambda: kvkernels.paged_attention(**inputs))
    assert torch.equal(at_once, expected)
    assert torch.equal(long, expected)


@pytest.mark.usefixtures("only_at_once")
def test_attention_over_latents_is_the_same() -> None:
    cache = torch.randn(3, 1, 16, 48)
    inputs = good_inputs() | {"query": torch.randn(5, 4, 48)}
    inputs |= {"key_cache": cache, "value_cache": cache[..., :32]}
    long, at_once = in_both_ways(lambda: kvkernels.paged_attention(**inputs))
    assert torch.equal(long, at_once)
    assert at_once.shape == (5, 4, 32)


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["dense", "heads_last", "every_other_slot"])
def test_storing_is_the_same(dtype: torch.dtype, layout: str) -> None:
    key, value = torch.randn(2, 7, 2, 32).to(dtype)
    slots = torch.tensor([3, -1, 40, 0, 17, 31, 8])

    def store() -> torch.Tensor:
        caches = torch.zeros(2, 3, 2, 16, 32, dtype=dtype)
        if layout == "heads_last":
            caches = torch.zeros(2, 3, 16, 2, 32, dtype=dtype).transpose(2, 3)
        if layout == "every_other_slot":
            caches = torch.zeros(2, 3, 2, 32, 32, dtype=dtype)[:, :, :, ::2]
        kvkernels.store_kv(key, value, *caches, slots)
        return caches

    long, at_once = in_both_ways(store)
    assert torch.equal(long, at_once)
    assert at_once.count_nonzero() == 2 * 6 * 2 * 32


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_is_the_same(dtype: torch.dtype) -> None:
    inputs = [part.to(dtype) if part.dim() == 3 else part for part in merge_inputs().values()]
    long, at_once = in_both_ways(lambda: kvkernels.merge_attention(*inputs))
    torch.testing.assert_close(at_once, long, rtol=0, atol=0)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


LAYERS: dict[str, Callable[[torch.dtype], object]] = {
    "linear": lambda dtype: kvkernels.linear(
        numbers(2, 3, 64, dtype=dtype), numbers(40, 64, dtype=dtype), numbers(40, dtype=dtype)
    ),
    "linear_of_rows_apart": lambda dtype: kvkernels.linear(
        numbers(5, 80, dtype=dtype)[:, :64], numbers(40, 70, dtype=dtype)[:, :64]
    ),
    "rms_norm": lambda dtype: kvkernels.rms_norm(
        numbers(2, 3, 64, dtype=dtype), numbers(64, dtype=dtype), 1e-5
    ),
    "rms_norm_of_rows_apart": lambda dtype: kvkernels.rms_norm(
        numbers(5, 80, dtype=dtype)[:, :64], numbers(64, dtype=dtype), 1e-5, is_offset=True
    ),
    "gated_activation": lambda dtype: kvkernels.gated_activation(
        *numbers(2, 2, 3, 64, dtype=dtype), "silu"
    ),
    "gated_activation_of_rows_apart": lambda dtype: kvkernels.gated_activation(
        numbers(5, 80, dtype=dtype)[:, :64], numbers(5, 70, dtype=dtype)[:, 6:], "gelu_tanh"
    ),
}


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(LAYERS))
def test_layers_are_the_same(name: str, dtype: torch.dtype) -> None:
    def run() -> object:
        torch.manual_seed(0)
        return LAYERS[name](dtype)

    long, at_once = in_both_ways(run)
    torch.testing.assert_close(at_once, long, rtol=0, atol=0)


class Marked(torch.Tensor):
    """A subclass may keep its numbers elsewhere, so PyTorch must see the call."""


@pytest.mark.usefixtures("only_at_once")
@pytest.mark.parametrize("name", list(good_inputs()))
def test_subclasses_go_the_long_way(name: str) -> None:
    inputs = good_inputs()
    inputs[name] = inputs[name].as_subclass(Marked)
    with torch.no_grad(), pytest.raises(WentTheLongWay):
        kvkernels.paged_attention(**inputs)


def negated(*shape: int, is_dense: bool = False) -> torch.Tensor:
    """Numbers that PyTorch negates when it reads them, as the imaginary part of a conjugate."""
    tensor = torch.randn(shape, dtype=torch.complex64).conj().imag
    if is_dense:  # real parts, too, from the first imaginary one on
        tensor = tensor.as_strided(shape, torch.empty(shape).stride())
    assert tensor.is_neg()
    return tensor


@pytest.mark.parametrize("num_heads", [1, 4])
def test_sinks_may_be_negated(num_heads: int) -> None:
    query, cache, ids = torch.randn(1, num_heads, 32), torch.randn(2, 2, 1, 16, 32), torch.ones(1)
    inputs = (query, *cache, ids[None].int(), 9 * ids.int())
    sinks = negated(num_heads, is_dense=num_heads > 1)
    expected = kvkernels.paged_attention(*inputs, sinks=sinks.clone())
    long, at_once = in_both_ways(lambda: kvkernels.paged_attention(*inputs, sinks=sinks))
    assert torch.equal(long, expected)
    assert torch.equal(at_once, expected)


@pytest.mark.parametrize("head_dim", [1, 32])
def test_stored_numbers_may_be_negated(head_dim: int) -> None:
    key = negated(3, 1, head_dim, is_dense=head_dim > 1)

    def store() -> torch.Tensor:
        caches = torch.zeros(2, 1, 1, 16, head_dim)
        kvkernels.store_kv(key, key, *caches, torch.arange(3))
        return caches[:, 0, 0, :3]

    long, at_once = in_both_ways(store)
    expected = key.clone().view(3, head_dim).expand(2, 3, head_dim)
    assert torch.equal(long, expected)
    assert torch.equal(at_once, expected)


@pytest.mark.usefixtures("only_at_once")
def test_parameters_are_plain() -> None:
    inputs = good_inputs()
    inputs["query"] = torch.nn.Parameter(inputs["query"])
    with torch.no_grad():
        kvkernels.paged_attention(**inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"sm_scale": 1},
        {"sm_scale": np.float64(0.25)},
        {"soft_cap": 30},
        {"window": True},
        {"window": 1 << 40},
        {"return_lse": 1},
        {"batch_invariant": 1},
        {"int4_cache": quantized_cache()},
    ],
    ids=lambda options: next(iter(options)),
)
def test_unusual_options_mean_the_same(options: dict) -> None:
    inputs = good_inputs()
    long, at_once = in_both_ways(lambda: kvkernels.paged_attention(**inputs, **options))
    torch.testing.assert_close(at_once, long, rtol=0, atol=0)


@pytest.mark.usefixtures("only_at_once")
def test_an_inference_tensor_comes_of_inference_mode() -> None:
    inputs = good_inputs()
    with torch.inference_mode():
        assert kvkernels.paged_attention(**inputs).is_inference()
    with torch.no_grad():
        assert not kvkernels.paged_attention(**inputs).is_inference()


class ExchangeTable(ctypes.Structure):
    """What `torch.Tensor.__dlpack_c_exchange_api__` points to."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    )


def use_table(capsule: object) -> bool:
    return native.extension.use_tensor_exchange(capsule, torch.Tensor, torch.nn.Parameter)


@pytest.fixture
def table_address() -> Iterator[int]:
    """PyTorch's table, which is in use again at the end."""
    capsule = torch.Tensor.__dlpack_c_exchange_api__
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    yield address_of(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    assert use_table(capsule)


def offer(table: ExchangeTable) -> bool:
    wrap = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    new_capsule = wrap(("PyCapsule_New", ctypes.pythonapi))
    return use_table(new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", None))


def test_uses_the_older_table_of_a_newer_pytorch(table_address: int) -> None:
    assert offer(ExchangeTable(major=3, older=table_address))
    with torch.no_grad():
        kvkernels.paged_attention(**good_inputs())


@pytest.mark.usefixtures("table_address")
def test_uses_no_table_of_an_unknown_version() -> None:
    assert not offer(ExchangeTable(major=3))


@pytest.mark.usefixtures("table_address")
def test_uses_no_table_that_does_not_read_tensors() -> None:
    assert not offer(ExchangeTable(major=1))
