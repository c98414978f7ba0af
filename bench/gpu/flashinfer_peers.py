"""FlashInfer over the same blocks, where it is installed; it compiles its kernels with nvcc."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from bench.attention_cases import BLOCK_SIZE, Case, Inputs
from bench.attention_providers import Call
from bench.gpu.peer import Peer

HEAD_DIM = 128
WORKSPACE_BYTES = 256 << 20
BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
# What a module is compiled for: index dtype, widths of keys and values, no position encoding,
# window or soft cap.
PLAIN = (torch.int32, HEAD_DIM, HEAD_DIM, 0, False, False)


def _prefill_module(backend: str, kv_dtype: torch.dtype) -> Any:
    from flashinfer.jit.attention import gen_batch_prefill_module

    return gen_batch_prefill_module(backend, BF16, kv_dtype, BF16, *PLAIN, False)


# Decode on tensor cores is the prefill kernel of FlashAttention 2.
MODULES: dict[str, Callable[[], Any]] = {
    "fa2": partial(_prefill_module, "fa2", BF16),
    "fa3": partial(_prefill_module, "fa3", BF16),
    "fa2_float8": partial(_prefill_module, "fa2", FLOAT8),
}


def is_installed() -> bool:
    return find_spec("flashinfer") is not None


@cache
def _check_compiled(module: str) -> None:
    """Raise RuntimeError if a call would have to compile while it is timed."""
    if not MODULES[module]().is_compiled:
        raise RuntimeError(f"flashinfer's module {module} was not compiled before")


@cache
def _workspace() -> torch.Tensor:
    """One workspace for all calls, since they run one after another."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


def page_table(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Running sum of the sequences' numbers of blocks, their ids, and the tokens in each last one.

    All in int32, in host memory: plans are made there.
    """
    lens = inputs.seq_lens.cpu()
    counts = -(-lens // BLOCK_SIZE)
    sums = torch.zeros(len(lens) + 1, dtype=torch.int32)
    sums[1:] = counts.cumsum(0)
    ids = [row[:count] for row, count in zip(inputs.block_table.cpu(), counts, strict=True)]
    return sums, torch.cat(ids), (lens - (counts - 1) * BLOCK_SIZE).int()


def lay_out(inputs: Inputs, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The caches as they are (heads before tokens), or copied to tokens before heads."""
    caches = inputs.key_cache, inputs.value_cache
    if layout == "HND":
        return caches
    key_cache, value_cache = (cache.transpose(1, 2).contiguous() for cache in caches)
    return key_cache, value_cache


def _prepare_decode(module: str, layout: str, case: Case, inputs: Inputs) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    _check_compiled(module)
    table = page_table(inputs)
    sums, ids, last_lens = (part.to(inputs.query.device) for part in table)
    # Planned as for a graph that serves changing lengths, as ours does.
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        layout,
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=sums,
        paged_kv_indices_buffer=ids,
        paged_kv_last_page_len_buffer=last_lens,
        backend="fa2",
    )
    caches = lay_out(inputs, layout)
    wrapper.plan(
        *table,
        *(case.num_heads, case.num_kv_heads, case.head_dim, BLOCK_SIZE),
        q_data_type=case.dtype,
        kv_data_type=caches[0].dtype,
        o_data_type=case.dtype,
    )
    return partial(wrapper.run, inputs.query, caches, out=torch.empty_like(inputs.query))


def _prepare_prefill(module: str, case: Case, inputs: Inputs) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    _check_compiled(module)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "HND", backend=module)
    assert inputs.cu_seqlens_q is not None
    wrapper.plan(
        inputs.cu_seqlens_q.cpu(),
        *page_table(inputs),
        *(case.num_heads, case.num_kv_heads, case.head_dim, BLOCK_SIZE),
        causal=True,
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )
    # With an output buffer, as engines pass it; otherwise zeros are written first.
    out = torch.empty_like(inputs.query)
    return partial(wrapper.run, inputs.query, lay_out(inputs, "HND"), out=out)


def _serves_decode(case: Case) -> bool:
    return case.is_decode and case.dtype == BF16 and case.head_dim == HEAD_DIM


def _serves_prefill(case: Case) -> bool:
    return not case.is_decode and case.dtype == BF16 and case.head_dim == HEAD_DIM


PLANNED = "planned before, not timed"
FLASHINFER_PEERS = {
    "flashinfer": Peer(
        partial(_prepare_decode, "fa2", "HND"), f"blocks, {PLANNED}", _serves_decode
    ),
    "flashinfer_nhd": Peer(
        partial(_prepare_decode, "fa2", "NHD"),
        f"blocks with tokens before heads, {PLANNED}",
        _serves_decode,
    ),
    "flashinfer_fa3": Peer(partial(_prepare_prefill, "fa3"), f"blocks, {PLANNED}", _serves_prefill),
    "flashinfer_fa2": Peer(partial(_prepare_prefill, "fa2"), f"blocks, {PLANNED}", _serves_prefill),
}
# With float8 caches, for the cases that are timed with those.
FLOAT8_PEERS = {
    "flashinfer": Peer(
        partial(_prepare_decode, "fa2_float8", "HND"), f"float8 blocks, {PLANNED}", _serves_decode
    )
}
