"""Compare protecting and opening records with a plain copy and with alternatives.

A run is a batch of records. `protect` begins with the record and ends with its protected form in
another buffer; `open` begins with the arrival of a protected record, a copy, and ends with the
verified record in that buffer. The others are lower bounds of alternatives: a MAC from the
standard library over a record, or AES-GCM in one call.
"""

import hashlib
import hmac
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.harness import check_agreement, make_cold, run_case
from prefixstore.block_key import BlockKey
from prefixstore.protection import RecordKey
from prefixstore.record import RecordLayout, chain_keys, encode
from prefixstore.record_header import AUTHENTICATED, SEALED, TRAILER_BYTES
from prefixstore.tiers.pages import page_aligned

BATCH_BYTES = 16 << 20  # of records in a run
MIN_RECORDS = 4  # so that two threads can share a batch
LAYOUTS = {
    "small": RecordLayout(6, 1, 64, 64, "bfloat16"),
    "smollm2_135m": RecordLayout(30, 3, 64, 64, "bfloat16"),
    "llama3_8b": RecordLayout(32, 8, 128, 64, "bfloat16"),
}

SECRET = bytes(range(32))
KEYS = {"authenticated": RecordKey(SECRET, AUTHENTICATED), "sealed": RecordKey(SECRET, SEALED)}
NUM_THREADS = 2


@dataclass
class Job:
    """A record, and a buffer with room for its protected form."""

    key: BlockKey
    record: np.ndarray
    protected: dict[str, np.ndarray]
    out: np.ndarray


Run = Callable[[Job], None]
Batches = dict[str, list[Job]]  # of each provider, so that none finds another's data in the caches


def copy_record(job: Job) -> None:
    np.copyto(job.out[: job.record.size], job.record)


def copy_and_blake2b(job: Job) -> None:
    copy_record(job)
    hashlib.blake2b(job.out[: job.record.size], key=SECRET, digest_size=32).digest()


def copy_and_hmac_sha256(job: Job) -> None:
    copy_record(job)
    hmac.new(SECRET, job.out[: job.record.size], "sha256").digest()


def aes_gcm(job: Job) -> None:
    out = job.out.data[: job.record.size + 16]
    AESGCM(SECRET).encrypt_into(bytes(12), job.record, None, out)


def copy_and_aes_gcm(job: Job) -> None:
    """For both directions, since opening takes the same arithmetic as sealing."""
    copy_record(job)
    aes_gcm(job)


def protect(kind: str, job: Job) -> None:
    KEYS[kind].protect(job.key.name, job.record.data, job.out.data)


def open_record(kind: str, job: Job) -> None:
    np.copyto(job.out, job.protected[kind])
    KEYS[kind].open(job.out.data)


PROVIDERS: dict[str, dict[str, Run]] = {
    "protect": {
        "copy": copy_record,
        "copy_and_blake2b": copy_and_blake2b,
        "copy_and_hmac_sha256": copy_and_hmac_sha256,
        "aes_gcm": aes_gcm,
        **{f"kvkernels_{kind}": partial(protect, kind) for kind in KEYS},
    },
    "open": {
        "copy": copy_record,
        "copy_and_blake2b": copy_and_blake2b,
        "copy_and_hmac_sha256": copy_and_hmac_sha256,
        "copy_and_aes_gcm": copy_and_aes_gcm,
        **{f"kvkernels_{kind}": partial(open_record, kind) for kind in KEYS},
    },
}


def batch_size(layout: RecordLayout) -> int:
    return max(MIN_RECORDS, BATCH_BYTES // layout.record_bytes)


def make_jobs(layout: RecordLayout, num_records: int) -> list[Job]:
    tokens = np.arange(num_records * layout.block_size)
    payload = np.frombuffer(os.urandom(layout.payload_bytes), np.uint8)
    jobs = []
    for key in chain_keys(layout, bytes(16), tokens):
        record, out = (page_aligned(layout.record_bytes + TRAILER_BYTES) for _ in range(2))
        record = record[: layout.record_bytes]
        encode(key, payload, record)
        protected = {}
        for kind, record_key in KEYS.items():
            protected[kind] = np.empty_like(out)
            record_key.protect(key.name, record.data, protected[kind].data)
        jobs.append(Job(key, record, protected, out))
    return jobs


def make_batches(layout: RecordLayout, names: Sequence[str]) -> Batches:
    return {name: make_jobs(layout, batch_size(layout)) for name in names}


def run_in_turn(name: str, run: Run, batches: Batches) -> None:
    for job in batches[name]:
        run(job)


def run_in_threads(pool: ThreadPoolExecutor, name: str, run: Run, batches: Batches) -> None:
    list(pool.map(run, batches[name]))


def check(runs: Mapping[str, Run], what: str, layout: RecordLayout) -> None:
    """Raise unless every provider that changes the record also restores it."""
    (job,) = make_jobs(layout, 1)
    results = {}
    for name, run in runs.items():
        if name.endswith("aes_gcm"):
            continue
        job.out[:] = 0xEE
        run(job)
        if what == "protect" and name.startswith("kvkernels_"):
            KEYS[name.removeprefix("kvkernels_")].open(job.out.data)
        results[name] = [torch.from_numpy(job.out[: job.record.size].copy())]
    check_agreement(results, "copy", 0.0)


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for what, runs in PROVIDERS.items():
        for model, layout in LAYOUTS.items():
            case = f"{what}_{model}"
            if case_filter not in case:
                continue
            check(runs, what, layout)
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                providers = {name: partial(run_in_turn, name, run) for name, run in runs.items()}
                for name in [name for name in runs if name.startswith("kvkernels_")]:
                    threaded = f"{name}_{NUM_THREADS}_threads"
                    providers[threaded] = partial(run_in_threads, pool, threaded, runs[name])
                names = list(providers)
                num_bytes = 2 * layout.record_bytes * batch_size(layout)  # read and written
                inputs = make_cold(partial(make_batches, layout, names), num_bytes)
                run_case(case, providers, inputs, num_rounds, num_bytes)
