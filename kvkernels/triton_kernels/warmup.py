"""Compile ahead what a model needs, so that nothing compiles while it serves.

``python -m kvkernels.triton_kernels.warmup --heads 32/8 --head-dim 128 --codecs q4`` fills the
compiler's cache on disk for the device of this machine, from which a server loads them in
milliseconds; a process that calls `warm_up` has the kernels loaded as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from kvkernels.codecs import CODECS
from kvkernels.triton_kernels.launch import Device, device_of
from kvkernels.triton_kernels.prefill import query_counts
from kvkernels.triton_kernels.shapes import DTYPES, Shape, make_call, plan

# Numbers of sequences: one, which is split wherever any call is, and so many that none is.
_NUM_SEQS = (1, 1 << 16)


def shapes_of_model(model: Shape, device: Device, codecs: Sequence[str] = ()) -> Iterator[Shape]:
    """Every call that a model makes: `model` in all sizes, with and without log-sum-exps.

    The op, the numbers of queries and sequences, `has_lse` and the codec of `model` are replaced;
    `codecs` are those that its blocks are written by, if any.
    """
    model = replace(model, codec="")
    if not model.is_float8:  # `store_kv` does not write float8 caches
        yield replace(model, op="store_kv", num_seqs=512, num_queries=1)
    yield replace(model, op="merge")
    formats = ("raw", *codecs) if codecs else ()  # what a codec cannot hold is written raw
    for codec, op in product(formats, ("encode_blocks", "decode_blocks")):
        yield replace(model, op=op, codec=codec)
    num_queries_of_tiles = query_counts(make_call(replace(model, op="prefill")), device)
    for has_lse, batch_invariant in product((False, True), (False, True)):
        asked = replace(model, has_lse=has_lse, batch_invariant=batch_invariant, num_queries=1)
        if "tree" not in model.rules:
            for num_seqs in _NUM_SEQS:
                yield replace(asked, op="decode", num_seqs=num_seqs)
        for num_queries, num_seqs in product(num_queries_of_tiles, _NUM_SEQS):
            yield replace(asked, op="prefill", num_queries=num_queries, num_seqs=num_seqs)


def warm_up(model: Shape, device: torch.device | str = "cuda", codecs: Sequence[str] = ()) -> int:
    """Compile and load the kernels of a model, without running them.

    Args:
        model: Heads, widths, block size, dtypes and rules; see `shapes_of_model`. A model with
            layers of several kinds, as with and without a window, needs one call for each.
        device: A CUDA device.
        codecs: That blocks are written by on their way to tiles; see `kvkernels.codecs.CODECS`.

    Returns:
        The number of kernels that calls of the model may use.
    """
    compiled = set()
    with torch.cuda.device(device):
        target = device_of(torch.empty(1, device=device))
        for shape in shapes_of_model(model, target, codecs):
            for launch in plan(shape, target):
                kernel = launch.kernel.run(
                    grid=launch.grid, warmup=True, **launch.arguments, **launch.options
                )
                kernel._init_handles()  # loads it onto the device, as the first launch would
                compiled.add(kernel.hash)
    return len(compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", required=True, help="query heads / key-value heads: 32/8")
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument(
        "--value-dim", type=int, default=0, help="of values, where it is not that of keys"
    )
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], choices=["int8", "int4"])
    parser.add_argument("--float8", action="store_true", help="caches of float8_e4m3fn")
    parser.add_argument(
        "--rules", nargs="*", default=[], choices=["soft_cap", "sinks", "alibi", "tree"]
    )
    parser.add_argument(
        "--codecs", nargs="*", default=[], choices=list(CODECS), help="of blocks in tiles"
    )
    options = parser.parse_args()
    try:
        num_heads, num_kv_heads = map(int, options.heads.split("/"))
    except ValueError:
        parser.error(f"--heads: expected two numbers, such as 32/8, got {options.heads}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        parser.error(f"--heads: expected a multiple of the second number, got {options.heads}")
    if not torch.cuda.is_available():
        parser.error(
            "expected a CUDA device to compile for; without one: kvkernels.triton_kernels.aot"
        )
    model = Shape(
        "decode",
        options.dtype,
        options.head_dim,
        value_dim=options.value_dim,
        block_size=options.block_size,
        group=num_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        window=options.window,
        kinds=tuple(options.kinds),
        is_float8=options.float8,
        rules=tuple(options.rules),
    )
    print(f"{warm_up(model, codecs=options.codecs)} kernels compiled")


if __name__ == "__main__":
    main()
