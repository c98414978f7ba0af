"""Soft caps, sinks, ALiBi, tree masks, latent heads, float8 and quantised blocks match the
reference in every implementation."""

from __future__ import annotations

import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from attention_inputs import (
    DECODE,
    DTYPES,
    MIXED,
    Case,
    Inputs,
    assert_attends,
    make_inputs,
)
from implementations import Implementation, every_implementation

from accuracy import assert_as_accurate
from kvkernels.layout import KVLayout
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.quantized_pool import QuantizedPool
from kvkernels.reference import attention as reference
from kvkernels.reference.quantize import quantize_keys, quantize_values
from kvkernels.scoring import Scoring

LONG = ((1, 700), (5, 300), (40, 333))
TREES = ((5, 40), (1, 17), (16, 16), (7, 60))


@dataclass(frozen=True)
class Feature:
    """A call that uses some of the features; the rest as `Case` says."""

    name: str
    case: Case
    soft_cap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    tree: bool = False
    value_dim: int = 0  # for latent heads, whose values are the first channels of the keys
    kinds: tuple[str, ...] = ()  # kinds of blocks, in turn

    def __str__(self) -> str:
        return self.name


def _features() -> list[Feature]:
    """Each feature in decode and in mixed batches, and all together."""
    decode, mixed = Case("", DECODE, head_dim=64), Case("", MIXED, head_dim=64)
    long = Case("", LONG, heads=(6, 2), head_dim=64, block_size=64, is_small=False)
    found = []
    for name, options in {
        "soft_cap": {"soft_cap": 2.0},
        "sinks": {"sinks": True},
        "alibi": {"alibi": True},
        "int8": {"kinds": ("int8",)},
        "int4": {"kinds": ("int4",)},
        "kinds": {"kinds": ("int4", "float", "int8")},
        "all": {"soft_cap": 3.0, "sinks": True, "alibi": True, "kinds": ("int8", "int4", "float")},
    }.items():
        found += [
            Feature(f"{name}_decode", decode, **options),
            Feature(f"{name}_mixed", mixed, **options),
            Feature(f"{name}_long", long, **options),
        ]
    window = replace(mixed, window=19)
    found += [
        Feature("all_window", window, 3.0, True, True, kinds=("int8", "float", "int4")),
        Feature("not_causal", replace(mixed, causal=False), 3.0, True, True, kinds=("int4",)),
        Feature("soft_cap_far_off", mixed, soft_cap=3e4),
        Feature("d80", replace(mixed, head_dim=80, block_size=32), 3.0, True, kinds=("int4",)),
        Feature("d128", replace(decode, head_dim=128, heads=(8, 2)), kinds=("int4", "int8")),
        Feature("d128_mixed", replace(mixed, head_dim=128, heads=(8, 2)), kinds=("int4", "int8")),
        Feature("d256", replace(decode, head_dim=256, heads=(4, 1)), kinds=("int4", "int8")),
        Feature("d256_long", replace(long, head_dim=256, heads=(4, 1)), kinds=("int4", "int8")),
        # A single query sees an odd number of keys of the first block.
        Feature("int8_window", replace(long, window=149), kinds=("int8",)),
        Feature("int4_window", replace(long, window=149), kinds=("int4",)),
        Feature("int8_b128", replace(long, block_size=128), kinds=("int8",)),
        Feature("int4_b128", replace(long, block_size=128), kinds=("int4",)),
        Feature("group_9_b64", replace(long, heads=(9, 1), head_dim=128), kinds=("int4", "int8")),
        Feature("heads_8", replace(long, heads=(32, 8), head_dim=128), kinds=("int4", "int8")),
        Feature("group_5_b64", replace(long, heads=(5, 1)), kinds=("int8", "float", "int4")),
        Feature("group_8_b64", replace(long, heads=(16, 2), head_dim=128), kinds=("int4", "int8")),
        Feature("tokens_first", replace(mixed, layout="tokens_first"), kinds=("int4", "float")),
        Feature("d72", replace(mixed, head_dim=72), kinds=("int4", "int8")),
        Feature("d96", replace(mixed, head_dim=96), kinds=("int4", "int8")),
        Feature("all_few_rows", replace(long, heads=(8, 1)), 3.0, True, True),
        Feature("few_rows_int8", replace(long, heads=(12, 1)), kinds=("int8", "float")),
        Feature("tree", Case("", TREES), tree=True),
        Feature("tree_few_rows", Case("", ((4, 200), (8, 150)), is_small=False), tree=True),
        Feature("tree_d128", Case("", TREES, heads=(8, 2), head_dim=128), tree=True),
        Feature("tree_window", Case("", TREES, window=6), tree=True),
        # Tokens deep in the tree see no key in the first tile, or in the last chunk.
        Feature("tree_window_edge", Case("", ((6, 80),), window=12), tree=True),
        Feature("tree_of_more_than_there_are", Case("", ((5, 3), (2, 1), (7, 0))), tree=True),
        Feature("tree_chunks", Case("", ((16, 1030),), is_small=False), tree=True),
        Feature("tree_all", Case("", TREES, window=21), 2.0, True, True, True, kinds=("int8",)),
        Feature("empty", Case("", ((1, 0), (2, 0), (1, 5), (3, 2))), sinks=True),
        Feature("mla_decode", Case("", DECODE, heads=(20, 1), head_dim=96), value_dim=64),
        Feature("mla_mixed", Case("", MIXED, heads=(5, 1), head_dim=96), value_dim=64),
        Feature(
            "mla_576",
            Case("", ((1, 130), (2, 70)), heads=(16, 1), head_dim=576, block_size=64),
            value_dim=512,
        ),
        Feature("mla_int8", Case("", MIXED, heads=(5, 1), head_dim=96), value_dim=64,
                kinds=("int8", "float")),
    ]  # fmt: skip
    return found


FEATURES = _features()


def random_trees(sequences: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Each new token sees itself, a random earlier one of its sequence, and what that sees."""
    masks = []
    for count, _ in sequences:
        tree: list[int] = []
        for index in range(count):
            parent = int(torch.randint(-1, index, ()).item()) if index else -1
            tree.append((1 << index) | (tree[parent] if parent >= 0 else 0))
        # Bits of tokens that the sequence does not have are ignored.
        masks += [mask | (1 << count) for mask in tree]
    return torch.tensor(masks, dtype=torch.int32)


def make_scoring(feature: Feature, device: torch.device) -> Scoring:
    case = feature.case
    num_heads = case.heads[0]
    return Scoring(
        case.head_dim**-0.5,
        case.causal,
        case.window,
        feature.soft_cap,
        torch.randn(num_heads, device=device) if feature.sinks else None,
        torch.rand(num_heads, device=device) / 4 if feature.alibi else None,
        random_trees(case.sequences).to(device) if feature.tree else None,
    )


def quantize_some(
    inputs: Inputs, kinds: tuple[str, ...], head_dim: int, value_dim: int
) -> dict[str, QuantizedCache]:
    """Replace whole used blocks by quantised ones, kinds in turn; poison the quantised pools' rest.

    The quantised blocks are NaN in the caches afterwards.
    """
    num_blocks, num_kv_heads, block_size, _ = inputs.key_cache.shape
    caches = {}
    for kind in ("int8", "int4"):
        layouts = [KVLayout(2, num_kv_heads, width, block_size) for width in (head_dim, value_dim)]
        keys, values = (QuantizedPool(layout, kind, num_blocks + 1) for layout in layouts)
        for pool in (keys, values):
            pool.data.fill_(255)  # scales of NaN
        caches[kind] = QuantizedCache(*keys.cache(1)[:2], *values.cache(1)[2:])
    table, lens = inputs.block_table, inputs.seq_lens.tolist()
    turn = 0
    for seq, length in enumerate(lens):
        for index in range(length // block_size):
            block = int(table[seq, index])
            if not 0 <= block < num_blocks:  # unused table entry
                continue
            kind = kinds[turn % len(kinds)]
            turn += 1
            if kind == "float":
                continue
            cache, target = caches[kind], num_blocks - block
            bits = 8 if kind == "int8" else 4
            parts = (
                *quantize_keys(inputs.key_cache[block].cpu(), bits, cache.key_scales.shape[2]),
                *quantize_values(
                    inputs.value_cache[block].cpu(), bits, cache.value_scales.shape[3]
                ),
            )
            for whole, part in zip(cache, parts, strict=True):
                whole[target] = part
            inputs.key_cache[block] = torch.nan
            inputs.value_cache[block] = torch.nan
            table[seq, index] = tag_blocks(torch.tensor(target, dtype=torch.int32), kind)
    device = table.device
    return {
        f"{kind}_cache": QuantizedCache(*(_like(part, device) for part in cache))
        for kind, cache in caches.items()
    }


def _like(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same strides on another device."""
    if part.device == device:
        return part
    moved = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device)
    return moved.copy_(part)


def check(implementation: Implementation, feature: Feature, dtype: torch.dtype, device) -> None:
    inputs = make_inputs(feature.case, dtype, device)
    if feature.value_dim:
        inputs.value_cache = inputs.key_cache[..., : feature.value_dim]
    caches = {}
    if feature.kinds:
        width = feature.case.head_dim
        caches = quantize_some(inputs, feature.kinds, width, feature.value_dim or width)
    scoring = make_scoring(feature, device)
    out, lse = implementation.paged_attention(*inputs.tensors(), scoring, True, **caches)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_attends(out, lse, inputs, scoring, True, **caches)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_matches_reference(
    implementation: Implementation, feature: Feature, dtype: torch.dtype, device: torch.device
) -> None:
    # One 16-bit dtype is enough: the other runs the same code.
    if implementation.is_slow and (not feature.case.is_small or dtype == torch.float16):
        pytest.skip("too long for the interpreter")
    check(implementation, feature, dtype, device)


@every_implementation()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
def test_float8_caches_are_read_as_what_they_hold(
    implementation: Implementation, sequences: tuple, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(Case("", sequences), dtype, device)
    caches = (inputs.key_cache, inputs.value_cache)
    # float8 has no infinity; unused slots are NaN.
    narrow = [cache.nan_to_num(torch.nan, torch.nan).to(torch.float8_e4m3fn) for cache in caches]
    tensors = (inputs.block_table, inputs.seq_lens, inputs.cu_seqlens_q)
    scoring = Scoring(0.125)
    wide = [cache.to(torch.float64) for cache in narrow]
    exact = reference.paged_attention(inputs.query.double(), *wide, *tensors, scoring, True)
    plain = [cache.to(dtype) for cache in narrow]
    rounded = reference.paged_attention(inputs.query, *plain, *tensors, scoring, True)
    out, lse = implementation.paged_attention(inputs.query, *narrow, *tensors, scoring, True)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")


@every_implementation()
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_codes_past_two_to_the_31_bytes(
    implementation: Implementation, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    if implementation.is_slow:
        pytest.skip("the interpreter copies the whole cache")
    # On a CPU only touched pages take memory.
    layout = KVLayout(1, 1, 128, 256, dtype)
    block_bytes = QuantizedPool(layout, kind, 1).layer_bytes
    pool = QuantizedPool(layout, kind, (5 << 30) // block_bytes, device)
    last = pool.num_blocks - 1
    far = pool.cache(0)
    parts = (
        *quantize_keys(torch.randn(1, 256, 128), pool.num_bits, far.key_scales.shape[2]),
        *quantize_values(torch.randn(1, 256, 128), pool.num_bits, far.value_scales.shape[3]),
    )
    for whole, part in zip(far, parts, strict=True):
        whole[last] = part.to(device)
    near = QuantizedCache(*(_like(part[last:], device) for part in far))
    query = torch.randn(3, 2, 128, device=device).to(dtype)
    unused = query.new_zeros(1, 1, 256, 128)
    ints = {"dtype": torch.int32, "device": device}
    lens, sums = (torch.tensor(values, **ints) for values in ([256], [0, 3]))
    got, expected = (
        implementation.paged_attention(
            *(query, unused, unused, tag_blocks(torch.tensor([[block]], **ints), kind)),
            *(lens, sums, Scoring(128**-0.5), True),
            **{f"{kind}_cache": cache},
        )
        for block, cache in ((last, far), (0, near))
    )
    assert all(map(torch.equal, got, expected))


@every_implementation()
def test_a_sink_of_minus_infinity_is_none(
    implementation: Implementation, device: torch.device
) -> None:
    # Also for queries that see no key: an empty sequence, and queries before position 0.
    inputs = make_inputs(Case("", ((1, 0), (1, 700), (5, 20), (7, 3))), torch.float32, device)
    plain, sinks = Scoring(0.125), torch.full((4,), -torch.inf, device=device)
    out, lse = implementation.paged_attention(*inputs.tensors(), plain, True)
    again = implementation.paged_attention(*inputs.tensors(), plain._replace(sinks=sinks), True)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_the_documented_example_of_quantised_blocks_is_accurate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = Path(__file__).parents[2] / "docs" / "quantized_blocks.py"
    runpy.run_path(str(path), run_name="__main__")
    line = capsys.readouterr().out
    assert float(line.split("differs by ")[1].rstrip("%\n")) < 2
