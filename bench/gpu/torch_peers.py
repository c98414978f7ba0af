"""PyTorch's attention on contiguous tensors: by the default backend, a fixed one, and compiled."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.attention_cases import Case, Inputs
from bench.attention_providers import (
    Call,
    attend_contiguous,
    attend_gathered,
    attend_grouped,
    on_inputs,
)
from bench.gpu.peer import Peer

# Few, since each takes many seconds to compile.
FLEX_CASES = ("decode_4x8k", "decode_1x32k", "prefill_8k_d128", "extend_512_after_8k")


def attend_lower_right(inputs: Inputs) -> torch.Tensor:
    """Like `attend_contiguous`, with a causal mask that is given by its shape alone, the only kind
    that FlashAttention's kernels take."""
    if inputs.mask is None:
        return attend_contiguous(inputs)
    query = inputs.queries_by_head
    out = F.scaled_dot_product_attention(
        query,
        inputs.key,
        inputs.value,
        attn_mask=causal_lower_right(query.shape[2], inputs.key.shape[2]),
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(inputs.query.shape)


@cache
def _causal_mask(num_queries: int, seq_len: int, device: torch.device) -> BlockMask:
    """One mask for all inputs of a case, since another mask function would be compiled again."""
    first = seq_len - num_queries

    def is_seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query + first >= key

    return create_block_mask(is_seen, None, None, num_queries, seq_len, device=str(device))


@cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def prepare_flex(make: Callable[[], Callable[..., Any]], case: Case, inputs: Inputs) -> Call:
    """`Peer.prepare` for the FlexAttention that `make` returns, compiled or not."""
    attend = make()
    mask = _causal_mask(case.num_queries, case.seq_len, inputs.query.device)

    def call() -> torch.Tensor:
        out = attend(
            inputs.queries_by_head, inputs.key, inputs.value, block_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(inputs.query.shape)

    return call


def _is_half(case: Case) -> bool:
    return case.dtype.itemsize == 2


def _is_half_decode(case: Case) -> bool:
    return _is_half(case) and case.is_decode


FLASH = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)
CUDNN = partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
GROUPED = "contiguous, a group's queries as rows of one head"

SDPA_PEERS = {
    "sdpa_contiguous": Peer(on_inputs(attend_contiguous), "contiguous"),
    "sdpa_gathered": Peer(on_inputs(attend_gathered), "blocks, copied in each run"),
    "sdpa_flash": Peer(on_inputs(attend_lower_right), "contiguous", _is_half, FLASH),
    "sdpa_flash_grouped": Peer(on_inputs(attend_grouped), GROUPED, _is_half_decode, FLASH),
    "sdpa_cudnn": Peer(on_inputs(attend_contiguous), "contiguous", _is_half, CUDNN),
    "sdpa_cudnn_grouped": Peer(on_inputs(attend_grouped), GROUPED, _is_half_decode, CUDNN),
}
FLEX_PEERS = {
    "flex": Peer(
        partial(prepare_flex, compiled_flex),
        "contiguous, block mask made before",
        lambda case: case.name in FLEX_CASES,
    )
}
