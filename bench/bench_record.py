"""Compare writing and reading records with a plain copy of the payload."""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bench.harness import check_agreement, make_cold, run_case
from prefixstore.record import BlockKey, RecordLayout, chain_keys, decode, encode
from prefixstore.tiers.pages import page_aligned


@dataclass(frozen=True)
class Case:
    name: str
    layout: RecordLayout

    @property
    def num_bytes(self) -> int:
        """Bytes of the payload, read and written."""
        return 2 * self.layout.payload_bytes


CASES = [
    Case("gemma3_270m_sliding", RecordLayout(15, 1, 256, 64, "bfloat16")),
    Case("smollm2_135m", RecordLayout(30, 3, 64, 64, "bfloat16")),
    Case("llama3_8b", RecordLayout(32, 8, 128, 64, "bfloat16")),
    Case("llama3_8b_256_tokens", RecordLayout(32, 8, 128, 256, "bfloat16")),
]


@dataclass
class Block:
    key: BlockKey
    payload: np.ndarray  # as it lies in the pool
    record: np.ndarray

    @property
    def record_payload(self) -> np.ndarray:
        return self.record[self.key.layout.header_bytes :]


def copy_out(block: Block) -> None:
    np.copyto(block.record_payload, block.payload)


def copy_out_and_crc32(block: Block) -> None:
    """The way without a fused pass: copy, then a checksum from the standard library."""
    copy_out(block)
    zlib.crc32(block.record_payload)


def copy_in(block: Block) -> None:
    np.copyto(block.payload, block.record_payload)


def copy_in_and_crc32(block: Block) -> None:
    zlib.crc32(block.record_payload)
    copy_in(block)


PROVIDERS: dict[str, dict[str, Callable[[Block], None]]] = {
    "encode": {
        "copy": copy_out,
        "copy_and_crc32": copy_out_and_crc32,
        "kvkernels": lambda block: encode(block.key, block.payload, block.record),
    },
    "decode": {
        "copy": copy_in,
        "copy_and_crc32": copy_in_and_crc32,
        "kvkernels": lambda block: decode(block.record, block.key, block.payload),
    },
}

Blocks = dict[str, Block]  # one for each provider, so that none finds another's data in the caches


def make_block(layout: RecordLayout) -> Block:
    key = chain_keys(layout, bytes(16), range(layout.block_size))[0]
    block = Block(key, page_aligned(layout.payload_bytes), page_aligned(layout.record_bytes))
    block.payload[:] = np.resize(np.arange(251, dtype=np.uint8), layout.payload_bytes)
    encode(key, block.payload, block.record)
    return block


def make_blocks(layout: RecordLayout, names: Iterable[str]) -> Blocks:
    return {name: make_block(layout) for name in names}


def run_on_own_block(name: str, run: Callable[[Block], None], blocks: Blocks) -> None:
    run(blocks[name])


def result_of(what: str, run: Callable[[Block], None], block: Block) -> torch.Tensor:
    """The payload, from where the provider wrote it."""
    target = block.record_payload if what == "encode" else block.payload
    target[:] = 0xEE
    run(block)
    return torch.from_numpy(target.copy())


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for what, runs in PROVIDERS.items():
        for case in CASES:
            name = f"{what}_{case.name}"
            if case_filter not in name:
                continue
            blocks = make_blocks(case.layout, runs)
            results = {own: [result_of(what, run, blocks[own])] for own, run in runs.items()}
            check_agreement(results, "copy", 0.0)
            inputs = make_cold(partial(make_blocks, case.layout, runs), case.num_bytes)
            providers = {own: partial(run_on_own_block, own, run) for own, run in runs.items()}
            run_case(name, providers, inputs, num_rounds, case.num_bytes)
