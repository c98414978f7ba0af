"""Correctness checks that must pass on a device before its timings mean anything; no pytest."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

import kvkernels
from accuracy import assert_as_accurate
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.reference import attention as reference
from kvkernels.reference import kv_cache as reference_kv_cache
from kvkernels.reference.quantize import quantize_keys, quantize_values
from kvkernels.scoring import Scoring
from kvkernels.transfer import BlockTransfer, routes

DEVICE = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Sequences as (number of queries, length).
DECODE = ((1, 9000), (1, 1), (1, 0), (1, 700), (1, 64))
TREES = ((7, 900), (16, 16), (1, 3000), (12, 100))
MIXED = ((512, 512), (1, 3000), (100, 1500), (0, 50), (3, 3))


def make_inputs(
    sequences: tuple[tuple[int, int], ...],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """Query, caches, table, lengths and running sums; unused slots are NaN."""
    counts = torch.tensor([count for count, _ in sequences])
    lens = torch.tensor([length for _, length in sequences])
    width = -(-int(lens.max()) // block_size)
    # The blocks of a sequence are scattered, and two belong to none.
    table = torch.randperm(len(sequences) * width + 2)[:-2].view(len(sequences), width)
    shape = (len(sequences) * width + 2, heads[1], block_size, head_dim)
    caches = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]
    positions = torch.arange(width * block_size).view(width, block_size)
    is_used = torch.zeros(shape[0], block_size, dtype=torch.bool)
    for seq, length in enumerate(lens.tolist()):
        is_used[table[seq]] = positions < length
    unused = ~is_used.to(DEVICE)[:, None, :, None]
    for cache in caches:
        cache.masked_fill_(unused, torch.nan)
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    query = torch.randn(int(counts.sum()), heads[0], head_dim, device=DEVICE).to(dtype)
    return (query, *caches, *(ints.int().to(DEVICE) for ints in (table, lens, sums)))


def quantize(
    keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lens: torch.Tensor, kind: str
) -> tuple[torch.Tensor, dict[str, QuantizedCache]]:
    """A table that names every other full block by its quantised copy, and those copies.

    The blocks that have a copy are NaN afterwards.
    """
    block_size, value_dim = keys.shape[2], values.shape[3]
    bits, group = (8, 1 << 30) if kind == "int8" else (4, 32)
    cache = QuantizedCache(
        *quantize_keys(keys.nan_to_num(), bits, -(-block_size // group)),
        *quantize_values(values.nan_to_num(), bits, -(-value_dim // group)),
    )
    index = torch.arange(table.shape[1], device=DEVICE)
    chosen = (index % 2 == 0) & ((index + 1) * block_size <= lens[:, None])
    copied = table[chosen].long()
    keys[copied], values[copied] = torch.nan, torch.nan
    return torch.where(chosen, tag_blocks(table, kind), table), {f"{kind}_cache": cache}


def make_rules(rules: tuple[str, ...], num_heads: int, counts: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of `paged_attention` for the named rules."""
    made: dict[str, Any] = {}
    if "soft_cap" in rules:
        made["soft_cap"] = 5.0
    if "sinks" in rules:
        made["sinks"] = torch.randn(num_heads, device=DEVICE)
    if "alibi" in rules:
        made["alibi_slopes"] = torch.rand(num_heads, device=DEVICE) / 8
    if "tree" in rules:  # every token sees itself and every second one before it
        depths = torch.cat([torch.arange(count) for count in counts.tolist()])
        bits = [sum(1 << bit for bit in range(depth, -1, -2)) for depth in depths.tolist()]
        made["tree_mask"] = torch.tensor(bits, dtype=torch.int32, device=DEVICE)
    return made


def check_attention(
    sequences: tuple[tuple[int, int], ...],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int = 0,
    rules: tuple[str, ...] = (),
    kind: str = "",
    value_dim: int = 0,
    batch_invariant: bool = False,
) -> None:
    """Check that attention is as accurate as the reference, and gives the same bits again."""
    query, keys, values, table, lens, sums = make_inputs(
        sequences, heads, head_dim, block_size, dtype
    )
    if value_dim:
        values = keys[..., :value_dim]
    caches: dict[str, QuantizedCache] = {}
    wide_cache = narrow_cache = (keys, values)
    if kind == "float8":
        narrow_cache = tuple(cache.to(torch.float8_e4m3fn) for cache in (keys, values))
        wide_cache = tuple(cache.to(dtype) for cache in narrow_cache)
    elif kind:
        table, caches = quantize(keys, values, table, lens, kind)
    is_decode = all(count == 1 for count, _ in sequences)
    arguments = (table, lens, None if is_decode else sums)
    made = make_rules(rules, heads[0], sums.diff().cpu())

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        return kvkernels.paged_attention(
            *(query, *narrow_cache, *arguments),
            **(made | caches),
            window=window or None,
            return_lse=True,
            batch_invariant=batch_invariant,
        )

    options = (Scoring(head_dim**-0.5, True, window, **made), True)
    doubles = (tensor.double() for tensor in (query, *wide_cache))
    exact = reference.paged_attention(*doubles, *arguments, *options, **caches)
    rounded = reference.paged_attention(query, *wide_cache, *arguments, *options, **caches)
    out, lse = call()
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")
    for _ in range(3):
        assert all(map(torch.equal, (out, lse), call())), "other bits at a second call"


def check_invariance() -> None:
    """Check that with `batch_invariant` a sequence gets the same bits alone and in a batch."""
    query, keys, values, table, lens, _ = make_inputs(DECODE, (32, 8), 128, 64, BF16)
    together = kvkernels.paged_attention(query, keys, values, table, lens, batch_invariant=True)
    for seq in range(len(DECODE)):
        one = slice(seq, seq + 1)
        alone = kvkernels.paged_attention(
            query[one], keys, values, table[one], lens[one], batch_invariant=True
        )
        assert torch.equal(alone, together[one]), f"other bits in sequence {seq}"


def check_graph() -> None:
    """Check that a captured decode stays right when lengths, tables, queries and caches change."""
    shape = ((32, 8), 128, 64, BF16)
    captured = make_inputs(((1, 5000),) * 4, *shape)[:5]
    kvkernels.paged_attention(*captured)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kvkernels.paged_attention(*captured)
    for sequences in (((1, 5000), (1, 1), (1, 0), (1, 64)), ((1, 70),) * 3 + ((1, 4999),)):
        fresh = make_inputs(sequences, *shape)[:5]
        for old, new in zip(captured, fresh, strict=True):
            # Table entries past the shorter sequences keep their old values.
            old[tuple(slice(size) for size in new.shape)].copy_(new)
        graph.replay()
        assert torch.equal(out, kvkernels.paged_attention(*captured)), "a replay differs"


def check_merge() -> None:
    """Check that merged halves are as accurate as the reference's merge."""
    for dtype in (BF16, FP32):
        outs = [torch.randn(300, 32, 128, device=DEVICE).to(dtype) for _ in range(2)]
        lses = [5 * torch.randn(300, 32, device=DEVICE) for _ in range(2)]
        lses[0][:10] = -torch.inf
        lses[1][5:20] = -torch.inf
        arguments = (outs[0], lses[0], outs[1], lses[1])
        exact = reference.merge_attention(*(tensor.double() for tensor in arguments))
        rounded = reference.merge_attention(*arguments)
        for got, plain, want in zip(
            kvkernels.merge_attention(*arguments), rounded, exact, strict=True
        ):
            assert_as_accurate(got, plain, want, "merge")


def check_store() -> None:
    """Check that exactly the named slots are written."""
    for dtype in (BF16, FP32):
        key, value = (torch.randn(500, 8, 128, device=DEVICE).to(dtype) for _ in range(2))
        slots = torch.randperm(64 * 20, device=DEVICE)[:500]
        slots[3] = -1
        caches = [torch.full((20, 8, 64, 128), 7, dtype=dtype, device=DEVICE) for _ in range(2)]
        expected = [cache.clone() for cache in caches]
        kvkernels.store_kv(key, value, *caches, slots)
        reference_kv_cache.store_kv(key, value, *expected, slots)
        assert all(map(torch.equal, caches, expected)), f"store_kv: other bytes in {dtype}"


def check_codec(codec: str, layout: KVLayout) -> None:
    """Check that CPU and GPU encode the same bytes, to either memory, and decode them alike."""
    here, there = KVPool(layout, 6), KVPool(layout, 6, DEVICE)
    here.data.normal_()
    here.data[:, :, 0] += 100 * torch.randn(6, 3, layout.num_kv_heads, 1, layout.head_dim)
    here.data[2, 1, 0, -1, 3, 5] = torch.inf  # most codecs cannot hold it, so the block is raw
    there.data.copy_(here.data)
    ids = torch.tensor([5, 2, 0, 3])
    block_format = BlockFormat(layout, codec)
    expected = kvkernels.encode_blocks(here, ids, block_format)
    kvkernels.decode_blocks(expected, here, ids)
    pinned = torch.empty(expected.payloads.shape, dtype=torch.uint8, pin_memory=True)
    for payloads, num_programs in ((None, None), (pinned, None), (None, 3)):
        encoded = kvkernels.encode_blocks(
            there, ids.to(DEVICE), block_format, payloads=payloads, num_programs=num_programs
        )
        target = KVPool(layout, 6, DEVICE)
        is_good = kvkernels.decode_blocks(
            encoded, target, ids.to(DEVICE), num_programs=num_programs
        )
        torch.cuda.synchronize()  # before pinned memory is looked at
        assert is_good.all(), f"{codec}: a layer with other sums than it was written with"
        assert torch.equal(encoded.is_raw.cpu(), expected.is_raw), f"{codec}: other blocks are raw"
        assert torch.equal(encoded.sums.cpu(), expected.sums), f"{codec}: other sums"
        for index in range(len(ids)):
            payload = encoded.payload(index).cpu()
            assert torch.equal(payload, expected.payload(index)), f"{codec}: other bytes"
        got, want = (pool.data[ids.to(pool.device)].cpu() for pool in (target, here))
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), f"{codec}: other blocks"
    broken = encoded.payloads.clone()
    broken[1, 7] ^= 1
    wrong = EncodedBlocks(block_format, broken, encoded.sums, encoded.is_raw)
    is_good = kvkernels.decode_blocks(wrong, target, ids.to(DEVICE))
    assert is_good.sum() == is_good.numel() - 1 and not is_good[1, 0], f"{codec}: missed a flip"


def check_codecs(codec: str) -> None:
    for dtype in (BF16, FP16, FP32):
        if codec == "l12" and dtype != BF16:
            continue
        for head_dim, block_size in ((128, 64), (80, 16), (256, 256)):
            check_codec(codec, KVLayout(3, 2, head_dim, block_size, dtype))
        check_codec(codec, KVLayout(3, 1, 576, 64, dtype, latent_dim=512))


def check_transfer(codec: str, is_staged: bool) -> None:
    """Check evicting beside a stream that overwrites the blocks, and restoring some layers or all.

    Restores pass through buffers of two blocks, so that each buffer is reused.
    """
    layout = KVLayout(6, 4, 128, 64, BF16)
    pool, target = (KVPool(layout, 64, DEVICE) for _ in range(2))
    block_format = BlockFormat(layout, codec)
    ids = torch.arange(0, 64, 8)
    outwards = BlockTransfer(pool, num_slots=16, headroom=256, is_staged=is_staged, num_programs=12)
    with mock.patch.object(routes, "STAGE_BYTES", 2 * layout.block_bytes):
        inwards = BlockTransfer(target)
    for seed in range(20):
        torch.manual_seed(seed)
        numbers = torch.randn(pool.data.shape, device=DEVICE, dtype=BF16)
        numbers[8, 2, 0, 1, 3, 5] = torch.inf  # raw: longer than the others
        pool.data.copy_(numbers)
        with outwards.evict(ids, block_format, outwards.mark()) as eviction:
            encoded = eviction.wait()
            pool.data.fill_(torch.nan)  # the transfer no longer reads them
            target.data.fill_(torch.nan)
            step = (2, 5, None)[seed % 3]
            restoration = inwards.restore(encoded, ids, layers_per_step=step, after=inwards.mark())
            for layer in range(layout.num_layers):
                restoration.wait_layer(layer)
                got = target.data[ids.to(DEVICE), layer]
                assert not got.isnan().any(), f"{codec}: layer {layer} was read before it came"
            assert restoration.wait().all(), f"{codec}: a layer with other sums"
        pool.data.copy_(numbers)
        direct = kvkernels.encode_blocks(pool, ids.to(DEVICE), block_format)
        kvkernels.decode_blocks(direct, pool, ids.to(DEVICE))
        got, want = (one.data[ids.to(DEVICE)].view(torch.int16) for one in (target, pool))
        assert torch.equal(got, want), f"{codec}: other blocks"
    outwards.close()
    inwards.close()


CHECKS: dict[str, Callable[[], Any]] = {
    "store": check_store,
    "merge": check_merge,
    "decode_bf16": partial(check_attention, DECODE, (32, 8), 128, 64, BF16),
    "decode_fp16_d64": partial(check_attention, DECODE, (9, 3), 64, 64, FP16),
    "decode_fp32_d256": partial(check_attention, DECODE, (8, 1), 256, 16, FP32),
    "decode_bf16_d80": partial(check_attention, DECODE, (40, 1), 80, 16, BF16),
    "decode_bf16_d192": partial(check_attention, DECODE, (4, 4), 192, 128, BF16),
    "decode_window": partial(check_attention, DECODE, (32, 8), 128, 64, BF16, window=1000),
    "decode_200": partial(check_attention, ((1, 40),) * 199 + ((1, 6000),), (8, 2), 128, 64, BF16),
    "mixed_bf16": partial(check_attention, MIXED, (32, 8), 128, 64, BF16),
    "mixed_fp16_d64": partial(check_attention, MIXED, (9, 3), 64, 64, FP16),
    "mixed_fp32": partial(check_attention, MIXED, (8, 2), 128, 64, FP32),
    "mixed_bf16_d96": partial(check_attention, MIXED, (8, 2), 96, 32, BF16),
    "mixed_bf16_d256": partial(check_attention, MIXED, (8, 2), 256, 256, BF16),
    "mixed_window": partial(check_attention, MIXED, (32, 8), 128, 16, BF16, window=300),
    "decode_rules": partial(
        check_attention, DECODE, (32, 8), 128, 64, BF16, 1000, ("soft_cap", "sinks", "alibi")
    ),
    "mixed_rules": partial(
        check_attention, MIXED, (32, 8), 128, 64, BF16, 300, ("soft_cap", "sinks", "alibi")
    ),
    "tree": partial(check_attention, TREES, (32, 8), 128, 64, BF16, rules=("tree",)),
    "decode_float8": partial(check_attention, DECODE, (32, 8), 128, 64, BF16, kind="float8"),
    "mixed_float8": partial(check_attention, MIXED, (32, 8), 128, 64, BF16, kind="float8"),
    "decode_int8": partial(check_attention, DECODE, (32, 8), 128, 64, BF16, kind="int8"),
    "mixed_int8": partial(check_attention, MIXED, (32, 8), 128, 64, BF16, kind="int8"),
    "decode_int4": partial(check_attention, DECODE, (32, 8), 128, 64, BF16, kind="int4"),
    "decode_int4_fp16": partial(check_attention, DECODE, (9, 3), 64, 32, FP16, kind="int4"),
    "mixed_int4": partial(check_attention, MIXED, (32, 8), 128, 64, BF16, kind="int4"),
    "decode_mla": partial(check_attention, DECODE, (128, 1), 576, 64, BF16, value_dim=512),
    "mixed_mla": partial(check_attention, MIXED, (16, 1), 576, 64, BF16, value_dim=512),
    "decode_invariant": partial(
        check_attention, DECODE, (32, 8), 128, 64, BF16, batch_invariant=True
    ),
    "invariance": check_invariance,
    "graph": check_graph,
    "transfer": partial(check_transfer, "q8", False),
    "transfer_staged": partial(check_transfer, "q4", True),
} | {f"codec_{codec}": partial(check_codecs, codec) for codec in CODECS}
