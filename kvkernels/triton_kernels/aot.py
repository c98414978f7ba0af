"""Compile every kernel ahead of time, without a GPU, and refuse what spills or does not fit.

``python -m kvkernels.triton_kernels.aot --arch 80 90 100`` prints one row a kernel and ends with
status 1 if a kernel keeps registers in local memory, needs more shared memory than a program may
have, or is not made of the instructions it is meant for (`Usage.fault`). What is compiled is what
the launchers plan, on tensors without storage. All of it takes minutes; ``--spread`` takes one
shape of seven, every kind of kernel among them. ``--compile-only`` refuses nothing that compiles:
another version of Triton than the one that launch configurations are chosen for may spill a few
registers.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkernels.codecs import CODECS
from kvkernels.triton_kernels.aot_usage import SHARED_LIMITS, Usage, measure
from kvkernels.triton_kernels.launch import Device, Launch
from kvkernels.triton_kernels.shapes import Shape, plan

_TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
_MULTIPROCESSORS = 128
_HEAD_DIMS = (64, 80, 96, 128, 192, 256)
_RULES = ("soft_cap", "sinks", "alibi")
_SPREAD = 7


def shapes() -> Iterator[Shape]:
    """Every launch configuration, on the shapes that ask most of it."""
    for head_dim in _HEAD_DIMS:
        yield Shape("store_kv", "fp32", head_dim)
        yield Shape("merge", "fp32", head_dim)
        for dtype in ("bf16", "fp32"):
            # The most demanding case: a window adds a loop, and blocks smaller than a tile need an
            # address for each token.
            yield Shape("decode", dtype, head_dim, block_size=16, window=4096)
            for num_queries in (4, 16, 512):
                if dtype == "bf16" or num_queries < 512:
                    yield Shape(
                        "prefill", dtype, head_dim, block_size=16, num_queries=num_queries,
                        window=4096,
                    )  # fmt: skip
        yield Shape("decode", "bf16", head_dim, group=32)
    # fp16 shares its configurations with bf16; one head dim shows that it compiles.
    yield Shape("decode", "fp16", 128)
    yield Shape("prefill", "fp16", 128, num_queries=512)
    # So many sequences that prompts are not split either.
    for head_dim in (64, 128, 256):
        yield Shape("prefill", "bf16", head_dim, num_queries=512, num_seqs=64)
    # At head_dim 64 the largest tile needs as many query rows.
    many = Shape("prefill", "bf16", 64, num_queries=512, num_seqs=64)
    yield replace(many, block_size=16, window=4096)
    yield replace(many, is_float8=True)
    # One split, an odd block size, and more query heads to a key-value head than a tile has rows.
    yield Shape("decode", "bf16", 128, num_seqs=4096)
    yield Shape("decode", "bf16", 128, block_size=48, group=71)
    yield Shape("prefill", "bf16", 128, block_size=48, group=71)
    yield from _feature_shapes()
    yield from _codec_shapes()


def _feature_shapes() -> Iterator[Shape]:
    """Rules, latent heads, float8 and quantised blocks."""
    for head_dim in (64, 128, 256):
        yield Shape("decode", "bf16", head_dim, rules=_RULES, window=4096)
        yield Shape("decode", "bf16", head_dim, is_float8=True)
        yield Shape("decode", "bf16", head_dim, kinds=("int8",))
        yield Shape("decode", "bf16", head_dim, kinds=("int4",))
        for num_queries in (4, 16, 512):
            yield Shape("prefill", "bf16", head_dim, num_queries=num_queries, kinds=("int4",))
        yield Shape("prefill", "bf16", head_dim, num_queries=512, kinds=("int8",))
        yield Shape("prefill", "bf16", head_dim, num_queries=512, is_float8=True)
        yield Shape("prefill", "bf16", head_dim, num_queries=512, rules=_RULES, window=4096)
    yield Shape("prefill", "bf16", 128, num_queries=16, rules=("tree", *_RULES), window=4096)
    for op, num_queries in (("decode", 1), ("prefill", 512)):
        # Values wider than keys: tiles are cut for the wider of both.
        yield Shape(op, "bf16", 64, 128, num_queries=num_queries)
        yield Shape(op, "bf16", 128, 256, num_queries=num_queries)
        yield Shape(
            op, "bf16", 128, num_queries=num_queries, kinds=("int8", "int4"), rules=_RULES,
            window=4096,
        )  # fmt: skip
        yield Shape(op, "fp16", 128, num_queries=num_queries, kinds=("int4",), group=8)
        yield Shape(op, "fp32", 128, num_queries=num_queries, kinds=("int8", "int4"))
        yield Shape(op, "bf16", 80, num_queries=num_queries, kinds=("int4",), block_size=32)
        for dtype in ("bf16", "fp32"):
            yield Shape(
                op, dtype, 576, 512, num_queries=num_queries, group=128, num_kv_heads=1
            )  # fmt: skip
        yield Shape(
            op, "bf16", 576, 512, num_queries=num_queries, group=128, num_kv_heads=1,
            kinds=("int8",),
        )  # fmt: skip


def _codec_shapes() -> Iterator[Shape]:
    for op in ("encode_blocks", "decode_blocks"):
        yield Shape(op, "bf16", 128, codec="raw")
        for head_dim in (80, 128, 256):
            for codec in list(CODECS)[1:]:
                yield Shape(op, "bf16", head_dim, codec=codec)
        for codec in list(CODECS)[2:]:
            yield Shape(op, "fp32", 128, codec=codec)
        yield Shape(op, "fp16", 128, codec="q4")
        # A single head, then the largest tiles and the smallest.
        yield Shape(op, "bf16", 128, codec="k4v2", num_kv_heads=1)
        for head_dim, block_size in ((576, 256), (256, 16), (12, 64)):
            yield Shape(op, "bf16", head_dim, block_size=block_size, codec="l12")
            yield Shape(op, "fp32", head_dim, block_size=block_size, codec="q8")
            yield Shape(op, "fp32", head_dim, block_size=block_size, codec="q2")
        for dtype, codec in (("bf16", "q8"), ("bf16", "q4"), ("bf16", "l12"), ("fp32", "q2")):
            yield Shape(op, dtype, 576, 512, codec=codec, num_kv_heads=1)


def _describe(launch: Launch, parameter: Any) -> tuple[Any, Any, Any]:
    """Type, constant or None, and attribute or None of a kernel's argument, or tuples of them."""
    value = launch.arguments[parameter.name]
    if parameter.is_constexpr or value is None:
        return "constexpr", value, None
    if isinstance(value, tuple):
        types, constants, attributes = zip(
            *(_describe_one(element, True, True) for element in value), strict=True
        )
        return types, constants, attributes
    return _describe_one(
        value, not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
    )


def _describe_one(value: Any, on_value: bool, on_alignment: bool) -> tuple[str, Any, Any]:
    aligned = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        return _TYPE_NAMES[value.dtype], None, aligned if on_alignment else None
    if isinstance(value, float):
        return "fp32", None, None
    if value == 1 and on_value:
        return "constexpr", value, None
    name = "i32" if -(2**31) <= value < 2**31 else "i64"
    return name, None, aligned if value % 16 == 0 and on_value else None


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel, specialised as Triton specialises it at a call."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in launch.kernel.params:
        kind, constant, attribute = _describe(launch, parameter)
        signature[parameter.name] = kind
        paths: list[tuple[int, ...]] = [(parameter.num,)]
        if isinstance(kind, tuple):
            paths = [(parameter.num, index) for index in range(len(kind))]
        else:
            kind, constant, attribute = (kind,), (constant,), (attribute,)
        for path, one, value, extra in zip(paths, kind, constant, attribute, strict=True):
            if one == "constexpr":
                constants[path] = value
            if extra is not None:
                attributes[path] = extra
    return ASTSource(launch.kernel, signature, constants, attributes)


def choose(arches: Iterable[int], only: str = "") -> list[tuple[int, Shape]]:
    """Architectures and their shapes whose text contains `only`."""
    return [(arch, shape) for arch in arches for shape in shapes() if only in str(shape)]


def spread(chosen: list[tuple[int, Shape]]) -> list[tuple[int, Shape]]:
    """One of seven, and the first with each kernel that those leave out."""
    taken = chosen[::_SPREAD]
    kernels = set().union(*(_kernels_of(*entry) for entry in taken))
    for entry in chosen:
        if not _kernels_of(*entry) <= kernels:
            taken.append(entry)
            kernels |= _kernels_of(*entry)
    return taken


def _kernels_of(arch: int, shape: Shape) -> set[str]:
    return {launch.kernel.__name__ for launch in plan_shape(arch, shape)}


def plan_shape(arch: int, shape: Shape) -> list[Launch]:
    """The kernels of a call on an architecture."""
    return plan(shape, Device(arch // 10, _MULTIPROCESSORS))


def compile_shape(arch: int, shape: Shape) -> list[Usage]:
    """Compile the kernels of a call for an architecture and measure them."""
    usages = []
    for launch in plan_shape(arch, shape):
        compiled = triton.compile(
            _source(launch), target=GPUTarget("cuda", arch, 32), options=launch.options
        )
        usages.append(measure(arch, shape, launch, compiled))
    return usages


def report(results: Iterable[list[Usage]], compile_only: bool = False) -> int:
    """Print the table, a row as soon as it is known; return the exit status."""
    print("arch  kernel          tile   warps  regs local shared  mma  fma load16 lop3  shape")
    num_kernels = num_refused = 0
    for usage in itertools.chain.from_iterable(results):
        num_kernels += 1
        num_refused += bool(usage.fault)
        print(
            f"{usage.arch:<5} {usage.kernel:<15} {usage.tile:<7} {usage.num_warps:>4}"
            f" {usage.num_registers:>5} {usage.local_bytes:>5} {usage.shared_bytes:>6}"
            f" {usage.num_products:>4} {usage.num_plain_dots:>4} {usage.num_wide_loads:>6}"
            f" {usage.num_lop3:>4}"
            f"  {usage.shape}{'  REFUSED: ' if usage.fault else ''}{usage.fault}",
            flush=True,
        )
    print(f"Triton {triton.__version__}: {num_kernels} kernels compiled, {num_refused} refused")
    return 0 if num_kernels and (compile_only or not num_refused) else 1


def main() -> int:
    """Compile, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=sorted(SHARED_LIMITS), choices=sorted(SHARED_LIMITS)
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--only", default="", help="only shapes whose text contains this")
    parser.add_argument("--spread", action="store_true", help=f"only one of {_SPREAD} shapes")
    parser.add_argument("--compile-only", action="store_true", help="refuse nothing")
    options = parser.parse_args()
    wanted = choose(options.arch, options.only)
    if options.spread:
        wanted = spread(wanted)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        results = pool.map(compile_shape, *zip(*wanted, strict=True))
        return report(results, options.compile_only)


if __name__ == "__main__":
    sys.exit(main())
