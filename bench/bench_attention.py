"""paged_attention beside PyTorch's attention over contiguous keys and values."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import kvkernels
from bench.harness import check_agreement, make_cold, run_case

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Case:
    """`num_seqs` sequences of `seq_len` tokens, of which the last `num_queries` ask."""

    name: str
    num_seqs: int
    seq_len: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_kv_bytes(self) -> int:
        size = self.num_seqs * self.seq_len * self.num_kv_heads * self.head_dim
        return 2 * size * self.dtype.itemsize

    @property
    def num_flops(self) -> int:
        """Two products, counting only the keys a query sees."""
        n, queries = self.seq_len, self.num_queries
        pairs = queries * n - queries * (queries - 1) // 2
        return 4 * self.num_seqs * self.num_heads * self.head_dim * pairs


CASES = [
    Case("decode_4x8k", 4, 8192, 1, 32, 8, 128),
    Case("decode_1x32k", 1, 32768, 1, 32, 8, 128),
    Case("decode_32x1k", 32, 1024, 1, 32, 8, 128),
    Case("decode_4x8k_9_3_d64", 4, 8192, 1, 9, 3, 64),
    Case("decode_4x8k_mha_d64", 4, 8192, 1, 8, 8, 64),
    Case("decode_4x8k_fp16", 4, 8192, 1, 32, 8, 128, torch.float16),
    Case("decode_4x4k_fp32", 4, 4096, 1, 32, 8, 128, torch.float32),
    Case("extend_16_of_8k", 1, 8192, 16, 32, 8, 128),
    Case("extend_256_of_8k", 1, 8192, 256, 32, 8, 128),
    Case("prefill_512", 1, 512, 512, 32, 8, 128),
    Case("prefill_1k", 1, 1024, 1024, 32, 8, 128),
    Case("prefill_4k", 1, 4096, 4096, 32, 8, 128),
    Case("prefill_1k_fp32", 1, 1024, 1024, 32, 8, 128, torch.float32),
    Case("prefill_4k_fp32", 1, 4096, 4096, 32, 8, 128, torch.float32),
    Case("prefill_8k_9_3_d64", 1, 8192, 8192, 9, 3, 64),
]


@dataclass
class Inputs:
    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    key: torch.Tensor  # [num_seqs, num_kv_heads, seq_len, head_dim], contiguous
    value: torch.Tensor
    mask: torch.Tensor | None  # None also where PyTorch's own causal mask serves


def make_inputs(case: Case) -> Inputs:
    blocks_per_seq = case.seq_len // BLOCK_SIZE
    shape = (case.num_seqs * blocks_per_seq, case.num_kv_heads, BLOCK_SIZE, case.head_dim)
    key_cache, value_cache = (torch.randn(shape, dtype=case.dtype) for _ in range(2))
    block_table = torch.randperm(shape[0]).int().view(case.num_seqs, blocks_per_seq)
    num_tokens = case.num_seqs * case.num_queries
    is_extend = 1 < case.num_queries < case.seq_len
    ones = torch.ones(case.num_queries, case.seq_len, dtype=torch.bool)
    return Inputs(
        query=torch.randn(num_tokens, case.num_heads, case.head_dim, dtype=case.dtype),
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=block_table,
        seq_lens=torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32),
        cu_seqlens_q=torch.arange(case.num_seqs + 1, dtype=torch.int32) * case.num_queries,
        key=gather(key_cache, block_table),
        value=gather(value_cache, block_table),
        mask=ones.tril(case.seq_len - case.num_queries) if is_extend else None,
    )


def gather(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """`[num_seqs, num_kv_heads, seq_len, head_dim]`, contiguous."""
    return cache[block_table.long()].transpose(1, 2).flatten(2, 3).contiguous()


def attend_contiguous(inputs: Inputs) -> torch.Tensor:
    num_seqs, _, seq_len, head_dim = inputs.key.shape
    query = inputs.query.view(num_seqs, -1, inputs.query.shape[1], head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.mask,
        is_causal=query.shape[2] == seq_len,
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(inputs.query.shape)


def attend_grouped(inputs: Inputs) -> torch.Tensor:
    """Decode only: the queries of one group as the rows of one head, which spares PyTorch the
    copies of keys and values that `enable_gqa` makes on a CPU. It takes a caller who knows."""
    num_seqs, num_kv_heads, _, head_dim = inputs.key.shape
    query = inputs.query.view(num_seqs, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(query, inputs.key, inputs.value)
    return out.reshape(inputs.query.shape)


def attend_gathered(inputs: Inputs) -> torch.Tensor:
    """What one does without a paged kernel: copy, then attend."""
    key = gather(inputs.key_cache, inputs.block_table)
    value = gather(inputs.value_cache, inputs.block_table)
    return attend_contiguous(replace(inputs, key=key, value=value))


def attend_paged(inputs: Inputs) -> torch.Tensor:
    return kvkernels.paged_attention(
        inputs.query,
        inputs.key_cache,
        inputs.value_cache,
        inputs.block_table,
        inputs.seq_lens,
        inputs.cu_seqlens_q,
    )


PROVIDERS = {
    "sdpa_contiguous": attend_contiguous,
    "sdpa_gathered": attend_gathered,
    "kvkernels": attend_paged,
}
DECODE_PROVIDERS = {"sdpa_grouped": attend_grouped}


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        inputs = make_cold(partial(make_inputs, case), case.num_kv_bytes)
        providers = PROVIDERS | (DECODE_PROVIDERS if case.num_queries == 1 else {})
        results = {name: [provider(inputs[0])] for name, provider in providers.items()}
        tolerance = 1e-4 if case.dtype == torch.float32 else 2e-2
        check_agreement(results, "sdpa_contiguous", tolerance)
        run_case(case.name, providers, inputs, num_rounds, case.num_kv_bytes, case.num_flops)
