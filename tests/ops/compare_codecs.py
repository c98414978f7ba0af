"""Compares every implementation of the codecs with the reference, on many blocks, byte by byte.

    python tests/ops/compare_codecs.py --random 10000
    python tests/ops/compare_codecs.py --real 1000 --model smollm2 --text FILE

Decoding and encoding again must give the same bytes, except for float32 blocks. "Coarse" blocks
have a scale or minimum below float16's normal numbers, 6e-5.

Run by hand. Without a GPU, Triton's interpreter takes an hour of one core for 10,000 blocks per
codec: several processes can share them with `--only triton` and a different `--seed` each. Exits
with status 1 at the first byte that differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

# As in conftest.py, before the first import of triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from codec_blocks import decode_by_triton, encode_by_triton
from quick_interpreter import make_quick

import kvkernels
from kvkernels import CODECS, BlockFormat, KVLayout, KVPool, native
from kvkernels.codecs import NUM_ESCAPES, UNUSED_ESCAPE
from kvkernels.reference import codecs as reference

BATCH = 20  # blocks at a time
PREFIX = 1024  # tokens of text that a model computes at once
PER_PREFIX = 200  # blocks compared of each
SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Tally:
    """How much was compared for a codec."""

    num_blocks: int = 0
    num_raw: int = 0
    num_coarse: int = 0  # blocks with scales or minima below float16's normal numbers
    num_escapes: int = 0
    num_lossless: int = 0  # elements written by "l12"


def implementations() -> dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]]:
    """By name: a context manager, and the two ops to call in it."""
    found = {
        isa: (native.use_isa, kvkernels.encode_blocks, kvkernels.decode_blocks)
        for isa in ("avx512_bf16", "avx512", "avx2", "portable")
        if isa in native.available_isas()
    }
    return found | {"triton": (nullcontext, encode_by_triton, decode_by_triton)}


def random_pools(num_blocks: int, seed: int) -> Iterator[KVPool]:
    """Small blocks of every shape and dtype, with channels of all magnitudes and special values."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for number in range(num_blocks // BATCH):
        heads, head_dim, block_size = pick(1, 2), pick(8, 12, 32, 64), pick(16, 16, 32)
        layout = KVLayout(1, heads, head_dim, block_size, DTYPES[number % len(DTYPES)])
        pool = KVPool(layout, BATCH)
        shape = tuple(pool.data.shape)
        channels = (*shape[:4], 1, shape[5])
        sizes = 10 ** torch.empty(channels).uniform_(
            *pick((-6, 3), (0, 2), (0, 2)), generator=generator
        )
        numbers = torch.randn(shape, generator=generator) * sizes
        offsets = torch.randn(channels, generator=generator) * sizes.flip(-1)
        pool.data.copy_(numbers + offsets * pick(0, 1))
        odd = (0.0, -0.0, torch.inf, torch.nan, 65504.0, 65536.0, 2.0**-24, -(2.0**-30), 1e-39)
        for _ in range(4):  # in a few blocks, one number or a whole row becomes special
            block, side = pick(*range(BATCH)), pick(0, 1)
            pool.data[block, 0, side, 0, pick(*range(16)), pick(0, slice(None))] = pick(*odd)
        yield pool


def real_pools(
    num_blocks: int, seed: int, model_name: str, text: Path, dtype: str
) -> Iterator[KVPool]:
    """Single layers of the blocks that a model computes from a text, another part per seed."""
    from prefixstore.quality.command import DTYPES as MODEL_DTYPES
    from prefixstore.quality.command import load, locate
    from prefixstore.quality.restored import compute_prefix

    model, tokenizer = load(locate(model_name), MODEL_DTYPES[dtype])
    tokens = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    remaining = num_blocks
    first = seed * -(-num_blocks // PER_PREFIX) * PREFIX
    for start in range(first, len(tokens) - PREFIX, PREFIX):
        pool = compute_prefix(model, tokens[start : start + PREFIX]).pool
        layers = pool.data.flatten(0, 1)[:, None]  # every layer a block of its own
        order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(start))
        layout = KVLayout(1, *pool.data.shape[3:4], *pool.data.shape[5:], 64, pool.layout.dtype)
        for chosen in order[:PER_PREFIX].split(BATCH):
            if remaining <= 0:
                return
            remaining -= len(chosen)
            yield KVPool.over(layout, layers[chosen].contiguous())
    if remaining > 0:
        raise ValueError(f"--text: expected {remaining} blocks' more of it after token {first}")


def compare(pool: KVPool, codec: str, tally: Tally, chosen: list[str]) -> None:
    """Raise RuntimeError where an implementation differs from the reference."""
    block_format = BlockFormat(pool.layout, codec)
    ids = torch.arange(pool.num_blocks)
    wanted = [_encode_by_reference(block, block_format) for block in pool.data]
    is_coarse = [not is_raw and _is_coarse(payload, block_format) for payload, is_raw in wanted]
    # A float32 block's minimum is rounded to float16 the first time.
    is_stable = pool.layout.dtype != torch.float32
    for name in chosen:
        context, encode, decode = implementations()[name]
        with context(name) if context is native.use_isa else context():
            encoded = encode(pool, ids, block_format)
            restored = KVPool(pool.layout, pool.num_blocks)
            is_good = decode(encoded, restored, ids)
            again = encoded if name == "triton" else encode(restored, ids, block_format)
        for index, (payload, is_raw) in enumerate(wanted):
            one_format = block_format.raw if is_raw else block_format
            block = reference.decode_block(payload, one_format)
            checks = {
                "raw flag": bool(encoded.is_raw[index]) == is_raw,
                "payload": torch.equal(encoded.payload(index), payload),
                "sums": torch.equal(encoded.sums[index], reference.sum_layers(payload, one_format)),
                "verification": bool(is_good[index].all()),
                "decoded block": torch.equal(_bytes(restored.data[index]), _bytes(block)),
                "payload of the decoded block": name == "triton"  # too slow for a second time
                or not is_stable
                or torch.equal(again.payload(index), payload),
            }
            for what, is_equal in checks.items():
                if not is_equal:
                    raise RuntimeError(
                        f"{name}, {codec}, {pool.layout}: {what}: expected the reference's,"
                        f" got another in block {index}"
                    )
    tally.num_blocks += pool.num_blocks
    tally.num_raw += sum(is_raw for _, is_raw in wanted)
    tally.num_coarse += sum(is_coarse)
    if codec == "l12":
        _count_escapes(wanted, block_format, tally)


def _encode_by_reference(
    block: torch.Tensor, block_format: BlockFormat
) -> tuple[torch.Tensor, bool]:
    payload = reference.encode_block(block, block_format)
    if payload is not None:
        return payload, False
    payload = reference.encode_block(block, block_format.raw)
    assert payload is not None
    return payload, block_format.codecs != block_format.raw.codecs


def _is_coarse(payload: torch.Tensor, block_format: BlockFormat) -> bool:
    """Whether a scale or minimum is below float16's normal numbers, and so has fewer bits."""
    for layer in block_format.layers:
        for side in layer.sides:
            if side.bits < 12:
                part = side.parts[1]
                start = layer.offset + part.offset
                scales = payload[start : start + part.num_bytes].clone().view(torch.float16).abs()
                if ((scales > 0) & (scales < SMALLEST_NORMAL)).any():
                    return True
    return False


def _count_escapes(
    wanted: list[tuple[torch.Tensor, bool]], block_format: BlockFormat, tally: Tally
) -> None:
    layout = block_format.layout
    for payload, is_raw in wanted:
        if is_raw:
            continue
        tally.num_lossless += layout.block_bytes // layout.dtype.itemsize
        for layer in block_format.layers:
            for side in layer.sides:
                start = layer.offset + side.parts[2].offset
                words = payload[start : start + 4 * NUM_ESCAPES * layout.num_kv_heads].clone()
                listed = words.view(torch.int32).long() & 0xFFFFFFFF
                tally.num_escapes += int((listed != UNUSED_ESCAPE).sum())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=0, help="random blocks per codec")
    parser.add_argument("--seed", type=int, default=0, help="of numbers, and part of the text")
    parser.add_argument("--real", type=int, default=0, help="blocks of a model per codec")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", nargs="+", default=list(implementations()))
    options = parser.parse_args()
    make_quick()
    tallies = {codec: Tally() for codec in CODECS}
    pools = list(random_pools(options.random, options.seed))
    if options.real:
        pools += real_pools(options.real, options.seed, options.model, options.text, options.dtype)
    for number, pool in enumerate(pools):
        for codec, tally in tallies.items():
            wanted = torch.bfloat16 if codec == "l12" else pool.layout.dtype
            layout = replace(pool.layout, dtype=wanted)
            compare(KVPool.over(layout, pool.data.to(wanted)), codec, tally, options.only)
        if number % 25 == 0:
            print(f"{number} of {len(pools)} pools", file=sys.stderr, flush=True)
    for codec, tally in tallies.items():
        line = f"{codec}: {tally.num_blocks} blocks, {tally.num_raw} raw, {tally.num_coarse} coarse"
        line += f", equal in {options.only}"
        if codec == "l12" and tally.num_lossless:
            line += f", {tally.num_escapes} escapes of {tally.num_lossless} numbers"
            line += f" ({tally.num_escapes / tally.num_lossless:.1e})"
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
