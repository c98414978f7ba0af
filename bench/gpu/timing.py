"""What is timed on a CUDA device: the cache kernels here, and attention with its peers."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

import kvkernels
from bench import bench_kv_cache, bench_shared_prefix
from bench.bench_launch import time_launches
from bench.gpu.attention_timing import (
    CASES,
    INVARIANT_CASE,
    LATENT_CASES,
    NARROW_CASES,
    time_attention,
    time_invariant,
    time_latent,
    time_narrow,
    time_shared_prefix,
)
from bench.gpu.events import make_cold, time_both_ways, time_calls
from bench.gpu.peers import flashinfer_peers, float8_peers
from bench.gpu.rates import copy_rate, matmul_rate
from bench.gpu.torch_peers import FLEX_PEERS, SDPA_PEERS
from bench.gpu.transfer_timing import time_evict, time_restore
from kvkernels import BlockFormat, EncodedBlocks, KVLayout, KVPool

__all__ = ["copy_rate", "matmul_rate", "time_cases"]

# A name, and what to run for it.
Step = tuple[str, Callable[[], dict[str, Any]]]

NARROW_KINDS = ("float8", "int8", "int4")

# Layout of the blocks that are moved off the device and back, and how many at a time.
CODEC_LAYOUT = KVLayout(32, 8, 128)
NUM_BLOCKS = 16
TIMED_CODECS = ("raw", "l12", "q8", "q4")
NUM_PROGRAMS = (4, 12, 32, None)
NUM_MOVED = (16, 128)  # blocks per transfer between pool and host


@torch.inference_mode()
def time_store(case: bench_kv_cache.Case) -> dict[str, Any]:
    inputs = make_cold(partial(bench_kv_cache.make_inputs, case), case.num_bytes)
    bench_kv_cache.check_stores(inputs[0])
    # Boolean indexing, as in the reference, waits for the device and cannot be captured.
    provider = bench_kv_cache.PROVIDERS["kvkernels"]
    times = time_both_ways([partial(provider, one) for one in inputs])
    return {"gbytes_per_s": case.num_bytes / times["graph_us"] / 1e3, **times}


def time_overhead() -> dict[str, Any]:
    """Processor time of a call from Python, by case."""
    return {row.pop("case"): row for row in time_launches()}


def make_payloads(row_bytes: int, place: str) -> torch.Tensor:
    """Rows for blocks: on the device, to be moved later, or in host memory that it can access."""
    if place == "device":
        return torch.empty(NUM_BLOCKS, row_bytes, dtype=torch.uint8, device="cuda")
    return torch.empty(NUM_BLOCKS, row_bytes, dtype=torch.uint8, pin_memory=True)


def time_transfer() -> dict[str, Any]:
    """GB/s of plain copies of the blocks between device and pinned memory."""
    device, host = (make_payloads(CODEC_LAYOUT.block_bytes, place) for place in ("device", "host"))
    row = {}
    for name, target, source in (("to_host", host, device), ("to_device", device, host)):
        copy = partial(target.copy_, source, non_blocking=True)
        copy()
        row[f"{name}_gbytes_per_s"] = device.numel() / time_calls([copy]) / 1e3
    return row


def time_codec(codec: str, place: str) -> dict[str, Any]:
    """GB/s, in bytes of the pool, by how many programs may run."""
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


def _attention_cases() -> Iterator[Step]:
    """Attention compared with what PyTorch has built in."""
    for case in CASES:
        yield case.name, partial(time_attention, case, SDPA_PEERS)
    yield f"{INVARIANT_CASE.name}_invariant", partial(time_invariant, INVARIANT_CASE)
    for latent_case in LATENT_CASES:
        yield latent_case.name, partial(time_latent, latent_case)
    for case in NARROW_CASES:
        for kind in NARROW_KINDS:
            yield f"{case.name}_{kind}", partial(time_narrow, case, kind, {})
    for shared_case in bench_shared_prefix.CASES:
        yield shared_case.name, partial(time_shared_prefix, shared_case)


def _compiled_peer_cases() -> Iterator[Step]:
    """Ours again, with peers that are compiled. They come last: an invalid access in one of their
    kernels would make the device unusable for all that follows."""
    for topic, peers in (("flashinfer", flashinfer_peers()), ("flex", FLEX_PEERS)):
        for case in CASES:
            if any(peer.serves(case) for peer in peers.values()):
                yield f"{case.name}_{topic}", partial(time_attention, case, peers)
    if peers := float8_peers():
        for case in NARROW_CASES:
            yield f"{case.name}_float8_flashinfer", partial(time_narrow, case, "float8", peers)


def time_cases() -> Iterator[Step]:
    """Names and what to run, one at a time."""
    yield from _attention_cases()
    for store_case in bench_kv_cache.CASES:
        yield f"store_{store_case.name}", partial(time_store, store_case)
    yield "overhead", time_overhead
    yield "transfer", time_transfer
    for codec in TIMED_CODECS:
        for place in ("device", "host"):
            yield f"codec_{codec}_{place}", partial(time_codec, codec, place)
    for way, time in (("restore", time_restore), ("evict", time_evict)):
        for codec, num_blocks in product(TIMED_CODECS, NUM_MOVED):
            name = f"transfer_{way}_{codec}_{num_blocks}"
            yield name, partial(time, CODEC_LAYOUT, codec, num_blocks)
    yield from _compiled_peer_cases()
