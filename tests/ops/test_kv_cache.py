"""store_kv writes exactly the slots it is told to."""

from dataclasses import dataclass

import pytest
import torch
from implementations import IMPLEMENTATIONS, Implementation, every_implementation

import kvkernels
from kvkernels import KVLayout, KVPool, native, reference
from kvkernels.reference import kv_cache as reference_kv_cache

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    name: str
    num_tokens: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    is_small: bool = True


SHAPES = [
    Shape("smallest", 1, 1, 1, 1, 1),
    Shape("partial_block", 5, 2, 2, 16, 64),
    Shape("odd_heads", 7, 3, 5, 16, 80),
    Shape("odd_block", 7, 3, 2, 7, 24),
    Shape("every_slot", 32, 2, 2, 16, 32),
    Shape("no_tokens", 0, 2, 2, 16, 32),
    Shape("several_threads", 700, 16, 8, 64, 128, is_small=False),
]


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple:
    size = (shape.num_tokens, shape.num_kv_heads, shape.head_dim)
    key, value = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    num_slots = shape.num_blocks * shape.block_size
    slots = torch.randperm(num_slots, device=device)[: shape.num_tokens]
    if shape.num_tokens > 2:
        slots[1] = -1  # padding
    return key, value, slots


def make_caches(shape: Shape, dtype: torch.dtype, device: torch.device, layout: str) -> list:
    """Two caches full of NaN: one tensor each, or views with other strides."""
    blocks, heads, slots, width = (
        shape.num_blocks,
        shape.num_kv_heads,
        shape.block_size,
        shape.head_dim,
    )
    full = {"dtype": dtype, "device": device, "fill_value": torch.nan}
    if layout == "dense":
        return [torch.full((blocks, heads, slots, width), **full) for _ in range(2)]
    if layout == "tokens_first":  # [block, slot, K and V, head, dim]
        data = torch.full((blocks, slots, 2, heads, width), **full)
        return [data[:, :, side].transpose(1, 2) for side in range(2)]
    # A pool of three layers, the middle one.
    data = torch.full((blocks, 3, 2, heads, slots, width), **full)
    return [data[:, 1, side] for side in range(2)]


@every_implementation()
@pytest.mark.parametrize("layout", ["dense", "tokens_first", "pool"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_writes_exactly_the_named_slots(
    implementation: Implementation,
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> None:
    if implementation.is_slow and not shape.is_small:
        pytest.skip("too many programs for the interpreter")
    key, value, slots = make_inputs(shape, dtype, device)
    caches = make_caches(shape, dtype, device, layout)
    expected = make_caches(shape, dtype, device, layout)
    implementation.store_kv(key, value, *caches, slots)
    reference_kv_cache.store_kv(key, value, *expected, slots)
    for cache, want in zip(caches, expected, strict=True):
        whole = cache if cache._base is None else cache._base
        whole_want = want if want._base is None else want._base
        torch.testing.assert_close(whole, whole_want, rtol=0, atol=0, equal_nan=True)


@every_implementation()
def test_reads_strided_tokens_and_slots(
    implementation: Implementation, device: torch.device
) -> None:
    shape = Shape("strided", 6, 2, 3, 16, 32)
    fused = torch.randn(6, 2 + 3 + 3, 32, device=device)  # as a fused projection gives q, k and v
    key, value = fused[:, 2:5], fused[:, 5:]
    slots = torch.randperm(32, device=device)[:12].reshape(6, 2)[:, 1]
    caches, expected = (make_caches(shape, torch.float32, device, "dense") for _ in range(2))
    implementation.store_kv(key, value, *caches, slots)
    reference_kv_cache.store_kv(key, value, *expected, slots)
    for cache, want in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)


def test_writes_into_a_pool() -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16)
    pool = KVPool(layout, num_blocks=3)
    pool.data.zero_()
    ones = torch.ones(1, 2, 8, dtype=torch.bfloat16)
    kvkernels.store_kv(ones, 2 * ones, pool.key_cache(1), pool.value_cache(1), torch.tensor([37]))
    assert torch.equal(pool.data[2, 1, 0, :, 5], ones[0])
    assert torch.equal(pool.data[2, 1, 1, :, 5], 2 * ones[0])
    assert pool.data.double().sum() == 16 + 32


@every_implementation()
def test_writes_past_two_to_the_31_elements(
    implementation: Implementation, device: torch.device
) -> None:
    if implementation.is_slow:
        pytest.skip("the interpreter copies the whole cache")
    # 5 GiB; on a CPU only the two touched pages take memory.
    cache = torch.empty(160 << 10, 1, 16, 1024, dtype=torch.bfloat16, device=device)
    key = torch.randn(1, 1, 1024, device=device).bfloat16()
    slot = cache.shape[0] * 16 - 3
    assert slot * 1024 > 2**31
    implementation.store_kv(key, key, cache, cache, torch.tensor([slot], device=device))
    assert torch.equal(cache[-1, 0, 13], key[0, 0])


def good_inputs() -> dict[str, torch.Tensor]:
    return {
        "key": torch.zeros(6, 2, 32),
        "value": torch.zeros(6, 2, 32),
        "key_cache": torch.zeros(3, 2, 16, 32),
        "value_cache": torch.zeros(3, 2, 16, 32),
        "slot_mapping": torch.arange(6),
    }


BAD_INPUTS = [
    ("key", torch.zeros(6, 3, 32), r"key: expected shape \[any, 2, 32\], got \[6, 3, 32\]"),
    ("key", torch.zeros(6, 2, 31), r"key: expected shape \[any, 2, 32\]"),
    ("key", torch.zeros(6, 2, 32).half(), "key: expected dtype torch.float32, got torch.float16"),
    ("key", torch.zeros(6, 2, 64)[..., ::2], "key: expected stride 1 in the last dimension"),
    ("key", torch.zeros(6, 2, 32, device="meta"), "key: expected device cpu, got meta"),
    ("key", torch.zeros(6, 2, 32, requires_grad=True), "key: expected a tensor that needs no grad"),
    ("value", torch.zeros(5, 2, 32), r"value: expected shape \[6, 2, 32\], got \[5, 2, 32\]"),
    ("value", torch.zeros(6, 2, 32).double(), "value: expected dtype torch.float32, got"),
    ("value", torch.zeros(6, 2, 32, requires_grad=True), "value: expected a tensor that needs no"),
    (
        "key_cache",
        torch.zeros(3, 2, 16, 32, requires_grad=True),
        "key_cache: expected a tensor that needs no",
    ),
    ("key_cache", torch.zeros(3, 2, 16), r"key_cache: expected shape \[any, any, any, any\]"),
    ("key_cache", torch.zeros(3, 2, 16, 32, dtype=torch.int8), "key_cache: expected dtype torch.f"),
    ("key_cache", torch.zeros(3, 2, 32, 16).transpose(2, 3), "key_cache: expected stride 1"),
    ("value_cache", torch.zeros(3, 2, 8, 32), r"value_cache: expected shape \[3, 2, 16, 32\]"),
    ("value_cache", torch.zeros(3, 2, 16, 32).half(), "value_cache: expected dtype torch.float32"),
    ("value_cache", torch.zeros(3, 2, 16, 32, device="meta"), "value_cache: expected device cpu"),
    ("slot_mapping", torch.arange(5), r"slot_mapping: expected shape \[6\], got \[5\]"),
    ("slot_mapping", torch.arange(6).int(), "slot_mapping: expected dtype torch.int64, got"),
    ("slot_mapping", torch.arange(6, device="meta"), "slot_mapping: expected device cpu, got meta"),
    ("slot_mapping", torch.arange(43, 49), "slot_mapping: expected slots below 48, got 48"),
    ("slot_mapping", torch.full((6,), 2**62), "slot_mapping: expected slots below 48, got 4611686"),
]


@pytest.mark.parametrize("gradients", [True, False])  # calls take another way without
@pytest.mark.parametrize(("name", "bad", "message"), BAD_INPUTS, ids=lambda x: str(x)[:40])
def test_refuses_bad_input_and_writes_nothing(
    name: str, bad: torch.Tensor, message: str, gradients: bool
) -> None:
    if bad.requires_grad and not gradients:
        pytest.skip("is accepted then")
    inputs = good_inputs() | {"key": torch.ones(6, 2, 32), name: bad}
    with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=f"^{message}"):
        kvkernels.store_kv(**inputs)
    if name == "slot_mapping":
        assert not inputs["key_cache"].any()


def test_refuses_a_cache_of_empty_blocks() -> None:
    empty = torch.zeros(3, 2, 0, 32)
    with pytest.raises(ValueError, match="key_cache: expected at least one slot"):
        kvkernels.store_kv(**good_inputs() | {"key_cache": empty, "value_cache": empty})


def test_accepts_parameters_without_gradients() -> None:
    inputs = good_inputs() | {"key": torch.ones(6, 2, 32, requires_grad=True)}
    with torch.no_grad():
        kvkernels.store_kv(**inputs)
    assert inputs["key_cache"].sum() == 6 * 2 * 32


@pytest.mark.skipif(not native.is_available, reason="the reference has no threads of its own")
def test_any_number_of_threads_writes_the_same() -> None:
    shape = SHAPES[-1]
    key, value, slots = make_inputs(shape, torch.bfloat16, torch.device("cpu"))
    num_threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            caches = [torch.zeros(16, 8, 64, 128, dtype=torch.bfloat16) for _ in range(2)]
            expected = [cache.clone() for cache in caches]
            kvkernels.store_kv(key, value, *caches, slots)
            reference.kv_cache.store_kv(key, value, *expected, slots)
            assert all(map(torch.equal, caches, expected))
    finally:
        torch.set_num_threads(num_threads)


def test_store_kv_is_registered_as_pytorch_expects() -> None:
    inputs = good_inputs() | {"key": torch.randn(6, 2, 32), "value": torch.randn(6, 2, 32)}
    torch.library.opcheck(torch.ops.kvkernels.store_kv.default, tuple(inputs.values()))


def test_has_a_native_implementation() -> None:
    # Without this, a build that lost its kernels would pass all tests with the reference.
    assert "portable" in {found.name for found in IMPLEMENTATIONS}
