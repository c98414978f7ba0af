"""Kernels that each miss one property wanted of compiled code, and what is counted in them. They
are compiled, so this runs as a process of its own, without the interpreter. Prints JSON."""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvkernels.triton_kernels import aot_usage


@triton.jit
def one_plain_dot(q, k, v, out):
    rows, tokens, dims = tl.arange(0, 16), tl.arange(0, 64), tl.arange(0, 64)
    queries = tl.load(q + rows[:, None] * 64 + dims[None, :])
    keys = tl.load(k + tokens[None, :] * 64 + dims[:, None])
    scores = tl.dot(queries, keys)
    values = tl.load(v + tokens[:, None] * 16 + rows[None, :]).to(tl.float32)
    total = tl.dot(scores, values, input_precision="ieee")  # float32 does not use tensor cores
    tl.store(out + rows[:, None] * 16 + rows[None, :], total)


@triton.jit
def mask_and_add(words, out):
    i = tl.arange(0, 128)
    tl.store(out + i, (tl.load(words + i) & 0x000F000F) + 0x00010001)


@triton.jit
def mask_and_put(words, out):
    i = tl.arange(0, 128)
    tl.store(out + i, (tl.load(words + i) & 0x000F000F) | tl.load(out + i))


def compile_kernel(kernel, kinds):
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    return triton.compile(
        ASTSource(kernel, signature, {}, {}), target=GPUTarget("cuda", 90, 32)
    ).asm


def count_lop3(kernel):
    cubin = compile_kernel(kernel, ["*i32", "*i32"])["cubin"]
    return aot_usage.count_lop3(aot_usage.disassemble(cubin)[2])


if __name__ == "__main__":
    ttgir = compile_kernel(one_plain_dot, ["*bf16", "*bf16", "*bf16", "*fp32"])["ttgir"]
    counts = {"dots": ttgir.count("tt.dot ") + ttgir.count("warp_group_dot ")}
    counts["plain_dots"] = aot_usage.count_plain_dots(ttgir)
    counts |= {kernel.__name__: count_lop3(kernel) for kernel in (mask_and_add, mask_and_put)}
    print(json.dumps(counts))
