"""Coverage-guided fuzzing of the reader of records, by hand: ``make fuzz FUZZ_SECONDS=600``.

libFuzzer mutates valid records, and most mutants get right checksums again, so that they pass the
first checks and reach the codecs. A record must be refused with `BlockCorrupted`, or decode into
the block's bytes without writing around them; anything else ends the run and shows the input. The
inputs found are then run again with the C++ code under AddressSanitizer, which replaces the hooks
that count coverage and so cannot be used from the start.
"""

from __future__ import annotations

import struct
import sys
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["prefixstore", "kvkernels"]):
    import kvkernels
    from prefixstore import record as records
    from prefixstore.checksum import crc32c
    from prefixstore.errors import BlockCorrupted
    from prefixstore.record_layout import RecordLayout

import numpy as np
import torch

GUARD = 64
LAYOUTS = [RecordLayout(1, 1, 8, 16, "bfloat16", 0, (codec,)) for codec in kvkernels.CODECS]
LAYOUTS += [
    RecordLayout(2, 1, 4, 16, "float16", 0, ("q8", "q2")),
    RecordLayout(1, 2, 12, 16, "float32", 3, ("q4",)),
    RecordLayout(2, 1, 10, 16, "bfloat16", 0, ("q8", "l12"), latent_dim=8),
]


def make_seeds() -> list[tuple[records.BlockKey, bytes]]:
    """A valid record of each layout, and its key."""
    seeds = []
    for layout in LAYOUTS:
        (key,) = records.chain_keys(layout, bytes(16), range(16))
        shape = layout.block_format.layout
        numbers = torch.randn(shape.block_shape, generator=torch.Generator().manual_seed(0))
        block = numbers.to(shape.dtype).view(torch.uint8).numpy().reshape(-1)
        out = bytearray(layout.encode_bytes)
        seeds.append((key, bytes(out[: records.encode(key, block, out)])))
    return seeds


SEEDS = make_seeds()


def mend(data: bytes) -> bytes:
    """The record with right sums of payload and header, as far as it has room for them."""
    record = bytearray(data)
    if len(record) < 96:
        return data
    header_bytes, num_layers, block_size = struct.unpack_from("<6xH4xH4xH", record)
    for layer in range(min(num_layers, 8)):
        entry = 96 + 4 * block_size + 24 * layer
        if entry + 24 > len(record):
            break
        offset, size = struct.unpack_from("<II", record, entry)
        part = bytes(record[offset : offset + size])
        words = np.frombuffer(part[: len(part) // 4 * 4], "<u4").astype(np.uint64)
        weights = np.arange(1, len(words) + 1, dtype=np.uint64)
        sums = (int(words.sum()), int((words * weights).sum()))
        struct.pack_into("<QQ", record, entry + 8, *sums)
    record[80:84] = bytes(4)
    struct.pack_into("<I", record, 80, crc32c(bytes(record[:header_bytes])))
    return bytes(record)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutations; seven of eight get right checksums."""
    mutated = atheris.Mutate(data, max_size)
    return mutated if seed % 8 == 0 else mend(mutated)


def check(data: bytes) -> None:
    """Read a record in every way; only `BlockCorrupted` may be raised."""
    for read in (records.read_header, records.verify):
        with suppress(BlockCorrupted):
            read(data)
    for key, _ in SEEDS:
        num_bytes = key.layout.block_bytes
        out = np.full(num_bytes + 2 * GUARD, 0xA5, np.uint8)
        with suppress(BlockCorrupted):
            records.decode(data, key, out[GUARD:-GUARD])
        if (out[:GUARD] != 0xA5).any() or (out[-GUARD:] != 0xA5).any():
            raise RuntimeError("expected only the block's bytes to be written, got others")


def main() -> None:
    torch.set_num_threads(1)
    for _, seed in SEEDS:
        check(seed)
    atheris.Setup(sys.argv, check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write-seeds"]:
        for number, (_, seed) in enumerate(SEEDS):
            Path(sys.argv[2], f"seed-{number}").write_bytes(seed)
    else:
        main()
