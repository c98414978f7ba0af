"""How scores become exponents in base 2: soft cap, ALiBi, and what each row sees.

`rows` says of each row, `[TILE_M]` where not 0: (first token seen, token after the last one seen,
the row's own position, ALiBi's slope times log2 of e, tree mask). `rules` says of the whole call:
(soft cap, position of the sequence's first new token, number of new tokens, pointer to their tree
masks). `RULES` says at compile time which of these are used: (soft cap, ALiBi, tree masks), and
last whether the scale is left to who takes the exponents, as may be where it is positive and comes
before nothing else. See `kvkernels.scoring.Scoring` for their meaning.
"""

import triton
import triton.language as tl


@triton.jit
def count_bits(bits):
    """Bits set, of the lowest 16."""
    bits = (bits & 0x5555) + ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits & 0x0F0F) + ((bits >> 4) & 0x0F0F)
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def tree_depths(masks, indices, num_new):
    """How many other new tokens each of the new tokens at `indices` sees."""
    return count_bits(masks & ((1 << num_new) - 1) & ~(1 << indices))


@triton.jit
def _tanh(x):
    """Of both signs alike, and exact in the last places near zero, where 1 - e would cancel."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x + x * square * (
        -0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))
    )
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))


@triton.jit
def as_column(scale):
    """A scalar as it is, or `[TILE_M]` for scores of that many rows."""
    scale = tl.cast(scale, tl.float32)  # the interpreter has numbers of Python for scalars
    if len(scale.shape) > 0:
        scale = scale[:, None]
    return scale


@triton.jit
def apply_rules(
    scores,  # [TILE_M, TILE_N], as the product gave them
    scale,  # a scalar or [TILE_M], times log2 of e
    rows,
    rules,
    tokens,  # [TILE_N]
    MASKED: tl.constexpr,
    RULES: tl.constexpr,
):
    """Exponents in base 2, to be scaled yet if `RULES` says so; minus infinity where a row does not
    see a token.
    """
    row_lo, row_hi, position, slope, tree = rows
    soft_cap, first_new, num_new, tree_ptr = rules
    if RULES[0]:
        scores = _tanh(scores * (as_column(scale) / (soft_cap * 1.4426950408889634)))
        scores *= soft_cap * 1.4426950408889634
    elif not RULES[3]:
        scores *= as_column(scale)
    keys_at = tokens
    seen = None
    if MASKED:
        seen = tokens[None, :] < row_hi[:, None]
        if RULES[2]:
            indices = tokens - first_new
            is_new = (indices >= 0) & (indices < num_new)
            indices = tl.minimum(tl.maximum(indices, 0), 15)
            masks = tl.load(tree_ptr + indices, mask=is_new, other=0)
            keys_at += tl.where(is_new, tree_depths(masks, indices, num_new) - indices, 0)
            bits = (tree[:, None] >> indices[None, :]) & 1
            seen = seen & ((bits == 1) | (is_new == 0)[None, :])
        seen = seen & (keys_at[None, :] >= row_lo[:, None])
    if RULES[1]:
        distance = tl.abs(position[:, None] - keys_at[None, :]).to(tl.float32)
        scores -= slope[:, None] * distance
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    return scores
