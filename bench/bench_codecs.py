"""Writing blocks as payloads and back, codec by codec, beside a plain copy of the blocks.

`checksums_...` is the share of the encoding time that goes into checksums. It may be negative for
`raw` and `l12`, which only with checksums are written past the caches.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from bench.harness import make_cold, print_line, run_case, spread, tails, time_alternating
from kvkernels import CODECS, BlockFormat, EncodedBlocks, KVLayout, KVPool, native
from kvkernels import decode_blocks as decode
from kvkernels import encode_blocks as encode

NUM_BLOCKS = 16


@dataclass(frozen=True)
class Case:
    name: str
    layout: KVLayout

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks in the pool, which a copy reads and writes."""
        return NUM_BLOCKS * self.layout.block_bytes


CASES = [
    Case("gemma3_270m_sliding", KVLayout(15, 1, 256)),
    Case("smollm2_135m", KVLayout(30, 3, 64)),
    Case("llama3_8b", KVLayout(32, 8, 128)),
]


@dataclass
class Blocks:
    pool: KVPool
    ids: torch.Tensor
    encoded: EncodedBlocks


def copy_out(blocks: Blocks) -> None:
    rows = blocks.pool.data.flatten(1).view(torch.uint8)
    blocks.encoded.payloads[:, : rows.shape[1]].copy_(rows)


def copy_in(blocks: Blocks) -> None:
    rows = blocks.pool.data.flatten(1).view(torch.uint8)
    rows.copy_(blocks.encoded.payloads[:, : rows.shape[1]])


def run_encode(blocks: Blocks) -> None:
    encoded = blocks.encoded
    encode(blocks.pool, blocks.ids, encoded.block_format, payloads=encoded.payloads)


def run_decode(blocks: Blocks) -> None:
    if not decode(blocks.encoded, blocks.pool, blocks.ids).all():
        raise RuntimeError("expected payloads with the right sums, got others")


RUNS: dict[str, tuple[Callable[[Blocks], None], Callable[[Blocks], None]]] = {
    "encode": (copy_out, run_encode),
    "decode": (copy_in, run_decode),
}


def make_blocks(layout: KVLayout, codec: str) -> Blocks:
    """Blocks whose channels have different magnitudes, and their ids in random order."""
    pool = KVPool(layout, NUM_BLOCKS)
    pool.data.normal_()
    pool.data *= torch.rand(layout.head_dim) + 0.5
    ids = torch.randperm(NUM_BLOCKS)
    return Blocks(pool, ids, encode(pool, ids, BlockFormat(layout, codec)))


Inputs = dict[str, Blocks]  # by provider, so that none finds another's data in the caches


def make_inputs(layout: KVLayout, providers: Iterable[str]) -> Inputs:
    inputs = {}
    for name in ("copy", *providers):
        inputs[name] = make_blocks(layout, name if name in CODECS else "raw")
    return inputs


def run_on_own(name: str, run: Callable[[Blocks], None], inputs: Inputs) -> None:
    run(inputs[name])


def run_native_encode(with_sums: bool, blocks: Blocks) -> None:
    """Run only the kernels, so that the checksums are the only difference."""
    encoded = blocks.encoded
    sums = encoded.sums if with_sums else None
    is_good = torch.empty(encoded.sums.shape[:2], dtype=torch.bool)
    tensors = (blocks.ids, encoded.block_format.table, encoded.payloads, sums, is_good)
    native.encode_blocks(blocks.pool.data, *tensors)


def run_codecs(what: str, case: Case, num_rounds: int) -> None:
    copy, run = RUNS[what]
    inputs = make_cold(partial(make_inputs, case.layout, CODECS), case.num_bytes)
    providers = {"copy": partial(run_on_own, "copy", copy)}
    providers |= {codec: partial(run_on_own, codec, run) for codec in CODECS}
    run_case(f"{what}_{case.name}", providers, inputs, num_rounds, case.num_bytes)


def run_checksums(case: Case, num_rounds: int) -> None:
    """What share of its time each codec spends on checksums, from pairs of runs."""
    for codec in CODECS:
        inputs = make_cold(partial(make_blocks, case.layout, codec), case.num_bytes)
        providers = {
            "with": partial(run_native_encode, True),
            "without": partial(run_native_encode, False),
        }
        seconds = time_alternating(providers, inputs, num_rounds)
        pairs = zip(seconds["with"], seconds["without"], strict=True)
        shares = [1 - without / with_sums for with_sums, without in pairs]
        low, high = tails(shares)
        print_line(
            case=f"checksums_{case.name}",
            provider=codec,
            share_of_time=statistics.median(shares),
            p10_share=low,
            p90_share=high,
            **spread(seconds["with"]),
        )


def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for what in (*RUNS, "checksums"):
        for case in CASES:
            if case_filter not in f"{what}_{case.name}":
                continue
            if what == "checksums":
                run_checksums(case, num_rounds)
            else:
                run_codecs(what, case, num_rounds)
