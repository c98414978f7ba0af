"""Arguments that the attention ops refuse."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

import kvkernels
from kvkernels import native
from kvkernels.ops.attention_checks import check_scoring


@pytest.fixture(autouse=True, params=["gradients", "no_gradients"])
def records_gradients(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Calls take another way where no gradients are recorded."""
    is_recorded = request.param == "gradients"
    with torch.set_grad_enabled(is_recorded):
        yield is_recorded


def good_inputs() -> dict:
    return {
        "query": torch.randn(5, 4, 32),
        "key_cache": torch.randn(3, 2, 16, 32),
        "value_cache": torch.randn(3, 2, 16, 32),
        "block_table": torch.tensor([[2, 0], [1, -1]], dtype=torch.int32),
        "seq_lens": torch.tensor([20, 3], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 4, 5], dtype=torch.int32),
    }


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


META = torch.device("meta")
BAD_SHAPES = [
    ("query", torch.zeros(5, 4, 31), "query: expected shape [any, any, 32], got [5, 4, 31]"),
    ("query", torch.zeros(5, 32), "query: expected shape [any, any, 32], got [5, 32]"),
    ("query", torch.zeros(5, 3, 32), "query: expected num_heads to be a multiple of num_kv_heads"),
    ("query", torch.zeros(5, 0, 32), "query: expected num_heads to be a multiple of num_kv_heads"),
    ("key_cache", torch.zeros(3, 16, 32), "key_cache: expected shape [any, any, any, any], got"),
    ("value_cache", torch.zeros(3, 2, 32, 32), "value_cache: expected shape [3, 2, 16, any], got"),
    ("block_table", ints(0, 0), "block_table: expected shape [2, any], got [2]"),
    ("block_table", ints(0, 0)[None], "block_table: expected shape [2, any], got [1, 2]"),
    ("seq_lens", ints(20, 3)[None], "seq_lens: expected shape [any], got [1, 2]"),
    ("cu_seqlens_q", ints(0, 5), "cu_seqlens_q: expected shape [3], got [2]"),
    (
        "cu_seqlens_q",
        None,
        "query: expected one token for each of 2 sequences without cu_seqlens_q",
    ),
]
BAD_KINDS = [
    (
        "query",
        torch.zeros(5, 4, 32).half(),
        "key_cache: expected dtype torch.float16 or torch.float8_e4m3fn, got torch.float32",
    ),
    ("query", torch.zeros(5, 4, 64)[..., ::2], "query: expected stride 1 in the last dimension"),
    ("query", torch.zeros(5, 4, 32, device=META), "key_cache: expected device meta, got cpu"),
    ("query", torch.zeros(5, 4, 32, requires_grad=True), "query: expected a tensor that needs no"),
    (
        "key_cache",
        torch.zeros(3, 2, 16, 32, requires_grad=True),
        "key_cache: expected a tensor that needs no gradient",
    ),
    (
        "value_cache",
        torch.zeros(3, 2, 16, 32, requires_grad=True),
        "value_cache: expected a tensor that needs no gradient",
    ),
    ("window", 1.5, "window: expected an integer of 1 or more, or None for no window, got 1.5"),
    ("window", 1 << 63, "window: expected an integer of 1 or more, or None for no window"),
    ("sm_scale", "0.1", "sm_scale: expected a finite float32 number or None, got '0.1'"),
    ("sm_scale", float("nan"), "sm_scale: expected a finite float32 number or None, got nan"),
    ("sm_scale", float("inf"), "sm_scale: expected a finite float32 number or None, got inf"),
    ("sm_scale", -float("inf"), "sm_scale: expected a finite float32 number or None, got -inf"),
    ("sm_scale", 1e39, "sm_scale: expected a finite float32 number or None, got 1e+39"),
    ("soft_cap", 0.0, "soft_cap: expected a positive float32 number or None, got 0.0"),
    ("soft_cap", 1e-50, "soft_cap: expected a positive float32 number or None, got 1e-50"),
    ("causal", "no", "causal: expected True or False, got 'no'"),
    ("causal", None, "causal: expected True or False, got None"),
    ("key_cache", torch.zeros(3, 2, 16, 32).double(), "key_cache: expected dtype torch.float32 or"),
    ("key_cache", torch.zeros(3, 2, 32, 16).mT, "key_cache: expected stride 1 in the last dim"),
    ("value_cache", torch.zeros(3, 2, 16, 32).half(), "value_cache: expected dtype torch.float32"),
    ("value_cache", torch.zeros(3, 2, 32, 16).mT, "value_cache: expected stride 1 in the last dim"),
    ("value_cache", torch.zeros(3, 2, 16, 32, device=META), "value_cache: expected device cpu"),
    ("block_table", torch.zeros(2, 2).long(), "block_table: expected dtype torch.int32, got"),
    ("block_table", torch.zeros(2, 4).int()[:, ::2], "block_table: expected stride 1 in the last"),
    ("block_table", torch.zeros(2, 2, device=META).int(), "block_table: expected device cpu"),
    ("seq_lens", torch.zeros(2).long(), "seq_lens: expected dtype torch.int32, got torch.int64"),
    ("seq_lens", torch.zeros(4).int()[::2], "seq_lens: expected stride 1 in the last dimension"),
    ("seq_lens", torch.zeros(2, device=META).int(), "seq_lens: expected device cpu, got meta"),
    ("cu_seqlens_q", torch.zeros(3).long(), "cu_seqlens_q: expected dtype torch.int32, got"),
    ("cu_seqlens_q", torch.zeros(3, device=META).int(), "cu_seqlens_q: expected device cpu"),
]
BAD_VALUES = [
    (
        "seq_lens",
        ints(33, 3),
        "seq_lens: expected 0 to 32 (the table's width), got 33 for sequence 0",
    ),
    (
        "seq_lens",
        ints(20, -1),
        "seq_lens: expected 0 to 32 (the table's width), got -1 for sequence",
    ),
    (
        "seq_lens",
        ints(20, 17),
        "block_table: expected block ids 0 to 2, got -1 for sequence 1",
    ),
    (
        "block_table",
        ints(3, 0, 1, 0).view(2, 2),
        "block_table: expected block ids 0 to 2, got 3",
    ),
    (
        "block_table",
        ints(2, 2**31 - 1, 1, 0).view(2, 2),
        "block_table: expected block ids 0 to 2, got",
    ),
    (
        "block_table",
        ints(2, -(2**31), 1, 0).view(2, 2),
        "block_table: expected block ids 0 to 2, got",
    ),
    ("block_table", ints().view(2, 0), "seq_lens: expected 0 to 0 (the table's width), got 20"),
    ("cu_seqlens_q", ints(1, 4, 5), "cu_seqlens_q: expected to run from 0 to 5, got 1 to 5"),
    ("cu_seqlens_q", ints(0, 4, 6), "cu_seqlens_q: expected to run from 0 to 5, got 0 to 6"),
    ("cu_seqlens_q", ints(0, 6, 5), "cu_seqlens_q: expected no decrease, got one at sequence 1"),
    ("cu_seqlens_q", ints(0, -1, 5), "cu_seqlens_q: expected no decrease, got one at sequence 0"),
]


@pytest.mark.parametrize(
    ("name", "bad", "message"), BAD_SHAPES + BAD_KINDS + BAD_VALUES, ids=lambda x: str(x)[:30]
)
def test_refuses_bad_input(
    name: str, bad: torch.Tensor | None, message: str, records_gradients: bool
) -> None:
    if isinstance(bad, torch.Tensor) and bad.requires_grad and not records_gradients:
        pytest.skip("is accepted then")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.paged_attention(**good_inputs() | {name: bad})


BAD_RULES = [
    ("sinks", torch.zeros(3), "sinks: expected shape [4], got [3]"),
    ("sinks", torch.zeros(4).half(), "sinks: expected dtype torch.float32, got torch.float16"),
    ("sinks", torch.zeros(8)[::2], "sinks: expected stride 1 in the last dimension, got (2,)"),
    ("alibi_slopes", torch.zeros(4, 1), "alibi_slopes: expected shape [4], got [4, 1]"),
    ("alibi_slopes", torch.zeros(4, device=META), "alibi_slopes: expected device cpu, got meta"),
    ("tree_mask", torch.zeros(4).int(), "tree_mask: expected shape [5], got [4]"),
    ("tree_mask", torch.zeros(5).long(), "tree_mask: expected dtype torch.int32, got torch.int64"),
]


@pytest.mark.parametrize(("name", "bad", "message"), BAD_RULES, ids=lambda x: str(x)[:30])
def test_refuses_bad_rules_of_scoring(name: str, bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.paged_attention(**good_inputs(), **{name: bad})


def test_refuses_a_tree_without_a_causal_mask() -> None:
    with pytest.raises(ValueError, match="tree_mask: expected causal=True with a tree mask"):
        kvkernels.paged_attention(**good_inputs(), tree_mask=ints(1, 2, 4, 8, 1), causal=False)


def quantized_cache(kind: str = "int4") -> kvkernels.QuantizedCache:
    return kvkernels.QuantizedPool(kvkernels.KVLayout(1, 2, 32, 16, torch.float32), kind, 3).cache(
        0
    )


BAD_PARTS = [
    (
        "key_codes",
        torch.zeros(3, 2, 16, 32).byte(),
        "key_codes: expected shape [3, 2, 16, 16], got",
    ),
    ("key_codes", torch.zeros(3, 2, 16, 16).char(), "key_codes: expected dtype torch.uint8, got"),
    ("key_codes", torch.zeros(3, 2, 16).byte(), "key_codes: expected shape [3, 2, 16, 16], got"),
    ("key_codes", torch.zeros(3, 2, 16, 32).byte()[..., ::2], "key_codes: expected dense heads"),
    ("key_scales", torch.zeros(2, 2, 1, 32, 2).half(), "key_scales: expected shape [3, 2, any"),
    ("key_scales", torch.zeros(3, 2, 1, 32, 2), "key_scales: expected dtype torch.float16, got"),
    (
        "key_scales",
        torch.zeros(3, 2, 3, 32, 2).half(),
        "key_scales: expected groups that divide 16",
    ),
    (
        "key_scales",
        torch.zeros(3, 2, 0, 32, 2).half(),
        "key_scales: expected groups that divide 16",
    ),
    ("value_codes", torch.zeros(3, 1, 16, 16).byte(), "value_codes: expected shape [3, 2, 16, 16]"),
    ("value_codes", torch.zeros(3, 2, 16, 16, device=META).byte(), "value_codes: expected device"),
    ("value_scales", torch.zeros(3, 2, 16, 5, 2).half(), "value_scales: expected groups that div"),
    (
        "value_scales",
        torch.zeros(3, 2, 16, 1, 4).half()[..., ::2],
        "value_scales: expected dense h",
    ),
]


@pytest.mark.parametrize(("field", "bad", "message"), BAD_PARTS, ids=lambda x: str(x)[:30])
def test_refuses_bad_parts_of_quantized_caches(field: str, bad: torch.Tensor, message: str) -> None:
    cache = quantized_cache()._replace(**{field: bad})
    with pytest.raises(ValueError, match="^int4_cache." + re.escape(message)):
        kvkernels.paged_attention(**good_inputs(), int4_cache=cache)


def test_refuses_parts_of_a_cache_without_their_class() -> None:
    with pytest.raises(ValueError, match="int8_cache: expected a QuantizedCache, got tuple"):
        kvkernels.paged_attention(**good_inputs(), int8_cache=tuple(quantized_cache("int8")))


def test_refuses_a_cache_that_lacks_parts() -> None:
    """Its class makes none such, but tuple does for it."""
    cache = tuple.__new__(kvkernels.QuantizedCache, quantized_cache()[:3])
    with pytest.raises(IndexError):
        kvkernels.paged_attention(**good_inputs(), int4_cache=cache)


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "block_table", "seq_lens"])
def test_refuses_what_is_no_tensor(name: str) -> None:
    inputs = good_inputs()
    inputs[name] = inputs[name].numpy()
    with pytest.raises(ValueError, match=f"^{name}: expected dtype torch"):
        kvkernels.paged_attention(**inputs)


@pytest.mark.parametrize("name", ["query", "key_cache", "block_table", "seq_lens"])
@pytest.mark.parametrize("offset", [0, 64])
def test_refuses_a_tensor_that_has_lost_its_memory(name: str, offset: int) -> None:
    inputs = good_inputs()
    shape = inputs[name].shape
    storage = inputs[name].new_zeros(offset + shape.numel())
    inputs[name] = storage[offset:].view(shape)
    storage.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor with memory of its own"):
        kvkernels.paged_attention(**inputs)


@pytest.mark.parametrize(
    ("kind", "block", "message"),
    [
        (1, 1, "block_table: expected int8 block ids 0 to 0, got 1 for sequence 0"),
        (2, 2, "block_table: expected int4 block ids 0 to 1, got 2 for sequence 0"),
        (3, 0, f"block_table: expected block ids 0 to 2, got {3 << 28} for sequence 0"),
    ],
)
@pytest.mark.parametrize("isa", native.available_isas())
def test_checks_ids_of_every_kind(isa: str, kind: int, block: int, message: str) -> None:
    inputs = good_inputs()
    layout = kvkernels.KVLayout(1, 2, 32, 16, torch.float32)
    caches = {
        f"{name}_cache": kvkernels.QuantizedPool(layout, name, num_blocks).cache(0)
        for name, num_blocks in (("int8", 1), ("int4", 2))
    }
    inputs["block_table"][0, 1] = (kind << 28) | block
    with native.use_isa(isa), pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.paged_attention(**inputs, **caches)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_refuses_a_kind_without_a_cache(kind: str) -> None:
    inputs = good_inputs()
    inputs["block_table"][0] = kvkernels.tag_blocks(inputs["block_table"][0], kind)
    message = f"block_table: expected no {kind} block without such a cache, got one for sequence 0"
    with pytest.raises(ValueError, match=message):
        kvkernels.paged_attention(**inputs)


@pytest.mark.parametrize("isa", native.available_isas())
@pytest.mark.parametrize(("name", "bad", "message"), BAD_VALUES, ids=lambda x: str(x)[:30])
def test_checks_values_before_any_work(
    isa: str, name: str, bad: torch.Tensor, message: str
) -> None:
    with native.use_isa(isa), pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.paged_attention(**good_inputs() | {name: bad})


def test_refuses_heads_without_width() -> None:
    empty = torch.zeros(3, 2, 16, 0)
    with pytest.raises(ValueError, match="key_cache: expected a head_dim of 1 or more, got 0"):
        kvkernels.paged_attention(
            **good_inputs()
            | {"query": torch.zeros(5, 4, 0), "key_cache": empty, "value_cache": empty}
        )


def test_refuses_tokens_without_sequences() -> None:
    none = {"block_table": ints().view(0, 2), "seq_lens": ints(), "cu_seqlens_q": ints(0)}
    message = "query: expected no tokens without sequences, got 5"
    with pytest.raises(ValueError, match="^" + message):
        kvkernels.paged_attention(**good_inputs() | none)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (1, 2, 4, 64)], ids=str)
def test_rules_are_refused_for_queries_of_other_dimensions(shape: tuple[int, ...]) -> None:
    """On a GPU scoring options are checked first, the other inputs only at launch."""
    message = f"query: expected shape [any, any, any], got {list(shape)}"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check_scoring(torch.zeros(shape), None, True, None, None, None, None, None)


@pytest.mark.parametrize("window", [0, -3])
def test_refuses_an_empty_window(window: int) -> None:
    with pytest.raises(
        ValueError, match="window: expected an integer of 1 or more, or None for no window, got"
    ):
        kvkernels.paged_attention(**good_inputs(), window=window)


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache"])
def test_refuses_tangents(name: str) -> None:
    inputs = good_inputs()
    tensor = torch.randn_like(inputs[name])
    with torch.no_grad(), forward_ad.dual_level():
        kvkernels.paged_attention(**inputs)  # found right, so the next call might not be looked at
        dual = forward_ad.make_dual(tensor, torch.randn_like(tensor))
        with pytest.raises(ValueError, match=f"{name}: expected a tensor without a tangent"):
            kvkernels.paged_attention(**inputs | {name: dual})


def test_accepts_queries_that_need_gradients_where_none_are_recorded() -> None:
    query = torch.randn(5, 4, 32, requires_grad=True)
    with torch.no_grad():
        out = kvkernels.paged_attention(**good_inputs() | {"query": query})
    assert not out.requires_grad


def test_ids_before_the_window_may_be_anything() -> None:
    inputs = good_inputs()
    expected = kvkernels.paged_attention(**inputs, window=1)
    inputs["block_table"] = torch.tensor([[-1, 0], [1, -1]], dtype=torch.int32)
    assert torch.equal(
        kvkernels.paged_attention(**inputs | {"cu_seqlens_q": ints(0, 4, 5)}, window=1), expected
    )
    with pytest.raises(ValueError, match="block_table: expected block ids"):
        kvkernels.paged_attention(**inputs, window=2)


def merge_inputs() -> dict[str, torch.Tensor]:
    return {
        "out_a": torch.randn(5, 4, 32),
        "lse_a": torch.randn(5, 4),
        "out_b": torch.randn(5, 4, 32),
        "lse_b": torch.randn(5, 4),
    }


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("out_a", torch.zeros(5, 4), "out_a: expected shape [any, any, any], got [5, 4]"),
        ("out_a", torch.zeros(5, 4, 32).double(), "out_a: expected dtype torch.float32 or"),
        ("out_b", torch.zeros(5, 4, 31), "out_b: expected shape [5, 4, 32], got [5, 4, 31]"),
        ("out_b", torch.zeros(5, 4, 32).half(), "out_b: expected dtype torch.float32, got"),
        ("out_b", torch.zeros(5, 4, 32, device=META), "out_b: expected device cpu, got meta"),
        ("out_b", torch.zeros(4, 5, 32).transpose(0, 1), "out_b: expected a contiguous tensor"),
        ("out_b", torch.zeros(5, 4, 32, requires_grad=True), "out_b: expected a tensor that needs"),
        ("lse_a", torch.zeros(4, 5), "lse_a: expected shape [5, 4], got [4, 5]"),
        ("lse_a", torch.zeros(5, 4).half(), "lse_a: expected dtype torch.float32, got"),
        ("lse_b", torch.zeros(4, 5).mT, "lse_b: expected a contiguous tensor, got (1, 5)"),
        ("lse_b", torch.zeros(5, 4).double(), "lse_b: expected dtype torch.float32, got"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_merge_refuses_bad_input(
    name: str, bad: torch.Tensor, message: str, records_gradients: bool
) -> None:
    if bad.requires_grad and not records_gradients:
        pytest.skip("is accepted then")
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        kvkernels.merge_attention(**merge_inputs() | {name: bad})


@pytest.mark.parametrize("isa", ["avx1024", "", "AVX512"])
def test_refuses_an_unknown_isa(isa: str) -> None:
    before = native._isa
    with pytest.raises(ValueError, match="name: expected one of"), native.use_isa(isa):
        pytest.fail("the body must not run")
    assert native._isa == before


def test_leaves_the_isa_as_it_was() -> None:
    before = native._isa
    with pytest.raises(KeyError), native.use_isa("portable"):
        assert native._isa == 0
        raise KeyError
    assert native._isa == before
