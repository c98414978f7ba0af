"""The union of two attentions over disjoint sets of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvkernels.triton_kernels.launch import Launch

_TILE_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    out_a_ptr,  # [num_rows, HEAD_DIM], contiguous; a row is one head of one token
    lse_a_ptr,  # [num_rows]
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # next power of two of HEAD_DIM
    TILE: tl.constexpr,  # rows of a program
):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keep = rows < num_rows
    lse_a = tl.load(lse_a_ptr + rows, mask=keep, other=0.0)
    lse_b = tl.load(lse_b_ptr + rows, mask=keep, other=0.0)
    largest = tl.maximum(lse_a, lse_b)
    # Both empty: -inf - -inf would be NaN, and the union of nothing is zero.
    pivot = tl.where(largest == -float("inf"), 0.0, largest)
    weight_a = tl.exp(lse_a - pivot)
    weight_b = tl.exp(lse_b - pivot)
    total = weight_a + weight_b
    total = tl.where(total == 0.0, 1.0, total)
    lse = largest + tl.log(total)
    # Beyond all numbers stays so, though no weights follow from it; `largest` may leave out a NaN.
    is_infinite = (largest == float("inf")) & (lse_a == lse_a) & (lse_b == lse_b)
    tl.store(lse_ptr + rows, tl.where(is_infinite, largest, lse), mask=keep)

    weight_a /= total
    weight_b /= total
    channels = tl.arange(0, WIDTH)
    offsets = rows[:, None] * HEAD_DIM + channels[None, :]
    inside = keep[:, None] & (channels[None, :] < HEAD_DIM)
    # A partial over no keys is not read: its output may hold anything.
    a = tl.load(out_a_ptr + offsets, mask=inside & (weight_a > 0.0)[:, None], other=0.0)
    b = tl.load(out_b_ptr + offsets, mask=inside & (weight_b > 0.0)[:, None], other=0.0)
    out = a.to(tl.float32) * weight_a[:, None] + b.to(tl.float32) * weight_b[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


def plan_merge(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[Launch]:
    """The launch that merges two contiguous partials into `out` and `lse`."""
    head_dim = out_a.shape[2]
    width = triton.next_power_of_2(head_dim)
    tile = max(1, _TILE_ELEMENTS // width)
    num_rows = lse_a.numel()
    merge = Launch(
        _merge_kernel,
        (triton.cdiv(num_rows, tile),),
        {
            "out_a_ptr": out_a,
            "lse_a_ptr": lse_a,
            "out_b_ptr": out_b,
            "lse_b_ptr": lse_b,
            "out_ptr": out,
            "lse_ptr": lse,
            "num_rows": num_rows,
            "HEAD_DIM": head_dim,
            "WIDTH": width,
            "TILE": tile,
        },
        num_warps=4,
    )
    return [merge]
