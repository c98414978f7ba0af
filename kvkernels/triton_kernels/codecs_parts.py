"""What the kernels of the codecs share: items of work, sums of bytes, numbers and their codes.

A launch works through items: a piece of a head, of a layer, of a block. Programs take items a grid
apart, so any number of programs does all of the work.
"""

import triton
import triton.language as tl

# The interpreter truncates where it converts to bfloat16 (Triton 3.9), so we round ourselves.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TO_INTEGER = tl.constexpr(float(1 << 23))  # from here on, float32 has no bits after the point
_SMALLEST_NORMAL = tl.constexpr(2.0**-14)  # below it a float16 has fewer bits


@triton.jit
def find_item(item, layers_ptr, num_chosen, NUM_PIECES: tl.constexpr):
    """An item's row of payloads, layer, the layer's first byte in a payload, and piece of it."""
    piece = item % NUM_PIECES
    rest = item // NUM_PIECES
    entry_ptr = layers_ptr + 2 * (rest % num_chosen)
    row = (rest // num_chosen).to(tl.int64)
    # The table counts units of 64 bytes; the multiplication tells the compiler the alignment.
    return row, tl.load(entry_ptr), tl.load(entry_ptr + 1) * 64, piece


# ---- sums of a layer ----------------------------------------------------------------------------
#
# A share of the two sums is a pair of int64 tensors, which `add_sums` takes together.


@triton.jit
def weigh_words(words, places):
    """32-bit words, and their products with ``places + 1``; masked ones are zero."""
    # Unsigned, so that a product is one instruction of 32 by 32 to 64 bits.
    words = words.to(tl.uint32, bitcast=True).to(tl.uint64)
    weights = (places + 1).to(tl.uint32).to(tl.uint64)
    return words.to(tl.int64), (words * weights).to(tl.int64)


@triton.jit
def weigh_bytes(numbers, places):
    """Shares of bytes, or of sums of bytes, at places of a layer."""
    shifted = numbers.to(tl.int64) << ((places & 3) * 8)
    return shifted, shifted * ((places >> 2) + 1)


@triton.jit
def weigh_items(items, places):
    """Shares of integers of 16 or 32 bits; places count items, and masked ones are zero."""
    if items.dtype.primitive_bitwidth == 32:
        plain, weighted = weigh_words(items, places)
    else:
        plain = (items.to(tl.int64) & 0xFFFF) << ((places & 1) * 16)
        weighted = plain * ((places >> 1) + 1)
    return plain, weighted


@triton.jit
def weigh_steps(counts, levers, places, STEP: tl.constexpr):
    """Shares of bytes that were summed over steps, each `STEP` bytes after the one before.

    A step is a multiple of 4 bytes, so a byte stays at its place of a word.

    Args:
        counts: Sums of bytes, int32.
        levers: Sums of bytes times the step's number, int32.
        places: Of the first step.
    """
    plain, weighted = weigh_bytes(counts, places)
    # `levers` times the step stays below 2^31: a column has at most 256 bytes, at most 1024 apart.
    return plain, weighted + ((levers * (STEP // 4)).to(tl.int64) << ((places & 3) * 8))


@triton.jit
def total(numbers):
    """Sum of all numbers of a tensor."""
    return tl.sum(tl.reshape(numbers, [numbers.numel]), 0)


@triton.jit
def add_sums(sums_ptr, row, layer, num_layers, plain, weighted):
    """Add an item's share to the sums of its layer; whole numbers, so in any order."""
    target_ptr = sums_ptr + 2 * (row * num_layers + layer)
    tl.atomic_add(target_ptr, plain, sem="relaxed")
    tl.atomic_add(target_ptr + 1, weighted, sem="relaxed")


@triton.jit
def write_zeros(layer_ptr, first, last):
    """Zeros between a part and the next, at most 63 bytes; the sums do not change."""
    places = first + tl.arange(0, 64)
    zeros = tl.zeros([64], tl.uint8)
    tl.store(layer_ptr + places, zeros, mask=places < last)


# ---- numbers and codes --------------------------------------------------------------------------


@triton.jit
def magnitudes(items):
    """Bits without the sign, int32, in the order of magnitudes: NaN above infinity."""
    if items.dtype.primitive_bitwidth == 32:
        bits = items.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = items.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return bits


@triton.jit
def widen(items):
    """Elements as float32, subnormal ones too, which the interpreter's bfloat16 has not."""
    if items.dtype == tl.bfloat16:
        bits = items.to(tl.int16, bitcast=True).to(tl.int32) << 16
        numbers = bits.to(tl.float32, bitcast=True)
    else:
        numbers = items.to(tl.float32)
    return numbers


@triton.jit
def round_to(numbers, DTYPE: tl.constexpr):
    """float32 to the nearest of another type, ties to even."""
    if DTYPE == tl.bfloat16 and _INTERPRETED:  # noqa: SIM300
        bits = numbers.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        nearest = tl.where(numbers == numbers, nearest, 0x7FC0).to(tl.uint16)
        rounded = nearest.to(tl.bfloat16, bitcast=True)
    else:
        rounded = numbers.to(DTYPE)
    return rounded


@triton.jit
def find_scales(lowest, highest, NUM_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What sets of elements between two numbers share; see `kvkernels.reference.quantize`.

    Returns:
        The word of scale and minimum, the minimum, one over the scale or zero, and the greatest
        code.
    """
    lowest = lowest + 0.0  # turns -0.0 into 0.0, so that equal numbers have equal bits
    nearest = lowest.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    # The next smaller float16: for negative numbers the next larger bits. A positive zero needs no
    # case of its own, as it is never above.
    below = tl.where(bits < 0, bits + 1, bits - 1)
    is_above = (nearest.to(tl.float32) > lowest) & (tl.abs(lowest) >= _SMALLEST_NORMAL)
    bits = tl.where(is_above, below, bits)
    bits = tl.where(bits == -0x8000, 0, bits)
    low = _half(bits)
    scale, top, restored = _fit_scale(low, highest, NUM_BITS, DTYPE)
    is_coarse = scale.to(tl.float32) < _SMALLEST_NORMAL
    # Subnormal scales are rare, except for sets of zeros, so the second fit is usually skipped.
    num_coarse = tl.sum(tl.reshape((is_coarse & (highest > low)).to(tl.int32), [scale.numel]), 0)
    if num_coarse > 0:
        fitted_scale, fitted_top, restored = _fit_scale(low, restored, NUM_BITS, DTYPE)
        scale = tl.where(is_coarse, fitted_scale, scale)
        top = tl.where(is_coarse, fitted_top, top)
    word = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) | bits << 16
    return word, low, _inverse_of(scale), top


@triton.jit
def _fit_scale(low, highest, NUM_BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The scale of a range, float16, the code of its end, and what that restores."""
    levels: tl.constexpr = (1 << NUM_BITS) - 1
    first = (tl.maximum(highest - low, 0.0) * (1 / levels)).to(tl.float16)
    top = _code_of(highest, low, _inverse_of(first), NUM_BITS)
    restored = widen(round_to(low + first.to(tl.float32) * top, DTYPE))
    scale = ((restored - low) * (1 / levels)).to(tl.float16)
    top = _code_of(highest, low, _inverse_of(scale), NUM_BITS)
    return scale, top, widen(round_to(low + scale.to(tl.float32) * top, DTYPE))


@triton.jit
def _inverse_of(scale):
    """One over a float16, or zero."""
    scale = scale.to(tl.float32)
    is_some = scale > 0
    # Triton's `/` may be an approximation; codes must not depend on that.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(is_some, scale, 1.0))
    return tl.where(is_some, inverse, 0.0)


@triton.jit
def _code_of(numbers, low, inverse, NUM_BITS: tl.constexpr):
    """Codes of float32 numbers, as float32."""
    levels: tl.constexpr = (1 << NUM_BITS) - 1
    codes = tl.minimum(tl.maximum((numbers - low) * inverse, 0.0), levels)
    return (codes + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def scale_of(word):
    """The scale in the word that `find_scales` makes."""
    return _half(word)


@triton.jit
def minimum_of(word):
    """The minimum in the word that `find_scales` makes."""
    return _half(word >> 16)


@triton.jit
def _half(bits):
    """float32 from the low 16 bits as a float16."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_codes(numbers, low, inverse, top, NUM_BITS: tl.constexpr):
    """Codes of float32 numbers, int32."""
    levels: tl.constexpr = (1 << NUM_BITS) - 1
    codes = tl.minimum(tl.maximum((numbers - low) * inverse, 0.0), top)
    # Adding 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
    return (codes + _TO_INTEGER).to(tl.int32, bitcast=True) & levels


@triton.jit
def spread(sets, channels, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr):
    """What the groups of tokens have, `[tokens, groups]`, for each of some channels."""
    if NUM_GROUPS > 1:
        # Channels past the last are masked, but `gather` still needs a valid group for them.
        groups = tl.minimum(channels // GROUP, NUM_GROUPS - 1)
        sets = tl.gather(sets, tl.broadcast_to(groups, [sets.shape[0], channels.shape[1]]), 1)
    return sets
