"""Shared by tests of attention: shapes of batches, and inputs whose unused slots are poisoned."""

from dataclasses import dataclass, field
from typing import Any

import torch

from accuracy import assert_as_accurate
from kvkernels.reference import attention as reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNUSED_ID = 2147480000  # past any cache: reading that block would fault


@dataclass(frozen=True)
class Case:
    """One call: sequences as (number of queries, length)."""

    name: str
    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    block_size: int = 16
    causal: bool = True
    window: int = 0
    layout: str = "pool"
    is_small: bool = True
    extra: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 70))
MIXED = ((1, 40), (3, 3), (0, 9), (5, 37), (17, 33))

CASES = [
    Case("one_key", ((1, 1),), heads=(1, 1)),
    Case("decode", DECODE),
    Case("prefill", ((20, 20), (1, 1), (33, 33))),
    Case("extend", ((5, 37), (16, 48), (2, 17))),
    Case("mixed", MIXED),
    Case("empty_sequences", ((1, 0), (2, 0), (0, 0), (1, 5), (0, 12))),
    Case("queries_before_position_0", ((7, 3), (20, 1), (3, 0))),
    Case("not_causal", ((7, 3), (5, 37), (1, 20)), causal=False),
    Case("window_of_one", MIXED, window=1),
    Case("window_decode", ((1, 70), (1, 33), (1, 3)), window=20),
    Case("window_extend", ((5, 70), (20, 65), (8, 8)), window=17),
    Case("window_not_causal", ((5, 70), (8, 8)), window=9, causal=False),
    Case("window_from_the_last_key_of_64", ((1, 90), (2, 91)), window=27),
    Case("queries_across_the_end_of_64_keys", ((4, 130), (3, 65), (2, 64))),
    Case("window_past_length", ((3, 30),), window=1000),
    Case("group_1", MIXED, heads=(3, 3)),
    Case("group_3", MIXED, heads=(9, 3)),
    Case("group_4", MIXED, heads=(4, 1)),
    Case("group_8", MIXED, heads=(8, 1)),
    Case("heads_20", MIXED, heads=(20, 20)),
    Case("group_7", ((1, 40), (2, 20)), heads=(14, 2)),
    Case("head_dim_72", MIXED, head_dim=72),
    Case("head_dim_80", MIXED, head_dim=80),
    Case("head_dim_96", MIXED, head_dim=96),
    Case("head_dim_128", MIXED, head_dim=128),
    Case("head_dim_192", MIXED, head_dim=192),
    Case("head_dim_256", MIXED, head_dim=256),
    # Sequences with one query have their own kernels; a group's query heads fill several tiles.
    Case("decode_group_40", DECODE, heads=(40, 1)),
    Case("decode_d72", DECODE, head_dim=72),
    Case("decode_d80", DECODE, head_dim=80),
    Case("decode_d96", DECODE, head_dim=96, block_size=32),
    Case("decode_d128", DECODE, head_dim=128, block_size=64),
    Case("decode_d192", DECODE, head_dim=192, block_size=128),
    Case("decode_d256", DECODE, head_dim=256, block_size=256),
    Case("group_40", ((1, 9), (3, 7)), heads=(40, 1)),
    Case("block_32", MIXED, block_size=32),
    Case("block_64", MIXED, block_size=64),
    Case("block_128", ((1, 200), (5, 129)), block_size=128),
    Case("block_256", ((1, 300), (5, 256)), block_size=256),
    Case("tokens_first", MIXED, layout="tokens_first"),
    Case("dense", MIXED, layout="dense"),
    Case("values_lie_otherwise", MIXED, layout="keys_tokens_first"),
    # Sizes at which the CPU kernels take other paths: many rows, several chunks of keys, several
    # tiles of rows.
    Case("many_rows", ((100, 100), (33, 210)), heads=(4, 2), is_small=False),
    Case("many_rows_group_3", ((70, 130),), heads=(9, 3), block_size=64, is_small=False),
    Case("many_rows_d80", ((90, 90),), head_dim=80, is_small=False),
    Case("many_rows_d256", ((60, 90),), head_dim=256, is_small=False),
    Case("many_rows_window", ((150, 400),), heads=(2, 1), window=45, is_small=False),
    Case("many_rows_not_causal", ((50, 170),), causal=False, is_small=False),
    Case("many_chunks", ((1, 5000), (1, 1300), (1, 255)), heads=(2, 1), is_small=False),
    Case("many_chunks_d128", ((1, 2000),), heads=(8, 2), head_dim=128, is_small=False),
    Case("many_chunks_extend", ((3, 3000), (40, 7000)), heads=(2, 1), is_small=False),
    Case("many_chunks_window", ((1, 3000), (4, 2500)), heads=(2, 1), window=1030, is_small=False),
    Case("rows_5_to_7", ((5, 90), (6, 80), (7, 70)), heads=(2, 2), is_small=False),
    # Few rows, but more than in decode with small groups, and several tiles of keys.
    Case("rows_5_d32", ((1, 150), (1, 300)), heads=(5, 1), head_dim=32, is_small=False),
    Case("rows_7", ((1, 700), (1, 129), (1, 128)), heads=(14, 2), block_size=64, is_small=False),
    Case("rows_8_d96", ((2, 260), (2, 33)), heads=(4, 1), head_dim=96, is_small=False),
    Case("rows_16_d128", ((2, 400), (1, 70)), heads=(8, 1), head_dim=128, is_small=False),
    Case("rows_8_d160", ((1, 300),), heads=(8, 1), head_dim=160, is_small=False),
    Case("rows_8_window", ((1, 700), (2, 300)), heads=(8, 2), window=100, is_small=False),
    Case("huge_block", ((1, 900), (4, 700)), block_size=1024, is_small=False),
]
# Only the portable CPU kernels serve these.
ODD_CASES = [
    Case("head_dim_1", MIXED, head_dim=1),
    Case("head_dim_7", MIXED, head_dim=7),
    Case("head_dim_24", MIXED, head_dim=24),
    Case("head_dim_288", ((1, 40), (12, 30)), head_dim=288),
    Case("block_1", MIXED, block_size=1),
    Case("block_7", MIXED, block_size=7),
]


@dataclass
class Inputs:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None

    def tensors(self, dtype: torch.dtype | None = None) -> tuple:
        """The tensors in the order of the ops' arguments, floats as `dtype`."""
        floats = (self.query, self.key_cache, self.value_cache)
        if dtype is not None:
            floats = tuple(tensor.to(dtype) for tensor in floats)
        return (*floats, self.block_table, self.seq_lens, self.cu_seqlens_q)


def make_cache(case: Case, num_blocks: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """Two caches in which every slot is NaN (keys) or infinite (values); unused ones stay so."""
    heads, width, slots = case.heads[1], case.head_dim, case.block_size
    if case.layout == "dense":
        shape = (num_blocks, heads, slots, width)
        key, value = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    elif case.layout == "tokens_first":
        data = torch.empty(num_blocks, slots, 2, heads, width, dtype=dtype, device=device)
        key, value = (data[:, :, side].transpose(1, 2) for side in range(2))
    elif case.layout == "keys_tokens_first":
        key = torch.empty(num_blocks, slots, heads, width, dtype=dtype, device=device)
        key, value = key.transpose(1, 2), torch.empty_like(key.transpose(1, 2).contiguous())
    else:
        data = torch.empty(num_blocks, 2, 2, heads, slots, width, dtype=dtype, device=device)
        key, value = data[:, 1, 0], data[:, 1, 1]
    return key.fill_(torch.nan), value.fill_(torch.inf)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    num_heads, num_kv_heads = case.heads
    lens = [length for _, length in case.sequences]
    counts = [count for count, _ in case.sequences]
    needed = [-(-length // case.block_size) for length in lens]
    num_blocks = sum(needed) + 2  # two stay unused
    free = torch.randperm(num_blocks).tolist()
    key_cache, value_cache = make_cache(case, num_blocks, dtype, device)
    block_table = torch.full((len(lens), max(needed) + 2), UNUSED_ID, dtype=torch.int32)
    block_table[:, -1] = -1
    for seq, (count, length) in enumerate(case.sequences):
        # Blocks wholly before the window of the first query, and all of a sequence without
        # queries, are never read.
        first_seen = max(0, length - count - case.window + 1) if case.window else 0
        for index in range(needed[seq]):
            begin = index * case.block_size
            end = min(length, begin + case.block_size)
            if count == 0 or end <= first_seen // case.block_size * case.block_size:
                continue
            block = free.pop()
            block_table[seq, index] = block
            shape = (num_kv_heads, end - begin, case.head_dim)
            key_cache[block, :, : end - begin] = torch.randn(shape).to(dtype).to(device)
            value_cache[block, :, : end - begin] = torch.randn(shape).to(dtype).to(device)
    cu_seqlens_q = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int()
    query = torch.randn(sum(counts), num_heads + 1, case.head_dim).to(dtype)[:, 1:]
    return Inputs(
        query.to(device),
        key_cache,
        value_cache,
        block_table.to(device),
        torch.tensor(lens, dtype=torch.int32, device=device),
        None if set(counts) == {1} else cu_seqlens_q.to(device),
    )


def assert_attends(
    out: torch.Tensor, lse: torch.Tensor, inputs: Inputs, *arguments: Any, **options: Any
) -> None:
    """Compare a result with the reference's, which gets the same arguments after the tensors."""
    exact = reference.paged_attention(*inputs.tensors(torch.float64), *arguments, **options)
    rounded = reference.paged_attention(*inputs.tensors(), *arguments, **options)
    assert_as_accurate(out, rounded[0], exact[0], "out")
    assert_as_accurate(lse, rounded[1], exact[1], "lse")
