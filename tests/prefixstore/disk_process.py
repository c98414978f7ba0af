"""Processes that use a disk tier, for the tests that kill them or run several at once.

python disk_process.py PATH CAPACITY: for each line "SEED SECONDS" of its input it forks a process
and waits for its end; starting Python each time would take longer than the rest. The process tells
its pid, opens the tier, recounts it, reads all it serves and tells what it found; then it puts,
gets and deletes blocks at random and tells its counts after each put. It fails at the first wrong
byte. Each is one line of JSON. Never imports torch: it starts fast.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from sample_blocks import LARGE_LAYOUT, make_keys, make_payload, make_record

from prefixstore.record import BlockKey, RecordLayout, decode
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.disk_index import SlotIndex

# of a megabyte: a kill may fall into the middle of a system call that writes it
HUGE_LAYOUT = RecordLayout(8, 4, 64, 128, "bfloat16")
KEYS = make_keys(60) + make_keys(30, LARGE_LAYOUT) + make_keys(20, HUGE_LAYOUT)
PAYLOADS = [make_payload(key) for key in KEYS]
RECORDS = [make_record(key) for key in KEYS]


class CountingTier(DiskTier):
    """Counts the writes that it finds cut off, and makes sure that it mends them."""

    num_cut_off = 0

    def _reconcile(self, index: SlotIndex) -> None:
        self.num_cut_off = count_writing(index)
        super()._reconcile(index)
        assert count_writing(index) == 0


def count_writing(index: SlotIndex) -> int:
    with index.frozen() as sql:
        return sql.execute("SELECT count(*) FROM slots WHERE state = 1").fetchone()[0]


def serves(tier: DiskTier, key: BlockKey, payload: np.ndarray) -> bool:
    """Whether it has the block; raises where what it has is not exactly right."""
    record, found = bytearray(key.layout.record_bytes), np.zeros_like(payload)
    num_read = tier.get(key.block_hash, memoryview(record))
    if num_read is None:
        return False
    decode(record[:num_read], key, found)
    assert np.array_equal(found, payload), f"wrong payload of {key.block_hash.hex()}"
    return True


def count_served(tier: DiskTier) -> int:
    return sum(map(serves, [tier] * len(KEYS), KEYS, PAYLOADS))


def count_found(tier: DiskTier) -> int:
    return sum(tier.contains_many([key.block_hash for key in KEYS]))


def work(path: Path, capacity_bytes: int, seed: int, seconds: float) -> None:
    random = np.random.default_rng(seed)
    tier = CountingTier(DiskTierConfig(path, capacity_bytes, timeout_s=30))
    problems = tier.check()
    assert problems == [], problems
    tell(cut_off=tier.num_cut_off, found=count_found(tier), served=count_served(tier))
    num_puts = num_hits = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        i = random.integers(len(KEYS))
        what = random.integers(10)
        if what < 5:
            tier.put(KEYS[i].block_hash, memoryview(RECORDS[i]))
            num_puts += 1
            tell(puts=num_puts, hits=num_hits, evictions=tier.stats().num_evictions)
        elif what == 5:
            tier.delete(KEYS[i].block_hash)
        else:
            num_hits += serves(tier, KEYS[i], PAYLOADS[i])
    tier.close()


def tell(**what: int) -> None:
    # one system call, which a kill does not cut in two
    os.write(sys.stdout.fileno(), (json.dumps(what) + "\n").encode())


def main() -> None:
    path, capacity_bytes = sys.argv[1:]
    for line in sys.stdin:
        seed, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                tell(pid=os.getpid())
                work(Path(path), int(capacity_bytes), int(seed), float(seconds))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        tell(exit_code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
