"""Putting into and getting out of tiers, against plain copies and plain files in the same run.

python bench/bench_tiers.py [--dir DIR] [--rounds N]: one JSON line per case and provider, GB/s of
records. Files are read back from the page cache: this measures the tier, not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np

from prefixstore.record import BlockHash, RecordLayout, chain_keys, encode
from prefixstore.tiers.base import Tier, page_aligned
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.memory import MemoryTier, MemoryTierConfig

CASES = {
    "smollm2-135m, 1.5 MB": RecordLayout(30, 3, 64, 64, "bfloat16"),
    "llama-3-8b, 8.4 MB": RecordLayout(32, 8, 128, 64, "bfloat16"),
    "small, 100 KB": RecordLayout(6, 1, 64, 64, "bfloat16"),
}
TOTAL_BYTES = 128 << 20


class Provider(Protocol):
    def put(self, index: int, record: np.ndarray) -> None: ...
    def get(self, index: int, out: np.ndarray) -> None: ...
    def close(self) -> None: ...


class Copies:
    """The memory limit: numpy copies into an array."""

    def __init__(self, hashes: list[BlockHash], record_bytes: int, path: Path) -> None:
        self._arena = page_aligned(len(hashes) * record_bytes).reshape(len(hashes), -1)

    def put(self, index: int, record: np.ndarray) -> None:
        np.copyto(self._arena[index], record)

    def get(self, index: int, out: np.ndarray) -> None:
        np.copyto(out, self._arena[index])

    def close(self) -> None:
        self._arena = page_aligned(0)


class PlainFile:
    """The disk limit: one file, pwrite and preadv at fixed offsets."""

    def __init__(self, hashes: list[BlockHash], record_bytes: int, path: Path) -> None:
        self._record_bytes = record_bytes
        self._path = path / "plain"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT)

    def put(self, index: int, record: np.ndarray) -> None:
        os.pwrite(self._fd, record.data, index * self._record_bytes)

    def get(self, index: int, out: np.ndarray) -> None:
        os.preadv(self._fd, [out.data], index * self._record_bytes)

    def close(self) -> None:
        os.close(self._fd)
        self._path.unlink()


class OneTier:
    """A tier under the bench's indices."""

    def __init__(self, tier: Tier, hashes: list[BlockHash]) -> None:
        self._tier = tier
        self._hashes = hashes

    def put(self, index: int, record: np.ndarray) -> None:
        self._tier.put(self._hashes[index], record.data)

    def get(self, index: int, out: np.ndarray) -> None:
        assert self._tier.get(self._hashes[index], out.data) == out.nbytes

    def close(self) -> None:
        self._tier.close()


def make_memory(hashes: list[BlockHash], record_bytes: int, path: Path) -> OneTier:
    return OneTier(MemoryTier(MemoryTierConfig(2 * TOTAL_BYTES)), hashes)


def make_disk(hashes: list[BlockHash], record_bytes: int, path: Path) -> OneTier:
    return OneTier(DiskTier(DiskTierConfig(path / "tier", 2 * TOTAL_BYTES)), hashes)


PROVIDERS = {
    "numpy copy": Copies,
    "memory tier": make_memory,
    "plain file": PlainFile,
    "disk tier": make_disk,
}


def run(provider: Provider, records: np.ndarray, order: np.ndarray) -> tuple[float, float]:
    """GB/s of first writes and of reads in random order, checked."""
    out = page_aligned(records.shape[1])
    started = time.perf_counter()
    for index in range(len(records)):
        provider.put(index, records[index])
    written = time.perf_counter()
    for index in order:
        provider.get(index, out)
    read = time.perf_counter()
    assert np.array_equal(out, records[order[-1]])
    size = records.nbytes / 1e9
    return size / (written - started), size / (read - written)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=None, help="where the files go")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(argv)
    for case, layout in CASES.items():
        num_records = TOTAL_BYTES // layout.record_bytes
        tokens = np.arange(num_records * layout.block_size)
        keys = chain_keys(layout, bytes(16), tokens)
        records = page_aligned(num_records * layout.record_bytes).reshape(num_records, -1)
        payload = np.resize(np.arange(251, dtype=np.uint8), layout.payload_bytes)
        for key, record in zip(keys, records, strict=True):
            encode(key, payload, record)
        hashes = [key.block_hash for key in keys]
        order = np.random.default_rng(0).permutation(num_records)
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in PROVIDERS}
        for _ in range(options.rounds):
            for name, make in PROVIDERS.items():  # in turn: noise meets all alike
                with tempfile.TemporaryDirectory(dir=options.dir) as path:
                    provider = make(hashes, layout.record_bytes, Path(path))
                    rates[name].append(run(provider, records, order))
                    provider.close()
        for name, values in rates.items():
            puts, gets = zip(*values, strict=True)
            line = {
                "case": case,
                "provider": name,
                "record_bytes": layout.record_bytes,
                "put_gb_per_s": round(statistics.median(puts), 2),
                "get_gb_per_s": round(statistics.median(gets), 2),
                "num_rounds": options.rounds,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
