"""Encoding and decoding records against a plain copy of the payload, in the same run.

python bench/bench_record.py [--seconds S]: one JSON line per case and provider, GB/s of payload.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from prefixstore.checksum import checksum_words
from prefixstore.record import BlockKey, RecordLayout, chain_keys, decode, encode
from prefixstore.tiers.base import page_aligned

CASES = {
    "gemma3-270m sliding, 64 tokens": RecordLayout(15, 1, 256, 64, "bfloat16"),
    "smollm2-135m, 64 tokens": RecordLayout(30, 3, 64, 64, "bfloat16"),
    "llama-3-8b, 64 tokens": RecordLayout(32, 8, 128, 64, "bfloat16"),
    "llama-3-8b, 256 tokens": RecordLayout(32, 8, 128, 256, "bfloat16"),
}
WORKING_SET_BYTES = 256 << 20  # the pool side is far larger than the caches, as it is in use


class Blocks:
    """Pool blocks that are visited in turn, and one warm record buffer."""

    def __init__(self, layout: RecordLayout) -> None:
        num_blocks = max(WORKING_SET_BYTES // layout.payload_bytes, 2)
        self.key: BlockKey = chain_keys(layout, bytes(16), range(layout.block_size))[0]
        pool = page_aligned(num_blocks * layout.payload_bytes)
        pool[:] = np.resize(np.arange(251, dtype=np.uint8), pool.size)
        self.pool = pool.reshape(num_blocks, -1)
        self.record = page_aligned(layout.record_bytes)
        self.payload = self.record[layout.header_bytes :]
        encode(self.key, self.pool[0], self.record)


PROVIDERS: dict[str, Callable[[Blocks, int], object]] = {
    "numpy copy out of the pool": lambda b, i: np.copyto(b.payload, b.pool[i]),
    "encode": lambda b, i: encode(b.key, b.pool[i], b.record),
    "numpy copy into the pool": lambda b, i: np.copyto(b.pool[i], b.payload),
    "decode": lambda b, i: decode(b.record, b.key, b.pool[i]),
    "checksum_words alone": lambda b, i: checksum_words(b.pool[i]),
}


def check(blocks: Blocks) -> None:
    """Decoding what was encoded gives the payload back."""
    encode(blocks.key, blocks.pool[0], blocks.record)
    decode(blocks.record, blocks.key, blocks.pool[1])
    assert np.array_equal(blocks.pool[0], blocks.pool[1])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case and provider")
    seconds = parser.parse_args(argv).seconds
    for case, layout in CASES.items():
        blocks = Blocks(layout)
        check(blocks)
        rates: dict[str, list[float]] = {name: [] for name in PROVIDERS}
        end = time.perf_counter() + seconds * len(PROVIDERS)
        num_blocks = len(blocks.pool)
        while time.perf_counter() < end or not all(rates.values()):
            for name, provider in PROVIDERS.items():  # in turn: noise meets all alike
                blocks.record[:] = 0
                encode(blocks.key, blocks.pool[0], blocks.record)
                started = time.perf_counter()
                for i in range(num_blocks):
                    provider(blocks, i)
                elapsed = time.perf_counter() - started
                rates[name].append(num_blocks * layout.payload_bytes / elapsed / 1e9)
        for name, values in rates.items():
            line = {
                "case": case,
                "provider": name,
                "record_bytes": layout.record_bytes,
                "gb_per_s_median": round(statistics.median(values), 2),
                "gb_per_s_best": round(max(values), 2),
                "num_runs": len(values),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
