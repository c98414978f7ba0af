"""What attention is timed on: the cases, and the tensors each of them needs."""

from dataclasses import dataclass

import torch

from kvkernels import KVLayout, KVPool

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Case:
    """`num_seqs` sequences of `seq_len` tokens; the last `num_queries` of each are the queries."""

    name: str
    num_seqs: int
    seq_len: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_decode(self) -> bool:
        return self.num_queries == 1

    @property
    def num_kv_elements(self) -> int:
        return 2 * self.num_seqs * self.seq_len * self.num_kv_heads * self.head_dim

    @property
    def num_kv_bytes(self) -> int:
        return self.num_kv_elements * self.dtype.itemsize

    @property
    def num_query_elements(self) -> int:
        """Elements of the queries, as many as of the output."""
        return self.num_seqs * self.num_queries * self.num_heads * self.head_dim

    @property
    def num_scores(self) -> int:
        """Scores of all heads, including those that the causal mask hides."""
        return self.num_seqs * self.num_heads * self.num_queries * self.seq_len

    @property
    def num_flops(self) -> int:
        """Operations of both matrix products, counting only the keys that a query sees."""
        n, queries = self.seq_len, self.num_queries
        pairs = queries * n - queries * (queries - 1) // 2
        return 4 * self.num_seqs * self.num_heads * self.head_dim * pairs


CASES = [
    Case("decode_1x32k", 1, 32768, 1, 32, 8, 128),
    Case("decode_4x8k", 4, 8192, 1, 32, 8, 128),
    Case("decode_32x1k", 32, 1024, 1, 32, 8, 128),
    Case("decode_4x8k_9_3_d64", 4, 8192, 1, 9, 3, 64),
    Case("decode_4x8k_14_2_d64", 4, 8192, 1, 14, 2, 64),
    Case("decode_4x8k_4_1_d256", 4, 8192, 1, 4, 1, 256),
    Case("decode_4x8k_mha_d64", 4, 8192, 1, 8, 8, 64),
    Case("decode_4x8k_fp16", 4, 8192, 1, 32, 8, 128, torch.float16),
    Case("decode_4x4k_fp32", 4, 4096, 1, 32, 8, 128, torch.float32),
    Case("extend_16_of_8k", 1, 8192, 16, 32, 8, 128),
    Case("extend_256_of_8k", 1, 8192, 256, 32, 8, 128),
    Case("extend_512_after_8k", 1, 8704, 512, 32, 8, 128),
    *(
        Case(f"prefill_{length}_d{head_dim}", 1, seq_len, seq_len, 32, 8, head_dim)
        for length, seq_len in (("512", 512), ("2k", 2048), ("8k", 8192))
        for head_dim in (64, 128)
    ),
    Case("prefill_8k_9_3_d64", 1, 8192, 8192, 9, 3, 64),
    Case("prefill_2k_fp32", 1, 2048, 2048, 32, 8, 128, torch.float32),
]

# Decode over more and more tokens: in one sequence, in four, and in a growing number of sequences.
POWERS = (1, 2, 4, 8, 16, 32)
SCALING = {
    "1 sequence": [Case(f"context_1x{n}k", 1, n << 10, 1, 32, 8, 128) for n in POWERS],
    "4 sequences": [Case(f"context_4x{n}k", 4, n << 10, 1, 32, 8, 128) for n in POWERS],
    "sequences of 1k tokens": [Case(f"batch_{n}x1k", n, 1024, 1, 32, 8, 128) for n in POWERS],
}


@dataclass
class Inputs:
    pool: KVPool  # one layer; both caches are views of it
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None  # None for decode, which on a GPU has kernels of its own
    key: torch.Tensor  # [num_seqs, num_kv_heads, seq_len, head_dim], contiguous
    value: torch.Tensor
    mask: torch.Tensor | None  # None where PyTorch's own causal mask is enough, too

    @property
    def queries_by_head(self) -> torch.Tensor:
        """`[num_seqs, num_heads, num_queries, head_dim]`, a view."""
        _, num_heads, head_dim = self.query.shape
        return self.query.view(len(self.seq_lens), -1, num_heads, head_dim).transpose(1, 2)


def make_inputs(case: Case) -> Inputs:
    blocks_per_seq = case.seq_len // BLOCK_SIZE
    layout = KVLayout(1, case.num_kv_heads, case.head_dim, BLOCK_SIZE, case.dtype)
    pool = KVPool(layout, case.num_seqs * blocks_per_seq, torch.get_default_device())
    pool.data.normal_()
    key_cache, value_cache = pool.key_cache(0), pool.value_cache(0)
    block_table = torch.randperm(pool.num_blocks).int().view(case.num_seqs, blocks_per_seq)
    num_tokens = case.num_seqs * case.num_queries
    is_extend = 1 < case.num_queries < case.seq_len
    ones = torch.ones(case.num_queries, case.seq_len, dtype=torch.bool)
    sums = torch.arange(case.num_seqs + 1, dtype=torch.int32) * case.num_queries
    return Inputs(
        pool=pool,
        query=torch.randn(num_tokens, case.num_heads, case.head_dim, dtype=case.dtype),
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32),
        cu_seqlens_q=None if case.is_decode else sums,
        key=gather(key_cache, block_table),
        value=gather(value_cache, block_table),
        mask=ones.tril(case.seq_len - case.num_queries) if is_extend else None,
    )


def gather(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """`[num_seqs, num_kv_heads, seq_len, head_dim]`, contiguous."""
    return cache[block_table.long()].transpose(1, 2).flatten(2, 3).contiguous()
