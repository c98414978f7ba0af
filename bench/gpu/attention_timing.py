"""Times attention and its peers, and compares them with what the device's rates would allow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import kvkernels
from bench import attention_cases, bench_shared_prefix
from bench.attention_cases import BLOCK_SIZE, Case, Inputs, gather
from bench.attention_providers import (
    KIND_TOLERANCES,
    Call,
    attend_in_float32,
    attend_paged,
)
from bench.gpu.events import make_cold, replayed, time_both_ways
from bench.gpu.peer import Peer
from bench.gpu.rates import find_floor
from bench.harness import check_agreement
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.reference.quantize import quantize_keys, quantize_values

CASES = [
    *attention_cases.CASES,
    Case("decode_1x1k", 1, 1024, 1, 32, 8, 128),
    Case("decode_1x8k", 1, 8192, 1, 32, 8, 128),
    Case("decode_8x4k", 8, 4096, 1, 32, 8, 128),
    Case("decode_8x32k", 8, 32768, 1, 32, 8, 128),
    Case("decode_128x1k", 128, 1024, 1, 32, 8, 128),
    Case("decode_8x4k_mha", 8, 4096, 1, 32, 32, 128),
]
NARROW_CASES = [
    case for case in CASES if case.name in ("decode_4x8k", "decode_8x4k", "decode_8x32k")
]
INVARIANT_CASE = next(case for case in CASES if case.name == "decode_8x4k")

# Loose: it only shows that all compute the same thing; accuracy is tested by check.py.
TOLERANCE = 0.02


@dataclass(frozen=True)
class LatentCase:
    """Decode of latent attention: the values are the first channels of the only key head."""

    name: str
    num_seqs: int
    seq_len: int
    num_heads: int = 128
    key_dim: int = 576
    value_dim: int = 512

    @property
    def num_kv_bytes(self) -> int:
        return 2 * self.num_seqs * self.seq_len * self.key_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache and the queries, read once, and of the output, written once."""
        width = self.key_dim + self.value_dim
        return self.num_kv_bytes + 2 * self.num_seqs * self.num_heads * width

    @property
    def num_flops(self) -> int:
        pairs = self.num_seqs * self.num_heads * self.seq_len
        return 2 * pairs * (self.key_dim + self.value_dim)


LATENT_CASES = [LatentCase("decode_128x4k_mla", 128, 4096), LatentCase("decode_1x8k_mla", 1, 8192)]


def _num_bytes(case: Case, num_kv_bytes: int) -> int:
    """Bytes of keys and values (given) and queries, read once, and of the output, written once."""
    return num_kv_bytes + 2 * case.num_query_elements * case.dtype.itemsize


def with_floor(
    times: Mapping[str, float], num_bytes: int, num_flops: int, dtype: torch.dtype
) -> dict[str, Any]:
    """kvkernels' times, and how near they come to the least that the device's rates allow."""
    floor = find_floor(num_bytes, num_flops, dtype)
    return {
        "num_bytes": num_bytes,
        "num_flops": num_flops,
        **floor,
        "share_of_floor": floor["floor_us"] / times["graph_us"],
        "kvkernels": {
            **times,
            "gbytes_per_s": num_bytes / times["graph_us"] / 1e3,
            "tflops": num_flops / times["graph_us"] / 1e6,
        },
    }


def check_ours(call: Call, exact: torch.Tensor, tolerance: float = TOLERANCE) -> torch.Tensor:
    """A call's output; RuntimeError if it, or its replay from a graph, is not about the exact."""
    out = call()
    results = {"float32": [exact] * 2, "kvkernels": [out, replayed(call)]}
    check_agreement(results, "float32", tolerance)
    return out


def time_peers(
    peers: Mapping[str, Peer],
    case: Case,
    inputs: Sequence[Inputs],
    expected: torch.Tensor,
    ours_us: float,
    tolerance: float = TOLERANCE,
) -> dict[str, dict[str, Any]]:
    """For each peer that serves the case its times and their ratio to ours, or its error."""
    found: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        if not peer.serves(case):
            continue
        try:
            with peer.context():
                calls = [peer.prepare(case, one) for one in inputs]
                results = {"kvkernels": [expected] * 2, name: [calls[0](), replayed(calls[0])]}
                check_agreement(results, "kvkernels", tolerance)
                times = time_both_ways(calls)
        except Exception as error:  # another package's error must not cost our row
            found[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
            continue
        found[name] = {**times, "graph_over_ours": times["graph_us"] / ours_us, "form": peer.form}
    return found


@torch.inference_mode()
def time_attention(case: Case, peers: Mapping[str, Peer]) -> dict[str, Any]:
    """Ours and each of the peers on the same inputs."""
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    calls = [partial(attend_paged, one) for one in inputs]
    expected = check_ours(calls[0], attend_in_float32(inputs[0]))
    times = time_both_ways(calls)
    num_bytes = _num_bytes(case, case.num_kv_bytes)
    row = {"case": case.name, **with_floor(times, num_bytes, case.num_flops, case.dtype)}
    return row | {"peers": time_peers(peers, case, inputs, expected, times["graph_us"])}


def make_narrow(inputs: Inputs, kind: str) -> tuple[Inputs, dict[str, QuantizedCache]]:
    """The inputs with all blocks of one kind, and the quantised caches that hold them."""
    keys, values = inputs.key_cache, inputs.value_cache
    if kind == "float8":
        keys, values = (cache.to(torch.float8_e4m3fn) for cache in (keys, values))
        return replace(inputs, key_cache=keys, value_cache=values), {}
    bits, groups = 8, (1, 1)
    if kind == "int4":
        bits, groups = 4, (keys.shape[2] // 32, keys.shape[3] // 32)
    cache = QuantizedCache(
        *quantize_keys(keys, bits, groups[0]), *quantize_values(values, bits, groups[1])
    )
    table = tag_blocks(inputs.block_table, kind)
    narrow = replace(inputs, key_cache=keys[:1], value_cache=values[:1], block_table=table)
    return narrow, {f"{kind}_cache": cache}


def attend_decode(inputs: Inputs, **options: Any) -> torch.Tensor:
    return kvkernels.paged_attention(
        *(inputs.query, inputs.key_cache, inputs.value_cache, inputs.block_table, inputs.seq_lens),
        **options,
    )


@torch.inference_mode()
def time_narrow(case: Case, kind: str, peers: Mapping[str, Peer]) -> dict[str, Any]:
    """Decode over a cache of a narrow kind; compare with the row of the same case in bfloat16."""
    made = make_cold(
        lambda: make_narrow(attention_cases.make_inputs(case), kind), case.num_kv_bytes // 4
    )
    num_kv_bytes = case.num_kv_bytes // 2
    if kind != "float8":
        parts = (part for cache in made[0][1].values() for part in cache)
        num_kv_bytes = sum(part.numel() * part.element_size() for part in parts)
    calls: list[Call] = [partial(attend_decode, inputs, **caches) for inputs, caches in made]
    inputs = [one for one, _ in made]
    tolerance = KIND_TOLERANCES[kind]
    expected = check_ours(calls[0], attend_in_float32(inputs[0]), tolerance)
    times = time_both_ways(calls)
    floor = with_floor(times, _num_bytes(case, num_kv_bytes), case.num_flops, case.dtype)
    row = {"case": f"{case.name}_{kind}", **floor}
    return row | {"peers": time_peers(peers, case, inputs, expected, times["graph_us"], tolerance)}


@torch.inference_mode()
def time_invariant(case: Case) -> dict[str, Any]:
    """Time batch-invariant decode, and how much longer it takes than the default."""
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    calls = [partial(attend_decode, one, batch_invariant=True) for one in inputs]
    check_ours(calls[0], attend_in_float32(inputs[0]))
    times = time_both_ways(calls)
    plain = time_both_ways([partial(attend_decode, one) for one in inputs])
    num_bytes = _num_bytes(case, case.num_kv_bytes)
    row = with_floor(times, num_bytes, case.num_flops, case.dtype)
    return row | {"graph_over_plain": times["graph_us"] / plain["graph_us"]}


def make_latent_inputs(case: LatentCase) -> tuple[torch.Tensor, ...]:
    """Arguments of `paged_attention`, in bfloat16."""
    table = torch.randperm(case.num_seqs * case.seq_len // BLOCK_SIZE).int()
    shape = (table.numel(), 1, BLOCK_SIZE, case.key_dim)
    keys = torch.randn(shape, dtype=torch.bfloat16)
    query = torch.randn(case.num_seqs, case.num_heads, case.key_dim, dtype=torch.bfloat16)
    lens = torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32)
    return query, keys, keys[..., : case.value_dim], table.view(case.num_seqs, -1), lens


def attend_latent_in_float32(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, _: Any
) -> torch.Tensor:
    """Attention with all query heads as rows of one head, in float32."""
    gathered = (gather(cache, table).float() for cache in (keys, values))
    return F.scaled_dot_product_attention(query[:, None].float(), *gathered)[:, 0]


@torch.inference_mode()
def time_latent(case: LatentCase) -> dict[str, Any]:
    inputs = make_cold(partial(make_latent_inputs, case), case.num_kv_bytes)
    calls = [partial(kvkernels.paged_attention, *one) for one in inputs]
    check_ours(calls[0], attend_latent_in_float32(*inputs[0]))
    times = time_both_ways(calls)
    return with_floor(times, case.num_bytes, case.num_flops, torch.bfloat16)


@torch.inference_mode()
def time_shared_prefix(case: bench_shared_prefix.Case) -> dict[str, Any]:
    inputs = make_cold(partial(bench_shared_prefix.make_inputs, case), case.num_bytes)
    providers = bench_shared_prefix.PROVIDERS
    check_agreement({name: [run(inputs[0])] for name, run in providers.items()}, "flat", TOLERANCE)
    return {
        name: time_both_ways([partial(run, one) for one in inputs])
        for name, run in providers.items()
    }
