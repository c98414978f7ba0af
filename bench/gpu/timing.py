"""Times the kernels with device events, beside PyTorch's attention on contiguous tensors."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import kvkernels
from bench import attention_cases, bench_kv_cache, bench_shared_prefix
from bench.attention_cases import Case
from bench.attention_providers import attend_contiguous, attend_gathered, attend_paged
from bench.harness import check_agreement
from kvkernels import BlockFormat, EncodedBlocks, KVLayout, KVPool
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.reference.quantize import quantize_keys, quantize_values

NUM_ROUNDS = 15
# Inputs used in turn, so that none is in the cache when its turn comes.
MAX_INPUTS = 24

CASES = [
    *attention_cases.CASES,
    Case("decode_1x1k", 1, 1024, 1, 32, 8, 128),
    Case("decode_1x8k", 1, 8192, 1, 32, 8, 128),
    Case("decode_8x4k", 8, 4096, 1, 32, 8, 128),
    Case("decode_8x32k", 8, 32768, 1, 32, 8, 128),
    Case("decode_128x1k", 128, 1024, 1, 32, 8, 128),
    Case("decode_8x4k_mha", 8, 4096, 1, 32, 32, 128),
]
PROVIDERS = {
    "sdpa_contiguous": attend_contiguous,
    "sdpa_gathered": attend_gathered,
    "kvkernels": attend_paged,
}

NARROW_CASES = [
    case for case in CASES if case.name in ("decode_4x8k", "decode_8x4k", "decode_8x32k")
]

# Blocks that leave the device and come back: one layout, as many as are a good transfer.
CODEC_LAYOUT = KVLayout(32, 8, 128)
NUM_BLOCKS = 16
TIMED_CODECS = ("raw", "l12", "q8", "q4")
NUM_PROGRAMS = (4, 12, 32, None)


def time_calls(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of one of the calls, which have run before: median over rounds of all."""
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(NUM_ROUNDS)] for _ in "ab")
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        for call in calls:
            call()
        end.record()
    torch.cuda.synchronize()
    times_ms = (begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True))
    return 1e3 * statistics.median(times_ms) / len(calls)


def time_provider(provider: Callable[[Any], Any], inputs: list[Any]) -> dict[str, float]:
    """Microseconds of a call: as called from Python, and replayed from a graph without it."""
    calls = [partial(provider, one) for one in inputs]
    for call in calls:
        call()
    eager_us = time_calls(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return {"eager_us": eager_us, "graph_us": time_calls([graph.replay]) / len(calls)}


def make_cold(make: Callable[[], Any], num_bytes: int) -> list[Any]:
    """As many inputs as together are four times the device's cache."""
    torch.cuda.empty_cache()  # what the case before took
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MAX_INPUTS, -(-4 * cache_bytes // num_bytes))
    with torch.device("cuda"):
        return [make() for _ in range(count)]


def copy_rate() -> dict[str, float]:
    """Gigabytes a second of a copy within device memory, read and written."""
    source = torch.ones(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return {"gbytes_per_s": 2 * source.numel() / time_calls([copy]) / 1e3}


@torch.inference_mode()
def time_attention(case: Case) -> dict[str, Any]:
    inputs = make_cold(partial(attention_cases.make_inputs, case), case.num_kv_bytes)
    results = {name: [run(inputs[0])] for name, run in PROVIDERS.items()}
    # Only to notice that another thing is timed; what is right is for check.py to say.
    check_agreement(results, "sdpa_contiguous", 0.1)
    row: dict[str, Any] = {"num_kv_bytes": case.num_kv_bytes, "num_flops": case.num_flops}
    for name, provider in PROVIDERS.items():
        row[name] = times = time_provider(provider, inputs)
        times["kv_gbytes_per_s"] = case.num_kv_bytes / times["graph_us"] / 1e3
        times["tflops"] = case.num_flops / times["graph_us"] / 1e6
    return row


def _narrow(inputs: attention_cases.Inputs, kind: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `paged_attention` with all blocks of a kind."""
    keys, values, table = inputs.key_cache, inputs.value_cache, inputs.block_table
    caches = {}
    if kind == "float8":
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    else:
        bits, groups = 8, (1, 1)
        if kind == "int4":
            bits, groups = 4, (keys.shape[2] // 32, keys.shape[3] // 32)
        caches[f"{kind}_cache"] = QuantizedCache(
            *quantize_keys(keys, bits, groups[0]), *quantize_values(values, bits, groups[1])
        )
        table = tag_blocks(table, kind)
        keys, values = keys[:1], values[:1]
    return (inputs.query, keys, values, table, inputs.seq_lens), caches


@torch.inference_mode()
def time_narrow(case: Case, kind: str) -> dict[str, Any]:
    """Decode over a cache of a narrow kind; compare with the row of the same case in bfloat16."""
    made = make_cold(
        lambda: _narrow(attention_cases.make_inputs(case), kind), case.num_kv_bytes // 4
    )
    num_bytes = sum(
        part.numel() * part.element_size() for cache in made[0][1].values() for part in cache
    )
    num_bytes = num_bytes or case.num_kv_bytes // 2
    times = time_provider(lambda one: kvkernels.paged_attention(*one[0], **one[1]), made)
    rate = num_bytes / times["graph_us"] / 1e3
    return {"num_kv_bytes": num_bytes, "kv_gbytes_per_s": rate, **times}


@torch.inference_mode()
def time_shared_prefix(case: bench_shared_prefix.Case) -> dict[str, Any]:
    one_copy = case.num_flat_bytes // case.num_seqs
    inputs = make_cold(partial(bench_shared_prefix.make_inputs, case), one_copy)
    providers = bench_shared_prefix.PROVIDERS
    check_agreement({name: [run(inputs[0])] for name, run in providers.items()}, "flat", 0.1)
    return {name: time_provider(run, inputs) for name, run in providers.items()}


@torch.inference_mode()
def time_store(case: bench_kv_cache.Case) -> dict[str, Any]:
    inputs = make_cold(partial(bench_kv_cache.make_inputs, case), case.num_bytes)
    # Boolean indexing, as the reference does, waits for the device: it has no place in a graph.
    provider = bench_kv_cache.PROVIDERS["kvkernels"]
    times = time_provider(provider, inputs)
    return {"gbytes_per_s": case.num_bytes / times["graph_us"] / 1e3, **times}


def make_payloads(row_bytes: int, place: str) -> torch.Tensor:
    """Rows for blocks: on the device, to be moved from there, or in memory that it reaches."""
    if place == "device":
        return torch.empty(NUM_BLOCKS, row_bytes, dtype=torch.uint8, device="cuda")
    return torch.empty(NUM_BLOCKS, row_bytes, dtype=torch.uint8, pin_memory=True)


def time_transfer() -> dict[str, Any]:
    """Gigabytes a second of plain copies of the blocks between device and pinned memory."""
    device, host = (make_payloads(CODEC_LAYOUT.block_bytes, place) for place in ("device", "host"))
    row = {}
    for name, target, source in (("to_host", host, device), ("to_device", device, host)):
        copy = partial(target.copy_, source, non_blocking=True)
        copy()
        row[f"{name}_gbytes_per_s"] = device.numel() / time_calls([copy]) / 1e3
    return row


def time_codec(codec: str, place: str) -> dict[str, Any]:
    """Gigabytes a second of blocks as they are in the pool, by how many programs there may be."""
    pool = KVPool(CODEC_LAYOUT, NUM_BLOCKS, "cuda")
    pool.data.normal_()
    ids = torch.randperm(NUM_BLOCKS, device="cuda")
    block_format = BlockFormat(CODEC_LAYOUT, codec)
    payloads = make_payloads(block_format.raw.payload_bytes, place)
    num_bytes = NUM_BLOCKS * CODEC_LAYOUT.block_bytes
    row: dict[str, Any] = {"num_bytes": num_bytes, "payload_bytes": block_format.payload_bytes}

    def encode(num_programs: int | None) -> EncodedBlocks:
        return kvkernels.encode_blocks(
            pool, ids, block_format, payloads=payloads, num_programs=num_programs
        )

    encoded = encode(None)

    def decode(num_programs: int | None) -> torch.Tensor:
        return kvkernels.decode_blocks(encoded, pool, ids, num_programs=num_programs)

    for name, run in (("encode", encode), ("decode", decode)):
        for num_programs in NUM_PROGRAMS:
            call = partial(run, num_programs)
            call()
            rate = num_bytes / time_calls([call]) / 1e3
            row[f"{name}_{num_programs or 'all'}_gbytes_per_s"] = rate
    return row


def time_cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names and what to run, one at a time."""
    for store_case in bench_kv_cache.CASES:
        yield f"store_{store_case.name}", partial(time_store, store_case)
    for case in NARROW_CASES:
        for kind in ("float8", "int8", "int4"):
            yield f"{case.name}_{kind}", partial(time_narrow, case, kind)
    yield "transfer", time_transfer
    for codec in TIMED_CODECS:
        for place in ("device", "host"):
            yield f"codec_{codec}_{place}", partial(time_codec, codec, place)
    for shared_case in bench_shared_prefix.CASES:
        yield shared_case.name, partial(time_shared_prefix, shared_case)
    for case in CASES:
        yield case.name, partial(time_attention, case)
