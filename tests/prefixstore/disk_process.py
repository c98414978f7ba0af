"""Processes that use a disk tier, for tests that kill them or run several at once.

python disk_process.py PATH CAPACITY LEASE: for each line "SEED SECONDS" of its input it forks a
process and waits for its end; starting Python each time would take longer than the rest. The
process prints its pid and opens the tier; with a long lease it also recounts the tier and reads all
that it serves; it prints what it found. Then it puts, gets and deletes blocks at random, and prints
its counts after each put. It fails at the first wrong byte. Each print is one line of JSON. Never
imports torch, to start fast.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import numpy as np
from sample_blocks import LARGE_LAYOUT, make_keys, make_payload, make_record

from prefixstore.errors import TierFull, TierTimeout
from prefixstore.record import BlockKey, RecordLayout, decode
from prefixstore.tiers.disk import DiskTier, DiskTierConfig
from prefixstore.tiers.disk import opening as disk_opening
from prefixstore.tiers.disk.index import SlotIndex

# a megabyte, so that a kill may come in the middle of the system call that writes it
HUGE_LAYOUT = RecordLayout(8, 4, 64, 128, "bfloat16")
KEYS = make_keys(60) + make_keys(30, LARGE_LAYOUT) + make_keys(20, HUGE_LAYOUT)
PAYLOADS = [make_payload(key) for key in KEYS]
RECORDS = [make_record(key) for key in KEYS]
LONG_LEASE_S = 60
COUNT_WRITING = "SELECT count(*) FROM slots WHERE state = 1"


num_cut_off = 0
reconcile = disk_opening.reconcile


def counting_reconcile(sql, *arguments) -> None:
    """Wrap reconciling: count the writes found cut off, and check that they are mended."""
    global num_cut_off
    num_cut_off = sql.execute(COUNT_WRITING).fetchone()[0]
    reconcile(sql, *arguments)
    assert sql.execute(COUNT_WRITING).fetchone()[0] == 0


def count_writing(index: SlotIndex) -> int:
    with index.frozen() as sql:
        return sql.execute(COUNT_WRITING).fetchone()[0]


def serves(tier: DiskTier, key: BlockKey, payload: np.ndarray) -> bool:
    """Whether the tier has the block; raises if what it has is not exactly right."""
    record, found = bytearray(key.layout.record_bytes), np.zeros_like(payload)
    num_read = tier.get(key.name, memoryview(record))
    if num_read is None:
        return False
    decode(record[:num_read], key, found)
    assert np.array_equal(found, payload), f"wrong payload of {key.block_hash.hex()}"
    return True


def count_served(tier: DiskTier) -> int:
    return sum(map(serves, [tier] * len(KEYS), KEYS, PAYLOADS))


def count_found(tier: DiskTier) -> int:
    return sum(tier.contains_many([key.name for key in KEYS]))


def work(path: Path, capacity_bytes: int, lease_s: float, seed: int, seconds: float) -> None:
    random = np.random.default_rng(seed)
    tier = DiskTier(DiskTierConfig(path, capacity_bytes, timeout_s=30, write_lease_s=lease_s))
    if lease_s >= LONG_LEASE_S:
        problems = tier.check()
        assert problems == [], problems
        tell(cut_off=num_cut_off, found=count_found(tier), served=count_served(tier))
    else:  # short lives mostly write; the test looks at what they leave
        tell(cut_off=num_cut_off)
    num_puts = num_hits = num_refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        i = random.integers(len(KEYS))
        what = random.integers(10)
        if what < 5:
            try:
                tier.put(KEYS[i].name, memoryview(RECORDS[i]))
                num_puts += 1
            except (TierFull, TierTimeout):  # slots of dead neighbours, or a lease that ran out
                num_refused += 1
            tell(
                puts=num_puts,
                hits=num_hits,
                refused=num_refused,
                evictions=tier.stats().num_evictions,
            )
        elif what == 5:
            tier.delete(KEYS[i].name)
        else:
            num_hits += serves(tier, KEYS[i], PAYLOADS[i])
    tier.close()


def tell(**what: int) -> None:
    # one system call, so that a kill cannot cut a line in two
    os.write(sys.stdout.fileno(), (json.dumps(what) + "\n").encode())


def main() -> None:
    disk_opening.reconcile = counting_reconcile
    path, capacity_bytes, lease_s = sys.argv[1:]
    for line in sys.stdin:
        seed, seconds = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                tell(pid=os.getpid())
                work(Path(path), int(capacity_bytes), float(lease_s), int(seed), float(seconds))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        tell(exit_code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
