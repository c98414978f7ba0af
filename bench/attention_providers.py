"""Ways to compute a case's attention: PyTorch's own, the baseline first, and kvkernels.

To compare another cache format, or another op over the same pools, add an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import kvkernels
from bench.attention_cases import BLOCK_SIZE, Case, Inputs, gather

Call = Callable[[], torch.Tensor]

# Largest error allowed: norm of the difference over norm of the exact output. For random numbers
# around 0 and any number of tokens, rounding to 16 bits causes up to 0.007, int8 0.009, float8
# 0.04, int4 0.11.
KIND_TOLERANCES = {"int8": 2e-2, "float8": 8e-2, "int4": 2e-1}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case's attention.

    Attributes:
        prepare: Takes a case and its inputs and returns the call that is timed, which returns an
            output like ``query``. The preparation is not timed.
        form: Layout of the keys and values that the call gets.
        serves: Which cases it can run.
        kv_bits: Bits of an element of keys and values, where they are not of the case's dtype.
        dtype: What it computes in, where it is not the case's dtype.
        tolerance: How far it may be from the baseline, where that is not the dtype's rounding; see
            `check_agreement`.
        has_own_threads: Whether it runs on threads other than PyTorch's.
    """

    prepare: Callable[[Case, Inputs], Call]
    form: str
    serves: Callable[[Case], bool] = lambda case: True
    kv_bits: float | None = None
    dtype: torch.dtype | None = None
    tolerance: float = 0.0
    has_own_threads: bool = False

    def dtype_in(self, case: Case) -> torch.dtype:
        return self.dtype or case.dtype

    def num_kv_bytes(self, case: Case) -> int:
        kv_bits = self.kv_bits or 8 * self.dtype_in(case).itemsize
        return round(case.num_kv_elements * kv_bits / 8)

    def num_bytes(self, case: Case) -> int:
        """Bytes of keys, values and queries, read once, and of the output, written once."""
        return self.num_kv_bytes(case) + 2 * case.num_query_elements * self.dtype_in(case).itemsize


def attend_contiguous(inputs: Inputs) -> torch.Tensor:
    query = inputs.queries_by_head
    out = F.scaled_dot_product_attention(
        query,
        inputs.key,
        inputs.value,
        attn_mask=inputs.mask,
        is_causal=query.shape[2] == inputs.key.shape[2],
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(inputs.query.shape)


def attend_in_float32(inputs: Inputs) -> torch.Tensor:
    """The exact output; one key-value head at a time, since scores in float32 take much memory."""
    query = inputs.queries_by_head
    outs = [
        F.scaled_dot_product_attention(
            heads.float(),
            inputs.key[:, [index]].float().expand(-1, heads.shape[1], -1, -1),
            inputs.value[:, [index]].float().expand(-1, heads.shape[1], -1, -1),
            attn_mask=inputs.mask,
            is_causal=query.shape[2] == inputs.key.shape[2],
        )
        for index, heads in enumerate(query.chunk(inputs.key.shape[1], dim=1))
    ]
    return torch.cat(outs, dim=1).transpose(1, 2).reshape(inputs.query.shape)


def attend_grouped(inputs: Inputs) -> torch.Tensor:
    """Decode only: the queries of one group as the rows of one head, which avoids the copies of
    keys and values that `enable_gqa` makes on a CPU. A caller has to know this trick."""
    num_seqs, num_kv_heads, _, head_dim = inputs.key.shape
    query = inputs.query.view(num_seqs, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(query, inputs.key, inputs.value)
    return out.reshape(inputs.query.shape)


def attend_gathered(inputs: Inputs) -> torch.Tensor:
    """The way without a paged kernel: copy out of the blocks, then attend."""
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


def prepare_quantized(kind: str) -> Callable[[Case, Inputs], Call]:
    """`Provider.prepare` of attention over the same blocks, all of them quantised."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        pool = kvkernels.QuantizedPool(inputs.pool.layout, kind, inputs.pool.num_blocks)
        for ids in torch.arange(pool.num_blocks).split(64):
            kvkernels.quantize_blocks(inputs.pool, ids, pool, ids)
        table = kvkernels.tag_blocks(inputs.block_table, kind)
        caches = {"int8_cache" if kind == "int8" else "int4_cache": pool.cache(0)}
        return lambda: kvkernels.paged_attention(
            inputs.query,
            inputs.key_cache,
            inputs.value_cache,
            table,
            inputs.seq_lens,
            inputs.cu_seqlens_q,
            **caches,
        )

    return prepare


def bits_of(kind: str) -> float:
    """Bits of an element of a quantised pool, scales included, with heads of 128."""
    layout = kvkernels.KVLayout(1, num_kv_heads=1, head_dim=128, block_size=BLOCK_SIZE)
    pool = kvkernels.QuantizedPool(layout, kind, num_blocks=1)
    return 8 * pool.layer_bytes / (2 * BLOCK_SIZE * layout.head_dim)


def is_quantized_case(case: Case) -> bool:
    return case.dtype == torch.bfloat16 and case.head_dim == 128 and case.seq_len <= 9000


def on_inputs(attend: Callable[[Inputs], torch.Tensor]) -> Callable[[Case, Inputs], Call]:
    """`Provider.prepare` for a function that takes the inputs as they are."""
    return lambda _, inputs: partial(attend, inputs)


PROVIDERS = {
    "sdpa_contiguous": Provider(on_inputs(attend_contiguous), "contiguous"),
    "sdpa_gathered": Provider(on_inputs(attend_gathered), "blocks, copied in each run"),
    "sdpa_grouped": Provider(
        on_inputs(attend_grouped), "contiguous", serves=lambda case: case.is_decode
    ),
    "kvkernels": Provider(on_inputs(attend_paged), "blocks"),
    **{
        f"kvkernels_{kind}": Provider(
            prepare_quantized(kind),
            f"{kind} blocks",
            serves=is_quantized_case,
            kv_bits=bits_of(kind),
            tolerance=KIND_TOLERANCES[kind],
        )
        for kind in ("int8", "int4")
    },
}
