"""The prefix index against a dict of chained block hashes.

Before anything is timed, all providers answer a sample of prompts and must agree. They take turns,
so that a busy machine slows all of them.
"""

import array
import ctypes
import gc
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import print_line
from prefixstore.index import RadixIndex


class HashIndex:
    """The usual prefix cache: a dict entry per block, keyed by a hash of it and its parent's hash.

    It keeps neither recency nor pins, so it does less than the radix tree in each call.
    """

    def __init__(self, block_size: int, chain: Callable[[Any, np.ndarray, int], Iterable]) -> None:
        self.block_size = block_size
        self.chain = chain
        self.ids: dict[Any, int] = {}

    def match(self, tokens: np.ndarray) -> list[int]:
        found = []
        for key in self.chain(b"", tokens, self.block_size):
            block_id = self.ids.get(key)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def insert(self, tokens: np.ndarray, block_ids: np.ndarray) -> None:
        keys = self.chain(b"", tokens, self.block_size)
        for key, block_id in zip(keys, block_ids.ravel().tolist(), strict=False):
            self.ids.setdefault(key, block_id)


def _digests(make: Callable[..., Any], parent: bytes, data: memoryview, step: int) -> Iterable:
    for start in range(0, len(data) - step + 1, step):
        parent = make(parent + data[start : start + step]).digest()
        yield parent


def chain_blake2b(parent: bytes, tokens: np.ndarray, block_size: int) -> Iterable:
    def make(data: bytes) -> Any:
        return hashlib.blake2b(data, digest_size=16)

    return _digests(make, parent, memoryview(tokens).cast("B"), 4 * block_size)


def chain_sha256(parent: bytes, tokens: np.ndarray, block_size: int) -> Iterable:
    return _digests(hashlib.sha256, parent, memoryview(tokens).cast("B"), 4 * block_size)


def chain_tuple(parent: Any, tokens: np.ndarray, block_size: int) -> Iterable:
    items = tokens.tolist()
    for start in range(0, len(items) - block_size + 1, block_size):
        parent = hash((parent, *items[start : start + block_size]))
        yield parent


PROVIDERS: dict[str, Callable[[int], Any]] = {
    "dict of blake2b": lambda block_size: HashIndex(block_size, chain_blake2b),
    "dict of sha256": lambda block_size: HashIndex(block_size, chain_sha256),
    "dict of tuple hashes": lambda block_size: HashIndex(block_size, chain_tuple),
    "radix tree": RadixIndex,
}

FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "int32": lambda tokens: tokens,
    "int64": lambda tokens: tokens.astype(np.int64),
    "array q": lambda tokens: array.array("q", tokens.tolist()),
    "list": lambda tokens: tokens.tolist(),
}


@dataclass(frozen=True)
class Workload:
    """Prompts in groups; those of a group share their first tokens."""

    num_prompts: int
    num_tokens: int
    num_shared: int
    num_groups: int
    block_size: int

    def prompts(self) -> list[np.ndarray]:
        rng = np.random.default_rng(0)
        draw = lambda size: rng.integers(0, 128_000, size, dtype=np.int32)  # noqa: E731
        fronts = [draw(self.num_shared) for _ in range(self.num_groups)]
        rest = self.num_tokens - self.num_shared
        return [
            np.concatenate([fronts[i % self.num_groups], draw(rest)])
            for i in range(self.num_prompts)
        ]

    def block_ids(self, prompt: int) -> np.ndarray:
        per_prompt = self.num_tokens // self.block_size
        first = prompt * per_prompt
        return np.arange(first, first + per_prompt, dtype=np.int32).reshape(-1, 1)


# "one block a run" is the worst case for memory; it comes first, while the heap is empty.
# "long": 32k tokens among a million blocks. "agents": the load that other
# engines' indexes were measured with.
CASES = {
    "one block a run": Workload(1_000_000, 64, 0, 1, 64),
    "long": Workload(1985, 32768, 512, 10, 64),
    "agents, block 16": Workload(10_000, 2048, 1024, 100, 16),
    "agents, block 64": Workload(10_000, 2048, 1024, 100, 64),
}


def summary(samples: Sequence[float], per: int = 1) -> dict[str, float]:
    times = sorted(sample / per * 1e6 for sample in samples)
    return {
        "median_us": round(statistics.median(times), 3),
        "p90_us": round(times[int(0.9 * (len(times) - 1))], 3),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def fill(index: Any, workload: Workload, prompts: list[np.ndarray]) -> None:
    for i, tokens in enumerate(prompts):
        index.insert(tokens, workload.block_ids(i))


def ids_of(answer: Any) -> list[int]:
    return answer if isinstance(answer, list) else answer.block_ids.ravel().tolist()


def check_agreement(indexes: dict[str, Any], prompts: list[np.ndarray]) -> None:
    """Prompts that end after a randomly drawn block are asked for, too."""
    rng = np.random.default_rng(1)
    for tokens in prompts[:: max(1, len(prompts) // 200)]:
        changed = tokens.copy()
        changed[rng.integers(len(tokens))] += 1
        for asked in (tokens, changed):
            expected, *others = [ids_of(index.match(asked)) for index in indexes.values()]
            if any(other != expected for other in others):
                raise SystemExit(f"providers disagree on a prompt of {len(asked)} tokens")


def time_match(name: str, workload: Workload, num_rounds: int) -> None:
    """Match whole cached prompts, in an order in which none is still in a near cache."""
    prompts = workload.prompts()
    indexes = {provider: make(workload.block_size) for provider, make in PROVIDERS.items()}
    for index in indexes.values():
        fill(index, workload, prompts)
    check_agreement(indexes, prompts)
    num_blocks = indexes["radix tree"].num_blocks

    rng = np.random.default_rng(2)
    times: dict[str, list[float]] = {provider: [] for provider in indexes}
    order = rng.permutation(len(prompts))
    for start in range(0, min(len(order), 100 * num_rounds), 20):
        for provider, index in indexes.items():
            for i in order[start : start + 20]:
                tokens = prompts[i]
                times[provider].append(seconds_of(lambda m=index.match, t=tokens: m(t)))
    ours = statistics.median(times["radix tree"])
    for provider, samples in times.items():
        median = statistics.median(samples)
        print_line(
            case=f"match, {name}",
            provider=provider,
            num_blocks=num_blocks,
            num_tokens=workload.num_tokens,
            **summary(samples),
            per_s=round(1 / median),
            times_as_long_as_radix_tree=median / ours,
        )

    tree = indexes["radix tree"]
    for form, convert in FORMS.items():
        count = min(len(prompts), 1000)
        asked = [convert(tokens) for tokens in prompts[:count]]
        samples = [
            seconds_of(lambda a=asked: [tree.match(t) for t in a]) for _ in range(num_rounds)
        ]
        figures = summary(samples, count)
        print_line(
            case=f"match in a loop, {name}",
            provider="radix tree",
            tokens=form,
            **figures,
            per_s=round(1e6 / figures["median_us"]),
        )


def time_insert(name: str, workload: Workload, num_rounds: int) -> None:
    """Fill an empty index; then another as a server does, with a match before each insert."""
    prompts = workload.prompts()
    ids = [workload.block_ids(i) for i in range(len(prompts))]

    def insert_all(index: Any) -> None:
        for tokens, block_ids in zip(prompts, ids, strict=True):
            index.insert(tokens, block_ids)

    def match_and_insert_all(index: Any) -> None:
        for tokens, block_ids in zip(prompts, ids, strict=True):
            index.match(tokens)
            index.insert(tokens, block_ids)

    for what, run in (("insert", insert_all), ("match and insert", match_and_insert_all)):
        samples: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
        for _ in range(min(num_rounds, 3)):  # the dicts take seconds
            for provider, make in PROVIDERS.items():
                index = make(workload.block_size)
                samples[provider].append(seconds_of(lambda r=run, i=index: r(i)))
                del index
                gc.collect()
        ours = statistics.median(samples["radix tree"])
        for provider, times in samples.items():
            median = statistics.median(times)
            print_line(
                case=f"{what}, {name}",
                provider=provider,
                **summary(times, len(prompts)),
                per_s=round(len(prompts) / median),
                times_as_long_as_radix_tree=median / ours,
            )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def measure_memory_and_eviction(name: str, workload: Workload) -> None:
    """Bytes per block beyond its token ids, then the time to evict all blocks."""
    prompts = workload.prompts()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the index would reuse memory that the last case freed
    before = resident_bytes()
    index = RadixIndex(workload.block_size)
    fill(index, workload, prompts)
    grown = resident_bytes() - before
    stats = index.stats()
    print_line(
        case=f"memory, {name}",
        provider="radix tree",
        num_blocks=stats.num_blocks,
        num_runs=stats.num_runs,
        token_bytes_per_block=4 * workload.block_size,
        overhead_bytes_per_block=round(stats.overhead_bytes / stats.num_blocks, 1),
        resident_overhead_bytes_per_block=round((grown - stats.token_bytes) / stats.num_blocks, 1),
    )
    for batch in (1, 100):
        count = max(1, min(2000, index.num_blocks // (4 * batch)))
        times = [seconds_of(lambda b=batch: index.evict(b)) for _ in range(count)]
        print_line(case=f"evict {batch}, {name}", provider="radix tree", **summary(times))
    left = index.num_blocks
    seconds = seconds_of(lambda: index.evict(left))
    print_line(
        case=f"evict all, {name}",
        provider="radix tree",
        num_blocks=left,
        blocks_per_s=round(left / seconds),
    )


def main(case_filter: str, num_rounds: int) -> None:
    """Print one JSON line for each case and provider."""
    for name, workload in CASES.items():
        if case_filter not in name:
            continue
        measure_memory_and_eviction(name, workload)
        if workload.num_shared == 0:
            continue  # no prompt to match
        time_match(name, workload, num_rounds)
        time_insert(name, workload, num_rounds)
