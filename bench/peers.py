"""Attention of other packages, for those that are installed; none is a dependency."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from bench.attention_cases import Case, Inputs
from bench.attention_providers import Call, Provider

# These providers store the scores of all heads in float32.
MAX_SCORES_BYTES = 1 << 30


def _holds_scores(case: Case) -> bool:
    return 4 * case.num_scores <= MAX_SCORES_BYTES


# ---- transformers: the functions its models call for each layer ---------------------------------


def _transformers_call(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    mask: torch.Tensor | None,
    case: Case,
    inputs: Inputs,
) -> Call:
    layer = SimpleNamespace(
        num_key_value_groups=case.num_heads // case.num_kv_heads, training=False, is_causal=True
    )

    def call() -> torch.Tensor:
        out, _ = attend(
            layer,
            inputs.queries_by_head,
            inputs.key,
            inputs.value,
            mask,
            scaling=case.head_dim**-0.5,
        )
        return out.reshape(inputs.query.shape)

    return call


def _prepare_transformers_sdpa(case: Case, inputs: Inputs) -> Call:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = None if inputs.mask is None else inputs.mask[None, None]
    return _transformers_call(sdpa_attention_forward, mask, case, inputs)


def _prepare_transformers_eager(case: Case, inputs: Inputs) -> Call:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    mask = None
    if not case.is_decode:
        hidden = torch.full(
            (case.num_queries, case.seq_len), torch.finfo(case.dtype).min, dtype=case.dtype
        )
        mask = hidden.triu(1 + case.seq_len - case.num_queries)[None, None]
    return _transformers_call(eager_attention_forward, mask, case, inputs)


# ---- ONNX Runtime: its GroupQueryAttention operator, which appends to a cache and attends -------


@cache
def _onnxruntime_session(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, num_threads: int
) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    number = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}[dtype]
    floats = ("query", "key", "value", "past_key", "past_value")
    results = ("out", "present_key", "present_value")
    lengths = ("seqlens_k", "total_sequence_length")
    value_info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node(
                "GroupQueryAttention",
                [*floats, *lengths],
                list(results),
                domain="com.microsoft",
                num_heads=num_heads,
                kv_num_heads=num_kv_heads,
            )
        ],
        "attention",
        [value_info(name, number, None) for name in floats]
        + [value_info(name, TensorProto.INT32, None) for name in lengths],
        [value_info(name, number, None) for name in results],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Otherwise its idle threads would spin while other providers are timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _prepare_onnxruntime(dtype: torch.dtype, case: Case, inputs: Inputs) -> Call:
    """Prepare a cache of all tokens but the new ones, which each run writes in place."""
    import numpy as np

    def merged_heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, :, -case.num_queries :].transpose(1, 2).flatten(2).to(dtype).contiguous()

    past_key, past_value = (tensor.to(dtype).clone() for tensor in (inputs.key, inputs.value))
    query = merged_heads(inputs.queries_by_head)
    out = torch.empty_like(query)
    feeds = {
        "query": query,
        "key": merged_heads(inputs.key),
        "value": merged_heads(inputs.value),
        "past_key": past_key,
        "past_value": past_value,
        "seqlens_k": inputs.seq_lens - 1,
        "total_sequence_length": inputs.seq_lens[:1],
    }
    results = {"out": out, "present_key": past_key, "present_value": past_value}
    session = _onnxruntime_session(
        dtype, case.num_heads, case.num_kv_heads, torch.get_num_threads()
    )
    binding = session.io_binding()
    numpy_dtypes = {torch.float32: np.float32, torch.float16: np.float16, torch.int32: np.int32}
    for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, results)):
        for name, tensor in tensors.items():
            shape, element = tuple(tensor.shape), numpy_dtypes[tensor.dtype]
            bind(name, "cpu", 0, element, shape, tensor.data_ptr())

    def call() -> torch.Tensor:
        session.run_with_iobinding(binding)
        return out.view(inputs.query.shape)

    call.tensors = feeds  # keeps them alive: the binding holds only addresses
    return call


# ---- what is there ------------------------------------------------------------------------------


def _make_onnxruntime_provider(dtype: torch.dtype) -> Provider:
    """A provider in float32 or float16, as ONNX Runtime has no bfloat16 on a CPU."""
    return Provider(
        partial(_prepare_onnxruntime, dtype),
        "contiguous, new tokens written in each run",
        serves=lambda case: _holds_scores(case) and case.dtype in (dtype, torch.bfloat16),
        dtype=dtype,
        tolerance=2e-2,
        has_own_threads=True,
    )


PACKAGES: dict[tuple[str, ...], dict[str, Provider]] = {
    ("transformers",): {
        "transformers_sdpa": Provider(_prepare_transformers_sdpa, "contiguous"),
        "transformers_eager": Provider(
            _prepare_transformers_eager, "contiguous", serves=_holds_scores
        ),
    },
    ("onnxruntime", "onnx"): {
        "onnxruntime_fp32": _make_onnxruntime_provider(torch.float32),
        "onnxruntime_fp16": _make_onnxruntime_provider(torch.float16),
    },
}


def missing_packages() -> list[str]:
    return [name for names in PACKAGES for name in names if find_spec(name) is None]


def installed_peers() -> dict[str, Provider]:
    """The providers whose packages are all installed."""
    missing = set(missing_packages())
    peers: dict[str, Provider] = {}
    for names, providers in PACKAGES.items():
        if missing.isdisjoint(names):
            peers |= providers
    return peers
