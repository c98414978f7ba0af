"""What one compiled kernel takes of the machine, which instructions it is made of, and what of both
is refused; see aot.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from kvkernels.triton_kernels.launch import Launch
from kvkernels.triton_kernels.shapes import DTYPES, Shape

# Bytes of shared memory that one program may use; 8.0 has 163 KB, but 8.6, 8.9 and 12.0, which run
# the same configurations, have 99.
SHARED_LIMITS = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# Bytes of local memory that a kernel may spill, by call. Triton 3.6 needs none; 3.9 spills what
# stays the same throughout the loop, and reads it back in each step. Even so, latent attention with
# 64 rows takes half the time (on an H100) that it takes with 32, which do not spill.
_SPILLS_ALLOWED = {
    ("decode_kernel", Shape("decode", "bf16", 576, 512, group=128, num_kv_heads=1)): 136
}
_WIDE_LOAD_BYTES = 16
_WARP_THREADS = 32
# Instructions of the tensor cores, from Ampere to Blackwell.
_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")
# The instruction that computes (codes & mask) | magic, recognised by its truth table: 0xea, or 0xf8
# with the operands swapped; see `quantized._FOUR_BITS`. A plain AND (0xc0) would mean one more
# instruction.
_UNPACK = re.compile(r"LOP3\S* .*\b0xf000f\b.*, 0x(?:ea|f8)\b")


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes of the machine, and which instructions it is made of.

    Attributes:
        arch: 80, 90 or 100.
        shape: What it was compiled for.
        kernel: Its name.
        tile: Query rows times tokens.
        num_warps: Warps of a program.
        num_registers: Of a thread.
        local_bytes: Of a thread: spilled registers and arrays.
        shared_bytes: Of a program.
        num_products: Instructions of the tensor cores in the machine code.
        num_plain_dots: Products of tiles that do not run on the tensor cores.
        num_wide_loads: Loads of 16 bytes a thread, asynchronous copies (LDGSTS) among them.
        num_lop3: LOP3 of 4-bit codes: two of them become float16 in one instruction.
    """

    arch: int
    shape: Shape
    kernel: str
    tile: str
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int
    num_products: int
    num_plain_dots: int
    num_wide_loads: int
    num_lop3: int

    @property
    def fault(self) -> str:
        """Why the kernel is refused, or nothing."""
        if self.local_bytes > _SPILLS_ALLOWED.get((self.kernel, self.shape), 0):
            return "spills"
        if self.shared_bytes > SHARED_LIMITS[self.arch]:
            return "too much shared memory"
        if self.kernel in ("decode_kernel", "prefill_kernel"):
            return self._fault_of_attention()
        return ""

    def _fault_of_attention(self) -> str:
        if self.num_wide_loads < self.least_wide_loads:
            return "narrow loads"
        if self.shape.dtype == "fp32":  # float32 products do not use tensor cores
            return ""
        if not self.num_products or self.num_plain_dots:
            return "no tensor cores"
        if "int4" in self.shape.kinds and not self.num_lop3:
            return "no LOP3"
        return ""

    @property
    def least_wide_loads(self) -> int:
        """As many as bring the floats of a tile's keys and values.

        Codes of 4 bits may come in 8 bytes a thread. The values of latent attention come with the
        keys.
        """
        shape, tile_n = self.shape, int(self.tile.partition("x")[2])
        is_latent = 0 < shape.value_dim <= shape.head_dim
        width = shape.head_dim + (0 if is_latent else shape.value_dim or shape.head_dim)
        itemsize = 1 if shape.is_float8 else DTYPES[shape.dtype].itemsize
        program_bytes = self.num_warps * _WARP_THREADS * _WIDE_LOAD_BYTES
        return tile_n * width * itemsize // program_bytes


def measure(arch: int, shape: Shape, launch: Launch, compiled: Any) -> Usage:
    """Of a launch that `triton.compile` has compiled."""
    num_registers, local_bytes, names = disassemble(compiled.asm["cubin"])
    arguments = launch.arguments
    sizes = [str(arguments[name]) for name in ("TILE_M", "TILE_N") if name in arguments]
    return Usage(
        arch,
        shape,
        launch.kernel.__name__.strip("_"),
        "x".join(sizes) or "-",
        launch.num_warps,
        num_registers,
        local_bytes,
        compiled.metadata.shared,
        sum(name.startswith(_PRODUCTS) for name in names),
        count_plain_dots(compiled.asm["ttgir"]),
        sum(name.startswith("LDG") and ".128" in name for name in names),
        count_lop3(names),
    )


def count_plain_dots(ttgir: str) -> int:
    """Products whose result has no layout of the tensor cores, in Triton's own code for a GPU.

    From Hopper on most have become other operations there, which the tensor cores alone have.
    """
    layouts = re.findall(r"^(#\w+) = #ttg\.nvidia_mma<", ttgir, re.M)
    dots = re.findall(r"= tt\.dot .*", ttgir)
    return sum(not re.search(rf"-> tensor<[^>]*, (?:{'|'.join(layouts)})>", dot) for dot in dots)


def count_lop3(instructions: list[str]) -> int:
    """Of those that unpack codes of 4 bits."""
    return sum(bool(_UNPACK.match(one)) for one in instructions)


def disassemble(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers a thread, bytes of local memory a thread, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        texts = [
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm"])
        ]
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", texts[0])
    if found is None:
        raise RuntimeError(
            f"cuobjdump: expected a line with REG, STACK and LOCAL, got {texts[0]!r}"
        )
    registers, stack, local = map(int, found.groups())
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S.*?)\s*;", texts[1], re.M
    )
    return registers, stack + local, instructions
