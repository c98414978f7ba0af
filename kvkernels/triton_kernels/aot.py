"""Compile every kernel ahead of time, without a GPU, and refuse what spills or does not fit.

``python -m kvkernels.triton_kernels.aot --arch 80 90 100`` prints one row a kernel and ends with
status 1 if a kernel keeps registers in local memory or needs more shared memory than a program may
have. What is compiled is what the launchers plan, on tensors without storage. All of it takes
minutes; ``--every 7`` is a spread over every kind of kernel.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkernels.triton_kernels.decode import plan_decode
from kvkernels.triton_kernels.kv_cache import plan_store_kv
from kvkernels.triton_kernels.launch import Device, Launch
from kvkernels.triton_kernels.merge import plan_merge
from kvkernels.triton_kernels.prefill import plan_prefill

# Bytes of shared memory that one program may use; 8.0 has 163 KB, but 8.6, 8.9 and 12.0, which run
# the same configurations, have 99.
SHARED_LIMITS = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TYPE_NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_MULTIPROCESSORS = 128


@dataclass(frozen=True)
class Case:
    """What to compile: `op` is store_kv, decode, prefill or merge; the rest shapes its arguments.

    `num_queries` is queries a sequence, which picks the prefill kernel's tile. Decode includes the
    kernel that combines splits.
    """

    arch: int
    op: str
    dtype: str
    head_dim: int
    block_size: int = 64
    group: int = 4
    num_queries: int = 1
    window: int = 0
    num_seqs: int = 1

    def __str__(self) -> str:
        text = f"{self.op} {self.dtype} d{self.head_dim}"
        if self.op in ("decode", "prefill"):
            text += f" block {self.block_size} group {self.group}"
        if self.op == "prefill":
            text += f" queries {self.num_queries}"
        return text + (" window" if self.window else "")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of the machine."""

    case: Case
    kernel: str
    tile: str
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int

    @property
    def is_refused(self) -> bool:
        return self.local_bytes > 0 or self.shared_bytes > SHARED_LIMITS[self.case.arch]


def cases(arch: int) -> Iterator[Case]:
    """Every launch configuration of an architecture, on the shapes that ask most of it."""
    for head_dim in HEAD_DIMS:
        yield Case(arch, "store_kv", "fp32", head_dim)
        yield Case(arch, "merge", "fp32", head_dim)
        for dtype in ("bf16", "fp32"):
            # A window adds a loop, and blocks smaller than a tile an address a token: the worst.
            yield Case(arch, "decode", dtype, head_dim, block_size=16, window=4096)
            for num_queries in (4, 16, 512):
                if dtype == "bf16" or num_queries < 512:
                    yield Case(arch, "prefill", dtype, head_dim, 16, 4, num_queries, window=4096)
        yield Case(arch, "decode", "bf16", head_dim, group=32)
    # fp16 shares its configurations with bf16; one head dim shows that it compiles.
    yield Case(arch, "decode", "fp16", 128)
    yield Case(arch, "prefill", "fp16", 128, num_queries=512)
    # One split, an odd block size, and more query heads to a key-value head than a tile has rows.
    yield Case(arch, "decode", "bf16", 128, num_seqs=4096)
    yield Case(arch, "decode", "bf16", 128, block_size=48, group=71)
    yield Case(arch, "prefill", "bf16", 128, block_size=48, group=71)


def plan(case: Case) -> list[Launch]:
    """The launches of a case, on tensors without storage."""
    dtype = DTYPES[case.dtype]
    device = Device(case.arch // 10, _MULTIPROCESSORS)
    num_kv_heads, max_blocks = 2, 4096
    num_tokens = case.num_seqs * case.num_queries

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(num_tokens, num_kv_heads * case.group, case.head_dim)
    out, lse = query, empty(*query.shape[:2], dtype=torch.float32)
    key = empty(num_tokens, num_kv_heads, case.head_dim)
    cache = empty(max_blocks, num_kv_heads, case.block_size, case.head_dim)
    if case.op == "store_kv":
        return plan_store_kv(key, key, cache, cache, empty(num_tokens, dtype=torch.int64))
    if case.op == "merge":
        return plan_merge(out, lse, out, lse, out, lse)
    table = empty(case.num_seqs, max_blocks, dtype=torch.int32)
    seq_lens = empty(case.num_seqs, dtype=torch.int32)
    inputs = (query, cache, cache, table, seq_lens)
    if case.op == "decode":
        return plan_decode(*inputs, out, lse, 1.0, case.window, device)
    cu_seqlens_q = empty(case.num_seqs + 1, dtype=torch.int32)
    return plan_prefill(*inputs, cu_seqlens_q, out, lse, 1.0, True, case.window, device)


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel, specialised as Triton specialises it at a call."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        is_aligned = True
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPE_NAMES[value.dtype]
            is_aligned = not parameter.do_not_specialize_on_alignment
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_aligned = value % 16 == 0 and not parameter.do_not_specialize
        if is_aligned:
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _measure_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory a thread: spilled registers and arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG, STACK and LOCAL, got {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def compile_case(case: Case) -> list[Usage]:
    """Compile a case's kernels for its architecture and measure them."""
    usages = []
    for launch in plan(case):
        compiled = triton.compile(
            _source(launch),
            target=GPUTarget("cuda", case.arch, 32),
            options=launch.options,
        )
        registers, local_bytes = _measure_cubin(compiled.asm["cubin"])
        arguments = launch.arguments
        sizes = [str(arguments[name]) for name in ("TILE_M", "TILE_N") if name in arguments]
        usages.append(
            Usage(
                case,
                launch.kernel.__name__.strip("_"),
                "x".join(sizes) or "-",
                launch.num_warps,
                registers,
                local_bytes,
                compiled.metadata.shared,
            )
        )
    return usages


def report(results: Iterable[list[Usage]]) -> int:
    """Print the table, a row as soon as it is known; return the exit status."""
    print("arch  kernel           tile     warps  registers  local  shared  case")
    num_kernels = num_refused = 0
    for usage in itertools.chain.from_iterable(results):
        num_kernels += 1
        num_refused += usage.is_refused
        print(
            f"{usage.case.arch:<5} {usage.kernel:<16} {usage.tile:<8} {usage.num_warps:>5}"
            f" {usage.num_registers:>10} {usage.local_bytes:>6} {usage.shared_bytes:>7}"
            f"  {usage.case}{'  REFUSED' if usage.is_refused else ''}",
            flush=True,
        )
    print(f"{num_kernels} kernels compiled, {num_refused} refused")
    return 0 if num_kernels and not num_refused else 1


def main() -> int:
    """Compile, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=sorted(SHARED_LIMITS), choices=sorted(SHARED_LIMITS)
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--only", default="", help="only cases whose text contains this")
    parser.add_argument("--every", type=int, default=1, help="only one of so many cases")
    options = parser.parse_args()
    wanted = [case for arch in options.arch for case in cases(arch) if options.only in str(case)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        return report(pool.map(compile_case, wanted[:: options.every]))


if __name__ == "__main__":
    sys.exit(main())
