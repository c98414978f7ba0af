"""Remote tiers: names, expiry, parts, listings, many callers, and a store above them."""

import asyncio
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from obstore.store import LocalStore
from sample_blocks import IDENTITY, LARGE_LAYOUT, LAYOUT, load_block, make_keys, make_record
from tier_kinds import REMOTE, get, held, put, put_many

from prefixstore.errors import TierUnavailable
from prefixstore.record import BlockKey, chain_keys
from prefixstore.store import Store
from prefixstore.tiers.base import Swept
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig
from prefixstore.tiers.remote.records import Records, WriteRecord

BYTES = LAYOUT.record_bytes


@pytest.fixture(params=REMOTE)
def make_remote(request, make_kind):
    def make(**options) -> RemoteTier:
        return make_kind(request.param, 0, **options)

    return make


@pytest.fixture
def directory(tmp_path) -> Path:
    """Directory of the first tier that `make_local` makes."""
    return tmp_path / "0"


@pytest.fixture
def make_local(make_kind):
    def make(**options) -> RemoteTier:
        return make_kind("directory", 0, **options)

    return make


def path_of(directory: Path, key: BlockKey) -> Path:
    digits = key.block_hash.hex()
    return directory / "1" / key.identity.hex() / digits[:2] / f"{digits}.kvb"


def make_older(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_record_is_one_object_of_the_name_that_is_promised(make_local, directory):
    (key,) = make_keys(1)
    put(make_local(), key)
    (file,) = (path for path in directory.rglob("*") if path.is_file())
    assert file == path_of(directory, key)
    assert file.read_bytes() == make_record(key)


def test_records_expire_by_the_time_they_were_written(make_local, directory):
    tier = make_local(ttl_s=3600)
    keys = make_keys(3)
    put_many(tier, keys)
    make_older(path_of(directory, keys[0]), 3601)
    make_older(path_of(directory, keys[1]), 3500)
    assert get(tier, keys[1]) is not None  # a use does not extend its life
    assert held(tier, keys) == [False, True, True]
    assert get(tier, keys[0]) is None
    assert not tier.delete(keys[0].name)
    assert tier.stats().num_expired == 1
    put(tier, keys[0])  # replaces the expired record
    assert get(tier, keys[0]) == make_record(keys[0])
    assert tier.stats().num_puts == 4
    put(tier, keys[1])
    assert tier.stats().num_puts == 4
    make_older(path_of(directory, keys[2]), 3601)
    assert tier.sweep() == Swept(num_expired=1, num_bytes=BYTES)
    assert not path_of(directory, keys[2]).exists()
    assert (tier.stats().num_records, tier.stats().used_bytes) == (2, 2 * BYTES)
    assert tier.stats().num_expired == 2
    assert tier.sweep() == Swept()


def test_a_server_tells_how_old_records_are(make_remote):
    tier = make_remote(ttl_s=2.5)  # servers report whole seconds
    (key,) = make_keys(1)
    put(tier, key)
    assert held(tier, [key]) == [True]
    time.sleep(2.6)
    assert held(tier, [key]) == [False] and get(tier, key) is None
    assert tier.sweep() == Swept(num_expired=1, num_bytes=BYTES)
    put(tier, key)
    assert get(tier, key) == make_record(key)


def test_long_records_go_in_parts_once(make_remote):
    tier = make_remote(part_bytes=5 << 20)
    (key,) = make_keys(1)
    record = np.random.default_rng(0).integers(0, 256, (12 << 20) + 7, dtype=np.uint8)
    for _ in range(2):
        tier.put(key.name, record.data)
    assert tier.stats().num_puts == 1
    out = np.zeros_like(record)
    assert tier.get(key.name, out.data) == record.nbytes
    assert np.array_equal(out, record)
    (outcome,) = tier.get_many([key.name], [out[:1000].data], offsets=[(6 << 20) + 1])
    assert outcome == 1000
    assert np.array_equal(out[:1000], record[(6 << 20) + 1 :][:1000])


class Listening:
    """Objects that report what they are asked to write."""

    def __init__(self) -> None:
        self.written: dict[str, bytes] = {}

    def takes_in_parts(self, num_bytes: int) -> bool:
        return False

    async def create(self, path: str, data: bytes) -> bool:
        self.written[path] = data
        return True


def test_a_write_under_way_does_not_read_the_callers_memory():
    objects, (key,) = Listening(), make_keys(1)
    records = Records("remote", objects, "1", None)
    record = make_record(key)
    write = WriteRecord(records, key.name, memoryview(record))
    write.begin()
    record[:] = bytes(len(record))  # the call has ended, and its buffer is reused
    assert asyncio.run(write.run(lambda piece: None))
    assert objects.written == {records.path(key.name): make_record(key)}


def test_an_identity_of_more_than_a_batch_is_forgotten(make_remote):
    tier = make_remote()
    keys = make_keys(1050)
    put_many(tier, keys)
    tier.delete_identity(IDENTITY)
    assert held(tier, keys) == [False] * 1050
    assert tier.stats().num_deletes == 1050
    tier.delete_identity(IDENTITY)
    assert tier.stats().num_deletes == 1050


def test_pins_nothing(make_remote):
    tier = make_remote()
    (key,) = make_keys(1)
    put(tier, key)
    assert tier.pin_many([key.name]) == [False] == tier.pin_many([key.name], False)


def test_what_it_holds_is_counted_by_a_sweep(make_remote):
    tier = make_remote()
    keys = make_keys(2) + make_keys(1, LARGE_LAYOUT)
    put_many(tier, keys)
    assert (tier.stats().num_records, tier.stats().used_bytes) == (0, 0)
    assert tier.sweep() == Swept()
    used_bytes = 2 * BYTES + LARGE_LAYOUT.record_bytes
    assert (tier.stats().num_records, tier.stats().used_bytes) == (3, used_bytes)


def test_check_tells_what_is_no_record_and_deletes_only_what_is_its_own(make_local, directory):
    tier = make_local()
    keys = make_keys(2)
    put_many(tier, keys)
    short, foreign = path_of(directory, keys[0]), directory / "1" / "notes.txt"
    short.write_bytes(b"")
    foreign.write_text("not ours")
    (directory / "elsewhere").touch()  # not below this version's root
    problems = tier.check()
    assert len(problems) == 2
    assert "expected at least 96 bytes, got 0" in " ".join(problems)
    assert "1/notes.txt: expected the name of a record" in " ".join(problems)
    assert len(tier.check(fix=True)) == 2
    assert not short.exists() and foreign.exists()
    assert held(tier, keys) == [False, True]
    assert len(tier.check()) == 1
    foreign.unlink()


def stage(directory: Path, key: BlockKey, number: int, age_s: float) -> Path:
    """Leave what a write leaves that is cut off."""
    path = path_of(directory, key)
    path = path.with_name(f"{path.name}#{number}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(100))
    make_older(path, age_s)
    return path


def test_the_client_writes_files_under_the_name_that_is_searched_for(tmp_path):
    (key,) = make_keys(1)
    record, seen = path_of(tmp_path, key), set()

    def pieces():
        for _ in range(2):
            yield bytes(6 << 20)
            seen.update(path for path in tmp_path.rglob("*") if path.is_file())

    name = str(record.relative_to(tmp_path))
    LocalStore(tmp_path).put(name, pieces(), use_multipart=True)
    assert seen == {record.with_name(f"{record.name}#1")}


@pytest.mark.parametrize("fix", ["sweep", "check"])
def test_what_is_left_of_writes_that_were_cut_off_is_given_back(make_local, directory, fix):
    tier = make_local()
    keys = make_keys(3)
    put_many(tier, keys[:2])
    old = [stage(directory, keys[1], 1, 3700), stage(directory, keys[2], 23, 3700)]
    young = stage(directory, keys[2], 1, 3500)
    foreign = directory / "1" / "notes.kvb#1"
    foreign.write_text("not ours")
    make_older(foreign, 3700)
    (problem,) = tier.check()
    assert "expected no writes that were cut off, got 2" in problem
    if fix == "sweep":
        assert tier.sweep() == Swept(num_orphans=2, num_bytes=200)
    else:
        assert tier.check(fix=True) == [problem]
    assert not any(path.exists() for path in old)
    assert young.exists() and foreign.exists()
    assert held(tier, keys) == [True, True, False]
    assert tier.check() == [] and tier.sweep() == Swept()


def test_forgetting_an_identity_removes_what_is_left_of_its_writes(make_local, directory):
    tier = make_local()
    (key,) = make_keys(1)
    (other,) = chain_keys(LAYOUT, bytes(16), key.tokens)
    put_many(tier, [key, other])
    own = [stage(directory, key, 1, 0), stage(directory, key, 2, -60)]
    kept = stage(directory, other, 1, 0)
    tier.delete_identity(key.identity)
    assert kept.exists() and not any(path.exists() for path in own)
    assert held(tier, [key, other]) == [False, True]


@pytest.mark.parametrize("target", ["itself", "nothing"])
def test_a_link_to_no_object_is_none_and_is_replaced(make_local, directory, target):
    tier = make_local()
    keys = make_keys(3)
    put_many(tier, keys)
    place = path_of(directory, keys[0])
    place.unlink()
    place.symlink_to(place if target == "itself" else directory / target)
    assert held(tier, keys) == [False, True, True] and get(tier, keys[0]) is None
    assert tier.list_identities()[IDENTITY].num_records == 2
    put_many(tier, keys)
    assert held(tier, keys) == [True, True, True]
    place.with_name("strange").symlink_to("strange")
    assert tier.sweep() == Swept() and tier.check() == []
    tier.delete_identity(IDENTITY)
    assert held(tier, keys) == [False, False, False]


def test_a_record_whose_place_is_taken_is_not_kept(make_local, directory):
    tier = make_local()
    keys = make_keys(2)
    path_of(directory, keys[0]).mkdir(parents=True)
    records = [memoryview(make_record(key)) for key in keys]
    taken, kept = tier.put_many([key.name for key in keys], records)
    assert isinstance(taken, TierUnavailable) and kept is None
    assert held(tier, keys) == [False, True]


def test_check_tells_no_more_than_anyone_reads(make_local, directory):
    tier = make_local()
    put_many(tier, make_keys(1))
    for number in range(150):
        (directory / "1" / f"{number}").touch()
    problems = tier.check()
    assert len(problems) == 101 and problems[-1] == "remote: 150 such in all"
    for number in range(150):
        (directory / "1" / f"{number}").unlink()


def test_a_truncated_object_is_a_miss_and_is_deleted(make_local, directory, open_tiers):
    tier = make_local()
    keys = make_keys(2)
    put_many(tier, keys)
    path = path_of(directory, keys[0])
    path.write_bytes(path.read_bytes()[: BYTES - 100])
    out = bytearray(BYTES)
    assert tier.get(keys[0].name, memoryview(out)) == BYTES - 100
    open_tiers.clear()  # the store closes it
    with Store([tier]) as store:
        payload = np.zeros(LAYOUT.block_bytes, np.uint8)
        assert load_block(store, keys[0], payload) is None
        assert load_block(store, keys[1], payload) == "remote"
    assert not path.exists()


def test_many_callers_share_its_bounds(make_remote):
    tier = make_remote(max_requests=6, max_in_flight_bytes=4 * LARGE_LAYOUT.record_bytes)
    keys = make_keys(30) + make_keys(10, LARGE_LAYOUT)
    problems: list[str] = []

    def work(thread: int) -> None:
        random = np.random.default_rng(thread)
        for _ in range(5):
            chosen = [keys[i] for i in random.permutation(len(keys))[:12]]
            put_many(tier, chosen)
            outs = [bytearray(key.layout.record_bytes) for key in chosen]
            outcomes = tier.get_many([key.name for key in chosen], list(map(memoryview, outs)))
            if outcomes != [len(out) for out in outs]:
                problems.append(f"thread {thread}: {outcomes}")
            if outs != [make_record(key) for key in chosen]:
                problems.append(f"thread {thread}: wrong bytes")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_two_tiers_of_one_place_see_the_same(s3_server, open_tiers):
    config = RemoteTierConfig.from_url(s3_server.url("shared-by-two"))
    first, second = RemoteTier(config), RemoteTier(config)
    open_tiers += [first, second]
    keys = make_keys(3)
    put_many(first, keys)
    assert held(second, keys) == [True] * 3
    put_many(second, keys)
    assert second.stats().num_puts == 0
    assert get(second, keys[1]) == make_record(keys[1])
    second.delete_identity(IDENTITY)
    assert held(first, keys) == [False] * 3
