"""A process that uses a disk tier, for the tests that kill it or run several at once.

python disk_process.py PATH CAPACITY SEED SECONDS: puts, gets and deletes blocks at random, prints
"ready" before the first and one line of JSON at the end. Never imports torch: it starts fast.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from sample_blocks import LARGE_LAYOUT, make_keys, make_payload, make_record

from prefixstore.errors import BlockCorrupted
from prefixstore.record import decode
from prefixstore.tiers.disk import DiskTier, DiskTierConfig

KEYS = make_keys(60) + make_keys(30, LARGE_LAYOUT)


def main() -> None:
    path, capacity_bytes, seed, seconds = sys.argv[1:]
    random = np.random.default_rng(int(seed))
    tier = DiskTier(DiskTierConfig(Path(path), int(capacity_bytes), timeout_s=30))
    num_puts = num_hits = num_corrupted = num_wrong = 0
    print("ready", flush=True)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        key = KEYS[random.integers(len(KEYS))]
        what = random.integers(10)
        if what < 5:
            tier.put(key.block_hash, memoryview(make_record(key)))
            num_puts += 1
        elif what == 5:
            tier.delete(key.block_hash)
        else:
            record = bytearray(key.layout.record_bytes)
            payload = np.zeros(key.layout.payload_bytes, np.uint8)
            if tier.get(key.block_hash, memoryview(record)) is None:
                continue
            try:
                decode(record, key, payload)
            except BlockCorrupted:
                num_corrupted += 1
            else:
                num_hits += 1
                num_wrong += not np.array_equal(payload, make_payload(key))
    tier.close()
    counts = {"puts": num_puts, "hits": num_hits, "corrupted": num_corrupted, "wrong": num_wrong}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
