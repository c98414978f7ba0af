"""Requests that go on while something breaks, and what they saw."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
from sample_blocks import LARGE_LAYOUT, make_keys, make_payload

from prefixstore.block_key import BlockKey
from prefixstore.store import Store
from prefixstore.store.block_sources import HostBlock
from prefixstore.store.block_targets import HostBlocks

BLOCKS_PER_PROMPT = 24
NUM_PROMPTS = 60


@dataclass
class Seen:
    """Results of requests.

    Attributes:
        num_requests: Requests that ended.
        num_failed: Requests that raised.
        num_wrong: Blocks that were not the right ones.
        num_hits: Blocks that came from a tier.
        num_misses: Blocks that were computed.
        longest_s: The longest that one request waited for the store.
        errors: What was raised.
    """

    num_requests: int = 0
    num_failed: int = 0
    num_wrong: int = 0
    num_hits: int = 0
    num_misses: int = 0
    longest_s: float = 0.0
    errors: set[str] = field(default_factory=set)


class Traffic:
    """Threads that serve prompts through a store, as a cache does, until they are stopped.

    A prompt is a chain of blocks. A request looks all of them up, loads the run that is there,
    compares every byte, "computes" the rest and saves it.
    """

    def __init__(self, store: Store, num_threads: int = 2, num_prompts: int = NUM_PROMPTS) -> None:
        self.seen = Seen()
        self._store = store
        self._prompts = [
            make_keys(BLOCKS_PER_PROMPT, LARGE_LAYOUT, seed) for seed in range(num_prompts)
        ]
        self._payloads = {
            key.block_hash: make_payload(key) for prompt in self._prompts for key in prompt
        }
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._serve, args=(seed,)) for seed in range(num_threads)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def wait_requests(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait for so many more requests."""
        ends_at = time.monotonic() + timeout_s
        wanted = self.seen.num_requests + count
        while self.seen.num_requests < wanted:
            assert time.monotonic() < ends_at, f"expected {count} requests within {timeout_s} s"
            time.sleep(0.005)

    def _serve(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        outs = [bytearray(LARGE_LAYOUT.block_bytes) for _ in range(BLOCKS_PER_PROMPT)]
        while not self._is_over.is_set():
            prompt = self._prompts[random.integers(len(self._prompts))]
            try:
                num_hits, num_wrong, waited_s = self._request(prompt, outs)
            except Exception as error:  # any error fails the request
                with self._lock:
                    self.seen.num_requests += 1
                    self.seen.num_failed += 1
                    self.seen.errors.add(repr(error))
                continue
            with self._lock:
                self.seen.num_requests += 1
                self.seen.longest_s = max(self.seen.longest_s, waited_s)
                self.seen.num_hits += num_hits
                self.seen.num_misses += len(prompt) - num_hits
                self.seen.num_wrong += num_wrong
            time.sleep(0.002)  # the model's own time

    def _request(self, prompt: list[BlockKey], outs: list[bytearray]) -> tuple[int, int, float]:
        """Blocks found, how many of them were wrong, and how long the store took."""
        started = time.monotonic()
        deadline = self._store.deadline()
        there = self._store.contains_many(prompt, deadline)
        num_there = next((i for i, name in enumerate(there) if name is None), len(prompt))
        wanted = prompt[:num_there]
        found = self._store.load_many(wanted, HostBlocks(outs[:num_there]), deadline)
        loaded = time.monotonic()
        num_hits = next((i for i, name in enumerate(found) if name is None), num_there)
        num_wrong = sum(
            name is not None and out != self._payloads[key.block_hash].tobytes()
            for name, key, out in zip(found, wanted, outs, strict=False)
        )
        computed = time.monotonic()
        for key in prompt[num_hits:]:
            self._store.save(key, HostBlock(self._payloads[key.block_hash]))
        return num_hits, num_wrong, loaded - started + time.monotonic() - computed
