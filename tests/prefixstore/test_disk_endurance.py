"""A disk tier over a long time and with many records: its use of disk, memory and time."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from disk_tiers import Clock, open_tier

from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.base import Swept
from prefixstore.tiers.pages import PAGE_BYTES, page_aligned

CAPACITY = 2 << 20
STEP_S = 120
STEPS_AN_HOUR = 3600 // STEP_S


def disk_bytes(path: Path) -> int:
    """Bytes that the payload files take, as the file system counts them."""
    return sum(file.stat().st_blocks * 512 for file in path.glob("slab-*"))


def index_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("index.sqlite*"))


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(120)
def test_a_day_of_churn_stays_within_disk_and_memory(tmp_path):
    """Ten times as many records as fit, of three sizes, put, read, deleted and expired.

    A few calls stand for two minutes. At every sample the files are within the bound, and from the
    sixth hour on neither the process nor the index grows.
    """
    random = np.random.default_rng(0)
    clock = Clock()
    tier = open_tier(
        tmp_path, capacity_bytes=CAPACITY, slab_bytes=CAPACITY // 8, ttl_s=900, clock=clock
    )
    sizes = [3000, 7000, 20_000]
    num_names = 10 * CAPACITY // (sum(sizes) // 3)
    names = [RecordName(bytes(16), BlockHash(random.bytes(16))) for _ in range(num_names)]
    rows = page_aligned(32 * 5 * PAGE_BYTES).reshape(32, -1)
    rows[:] = 1
    memory, index = [], []
    for step in range(24 * STEPS_AN_HOUR):
        clock.seconds += STEP_S
        size = sizes[step // STEPS_AN_HOUR % 3]  # alternate, so that slabs change theirs
        drawn = [names[n] for n in random.integers(0, num_names, 32)]
        records = [row[:size].data for row in rows]
        assert tier.put_many(drawn, records) == [None] * 32
        tier.get_many(drawn[::3], [row.data for row in rows[::3]])
        tier.delete_many(drawn[::7])
        if step % 5 == 0:
            assert disk_bytes(tmp_path) <= CAPACITY
            assert tier.stats().used_bytes <= CAPACITY
        if step % STEPS_AN_HOUR == STEPS_AN_HOUR - 1:
            tier.sweep()
            memory.append(resident_bytes())
            index.append(index_bytes(tmp_path))
    stats = tier.stats()
    assert stats.written_bytes > 50 * CAPACITY
    assert min(stats.num_evictions, stats.num_expired, stats.num_hits) > 1000
    # Memory that other tests left is at times freed and taken again.
    assert max(memory[6:]) - max(memory[:6]) < 4 << 20
    assert max(index) <= 2 * index[5]
    tier.close()


@pytest.mark.timeout(120)
def test_many_records_are_there_at_once(tmp_path):
    """A tier of 20,000 records opens without reading each; `bench tiers` times 100,000."""
    capacity_bytes = 20_000 * PAGE_BYTES
    random = np.random.default_rng(0)
    names = [RecordName(bytes(16), BlockHash(random.bytes(16))) for _ in range(20_000)]
    rows = [row.data for row in page_aligned(1000 * PAGE_BYTES).reshape(1000, -1)]
    tier = open_tier(tmp_path, capacity_bytes=capacity_bytes)
    for start in range(0, len(names), len(rows)):
        assert not any(tier.put_many(names[start : start + len(rows)], rows))
    seconds = []
    for _ in range(3):
        tier.close()
        before = time.perf_counter()
        tier = open_tier(tmp_path, capacity_bytes=capacity_bytes)
        seconds.append(time.perf_counter() - before)
    assert all(tier.contains_many(names))
    assert min(seconds) < 1
    assert tier.sweep() == Swept()
    tier.close()
