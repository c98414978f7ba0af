"""Faults to plant in the kernels, of the kind people make. Each must fail some test."""

from __future__ import annotations

from dataclasses import dataclass

CSRC = "csrc/cpu/"
OPS = ("tests/ops/test_attention.py", "tests/ops/test_attention_features.py")
CHECKS = ("tests/ops/test_attention_checks.py",)
INVARIANCE = ("tests/ops/test_attention_invariance.py",)
LINEAR = ("tests/ops/test_linear.py",)


@dataclass(frozen=True)
class Fault:
    """A text that occurs once in a file, and what it becomes.

    Attributes:
        name: What the fault is.
        path: The file, from the root.
        old: The text.
        new: What takes its place.
        isa: Instruction set whose tests are to notice.
        files: Tests to run.
    """

    name: str
    path: str
    old: str
    new: str
    isa: str = "portable"
    files: tuple[str, ...] = OPS


FAULTS = [
    # ---- which keys a query sees
    Fault("causal mask off by one", CSRC + "attention_kernel.h",
          "position + 1 < range.end) range.end = position + 1;",
          "position + 2 < range.end) range.end = position + 2;"),
    Fault("causal mask ignored", CSRC + "attention_kernel.h",
          "if (args.causal && position + 1 < range.end)",
          "if (false && args.causal && position + 1 < range.end)"),
    Fault("window off by one", CSRC + "attention_kernel.h",
          "range.begin = position - args.window + 1;", "range.begin = position - args.window;"),
    Fault("tree bit shifted", CSRC + "attention_scores.h",
          "is_seen = (row.sees >> index) & 1;", "is_seen = (row.sees >> index) & 2;"),
    Fault("tree position counts itself", CSRC + "attention_scores.h",
          "sees & ~(uint32_t{1} << index)", "sees & ~(uint32_t{0} << index)"),
    Fault("tree window by slot", CSRC + "attention_scores.h",
          "position = tree_row(tile, index).position;", "position = begin + t;"),
    Fault("bits of tokens that are not there", CSRC + "attention_scores.h",
          "tile.args->tree_mask[tile.first_token + index]) & all;",
          "tile.args->tree_mask[tile.first_token + index]);"),
    # ---- scores
    Fault("soft cap before the scale", CSRC + "attention_scores.h",
          "  for (int64_t t = 0; t < count; ++t) scores[t] *= args.sm_scale;\n"
          "  if (args.soft_cap > 0) cap_scores(args.soft_cap, count, scores);",
          "  if (args.soft_cap > 0) cap_scores(args.soft_cap, count, scores);\n"
          "  for (int64_t t = 0; t < count; ++t) scores[t] *= args.sm_scale;"),
    Fault("soft cap loses the sign", CSRC + "attention_scores.h",
          "scores[t] = score < 0 ? -bounded : bounded;", "scores[t] = bounded;"),
    Fault("ALiBi sign flipped", CSRC + "attention_scores.h",
          "scores[t] -= slope * std::fabs(", "scores[t] += slope * std::fabs("),
    Fault("ALiBi distance without its sign taken off", CSRC + "attention_scores.h",
          "std::fabs(static_cast<float>(first + t))", "static_cast<float>(first + t)"),
    Fault("ALiBi slope of another head", CSRC + "attention_scores.h",
          "args.alibi_slopes[(tile.kv_head + head) * group + row % group]",
          "args.alibi_slopes[(tile.kv_head + head) * group + row / group % group]"),
    # ---- softmax and the merge of parts
    Fault("sink dropped", CSRC + "attention.cpp",
          "sum = weight * sum + std::exp2(sink - base);", "sum = weight * sum;"),
    Fault("sink counted twice", CSRC + "attention.cpp",
          "sum = weight * sum + std::exp2(sink - base);",
          "sum = weight * sum + 2 * std::exp2(sink - base);"),
    Fault("sink of another head", CSRC + "attention.cpp",
          "args_.sinks[query_head] * kLog2E", "args_.sinks[r % group] * kLog2E"),
    Fault("merge without the maximum", CSRC + "attention.cpp",
          "const float new_weight = std::exp2(part.max[row] - max);",
          "const float new_weight = 1.0f;"),
    Fault("merged parts without their weights", CSRC + "attention_avx512.cpp",
          "_mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, added + i), added_weights, scaled));",
          "_mm512_add_ps(_mm512_maskz_loadu_ps(mask, added + i), scaled));", "avx512"),
    Fault("last item of a share left out", CSRC + "attention.cpp",
          "for (int64_t item = items.begin; item < items.end; ++item) {",
          "for (int64_t item = items.begin; item + 1 < std::max(items.end, items.begin + 2);"
          " ++item) {"),
    Fault("an empty part is not left out", CSRC + "attention.cpp",
          "if (part.sum[row] == 0) continue;", ""),
    Fault("log-sum-exp in base 2", CSRC + "attention.cpp",
          "(base + std::log2(sum)) * kLn2", "base + std::log2(sum)"),
    Fault("guard of nothing seen removed", CSRC + "attention_portable.cpp",
          "const float base = new_max == -kInfinity ? 0.0f : new_max;",
          "const float base = new_max;"),
    Fault("earlier values not scaled down", CSRC + "attention_portable.cpp",
          "out[i] *= decay;", "out[i] *= 1.0f;"),
    Fault("earlier sum not scaled down", CSRC + "attention_portable.cpp",
          "  sum *= decay;\n", ""),
    Fault("last part of the keys dropped", CSRC + "attention_plan.cpp",
          "std::clamp<int64_t>((num_keys + plan.chunk_size - 1) / plan.chunk_size, 1, num_wanted)",
          "std::clamp<int64_t>(num_keys / plan.chunk_size, 1, num_wanted)"),
    # ---- whose rows
    Fault("query head of another group", CSRC + "attention_kernel.h",
          "((tile.kv_head + head) * group + row % group) * args.query_head_stride",
          "((tile.kv_head + head) + row % group) * args.query_head_stride"),
    Fault("query rows taken for dense", CSRC + "attention_kernel.h",
          "(tile.first_token + row / group) * args.query_token_stride",
          "(tile.first_token + row / group) * args.num_heads * args.head_dim"),
    Fault("first query of the batch", CSRC + "attention_plan.cpp",
          "plan.first_token = queries.begin;", "plan.first_token = 0;"),
    Fault("second head of a tile reads the first", CSRC + "attention_few_rows_avx512.h",
          "return {cache + head * args_.key_head_stride, now.keys};",
          "return {cache, now.keys};", isa="avx512"),
    Fault("output as wide as keys", "kvkernels/native.py",
          "query.new_empty((num_tokens, num_heads, value_dim))",
          "query.new_empty((num_tokens, num_heads, head_dim))"),
    # ---- blocks
    Fault("block offset in 32 bits", CSRC + "attention_rows.h",
          "int64_t key = block * args.key_block_stride +",
          "int64_t key = static_cast<int32_t>(block * args.key_block_stride) +"),
    Fault("slot within the block lost", CSRC + "attention_rows.h",
          "const int64_t slot = token % block_size;", "const int64_t slot = 0;"),
    Fault("kind ignored", CSRC + "attention_rows.h",
          "if (block_entry(tile.blocks[i]).kind != BlockKind::kFloat) return false;", ""),
    Fault("int4 taken for int8", CSRC + "attention_unpack.h",
          "return kind == BlockKind::kInt4 ? args.int4 : args.int8;", "return args.int8;"),
    Fault("nibbles swapped", CSRC + "attention_unpack_portable.h",
          "static_cast<float>(codes[i] & 15)", "static_cast<float>(codes[i] >> 4)"),
    Fault("minimum dropped", CSRC + "attention_unpack_portable.h",
          "Writer::narrow(minimums[i] + scales[i] * static_cast<float>(codes[i]))",
          "Writer::narrow(scales[i] * static_cast<float>(codes[i]))"),
    Fault("scale and minimum swapped", CSRC + "attention_unpack_portable.h",
          "scales[i] = to_float(Float16{pairs[2 * i]});",
          "scales[i] = to_float(Float16{pairs[2 * i + 1]});"),
    Fault("first group of tokens for all", CSRC + "attention_unpack.h",
          "U::widen_scales(pairs + slot / group_size * dim * 2, dim, scales, minimums);",
          "U::widen_scales(pairs, dim, scales, minimums);"),
    Fault("first group of channels for all", CSRC + "attention_unpack.h",
          "U::widen_scales(pairs + (slot * groups + group) * 2, 1, &scale, &minimum);",
          "U::widen_scales(pairs + slot * groups * 2, 1, &scale, &minimum);"),
    Fault("float8 exponent off by one", CSRC + "float_formats.h",
          "((127u - 7) << 23)", "((127u - 8) << 23)"),
    # ---- products with codes
    Fault("excess of unsigned codes kept", CSRC + "attention_codes_rounding_avx512.h",
          "return _mm512_slli_epi32(total, kBits);", "return _mm512_slli_epi32(total, 0);",
          isa="avx512"),
    Fault("whole numbers of eight bits", CSRC + "attention_codes_avx512_vnni.cpp",
          "constexpr float kLargest = 32767;", "constexpr float kLargest = 127;", isa="avx512"),
    Fault("weights of the group of channels before", CSRC + "attention_codes_avx512_vnni.cpp",
          "std::min(pieces.begin(piece, half) / group_size, run.groups - 1);",
          "std::min(pieces.begin(piece, 0) / group_size, run.groups - 1);", isa="avx512"),
    Fault("largest scale of the first group for all", CSRC + "attention_codes_rounding_avx512.h",
          "static_cast<int32_t>(kMaxBatch + set % groups);",
          "static_cast<int32_t>(kMaxBatch);", isa="avx512"),
    Fault("a lane of four left out", CSRC + "simd_avx512.h",
          "combine(pairs, _mm512_permute_ps(pairs, 0x4e));",
          "combine(pairs, _mm512_permute_ps(pairs, 0xb1));", isa="avx512"),
    Fault("excess of unsigned codes kept, AVX2", CSRC + "attention_codes_rounding_avx2.h",
          "return _mm256_slli_epi32(total, kBits);", "return _mm256_slli_epi32(total, 0);",
          isa="avx2"),
    Fault("whole numbers of eight bits, AVX2", CSRC + "attention_codes_rounding_avx2.h",
          "constexpr float kLargest = 32767;", "constexpr float kLargest = 127;", isa="avx2"),
    Fault("scales of the first group of channels", CSRC + "attention_codes_avx2.cpp",
          "std::min(first / (run.dim / run.groups), run.groups - 1);", "0 * first;", isa="avx2"),
    Fault("weights of a run's last keys", CSRC + "attention_codes_rounding_avx2.h",
          "std::copy_n(row, num_keys, target);",
          "std::fill_n(target, num_keys, 0.0f), std::copy_n(row, num_keys / 8 * 8, target);",
          isa="avx2"),
    Fault("room for scales of 32 channels", CSRC + "attention_codes_rounding_avx2.h",
          "kMaxGroups = kMaxCodeDim / kPieceChannels;", "kMaxGroups = kMaxCodeDim / 32;",
          isa="avx2"),
    Fault("high halves of the low halves' channels", CSRC + "attention_codes_rounding_avx2.h",
          "piece % 2 * (dim / 2) + piece / 2 * 16", "piece / 2 * 16", isa="avx2"),
    # ---- rows in the order of pairs
    Fault("sums of codes not brought into pairs", CSRC + "attention_products_avx2.h",
          "E::arrange(a, b);\n    add(a, paired + i);", "add(a, paired + i);", isa="avx2"),
    Fault("last vector of an odd number", CSRC + "attention_products_avx2.h",
          "if (i < dim) _mm256_storeu_ps(to + i, _mm256_loadu_ps(from + i));", "", isa="avx2"),
    Fault("a second half of keys left out", CSRC + "attention_products_avx2.h",
          "for (int half = 0; half < 2; ++half) {", "for (int half = 0; half < 1; ++half) {",
          isa="avx2"),
    # ---- tails and masks of vectors
    Fault("tail lanes unmasked", CSRC + "attention_avx512.h",
          "kIsMasked ? first_lanes(last - 16 * i) & ~first_lanes(first - 16 * i) : 0xffff;",
          "kIsMasked ? 0xffff & ~first_lanes(first - 16 * i) : 0xffff;", isa="avx512"),
    Fault("whole rows taken for seen", CSRC + "attention_avx512.h",
          "seen[r + whole].end >= kTileKeys) {", "true) {", isa="avx512"),
    Fault("values that there are not repeat the last", CSRC + "attention_amx_keys.h",
          "values.row[t] = work.zeros;", "values.row[t] = values.row[t - 1];",
          isa="amx_emulated"),
    Fault("pairs of values overwritten too early", CSRC + "attention_amx_few_rows.h",
          "work.values + i / kStep % 2 * kKeys * kStep;", "work.values;", isa="amx_emulated"),
    Fault("keys after the last a row sees", CSRC + "attention_amx_softmax.h",
          "_mm512_mask_cmplt_epi32_mask(_mm512_cmpge_epi32_mask(keys, first), keys, last);",
          "_mm512_cmpge_epi32_mask(keys, first);", isa="amx_emulated"),
    Fault("rows of tiles not rescaled", CSRC + "attention_amx_softmax.h",
          "_mm512_mul_ps(_mm512_load_ps(lanes), factor)", "_mm512_load_ps(lanes)",
          isa="amx_emulated"),
    Fault("maximum of one set of lanes", CSRC + "attention_amx_softmax.h",
          "return kSets == 1 ? v :", "return true ? v :", isa="amx_emulated"),
    Fault("second set of lanes sees what the first does", CSRC + "attention_amx_work.h",
          "work.last[lane] = static_cast<int32_t>(seen.end - first_key);",
          "work.last[lane] = static_cast<int32_t>(seen.end);", isa="amx_emulated"),
    Fault("one set of lanes summed up", CSRC + "attention_amx_kernel.h",
          "for (int64_t set = 1; set < work.num_sets; ++set) {",
          "for (int64_t set = 1; set < 1; ++set) {", isa="amx_emulated"),
    Fault("scores of a second set not adjusted", CSRC + "attention_amx_softmax.h",
          "std::memcpy(by_row[n], by_row[n % set_lanes], sizeof(by_row[n]));", "",
          isa="amx_emulated"),
    Fault("pairs of weights swapped", CSRC + "simd_avx512_bf16.h",
          "_mm512_cvtne2ps_pbh(odd, even)", "_mm512_cvtne2ps_pbh(even, odd)",
          isa="amx_emulated"),
    # ---- the same bits in any cut
    Fault("chunks by length", CSRC + "attention_plan.cpp",
          "if (args.batch_invariant) {", "if (false) {", files=INVARIANCE),
    Fault("columns from the first key seen", CSRC + "attention_many_rows_avx512.h",
          "const int64_t first = tile.key_begin / kTileKeys * kTileKeys;",
          "const int64_t first = tile.key_begin;", isa="avx512", files=INVARIANCE),
    Fault("few rows on a kernel of their own", CSRC + "attention_avx512.cpp",
          " && !tile.args->batch_invariant", "", isa="avx512", files=INVARIANCE),
    # ---- linear layers
    Fault("wide panel of one column", CSRC + "linear_products.h",
          "L::widen_row(panel.row(c), size,", "L::widen_row(panel.row(0), size,",
          isa="avx2", files=LINEAR),
    Fault("rows of the tile's first chunk", CSRC + "linear_products.h",
          "L::widen_row(input + row * args.input_stride,",
          "L::widen_row(input + (row - begin + tile.row_begin) * args.input_stride,",
          isa="avx2", files=LINEAR),
    Fault("features after the last whole step", CSRC + "linear_avx2.cpp",
          "if (i < count) {", "if (false) {", isa="avx2", files=LINEAR),
    Fault("features after the last multiplied", CSRC + "linear_amx_kernel.h",
          "end = work.num_whole_steps;", "end = work.num_steps;", files=LINEAR),
    Fault("copies of weights begin anew", CSRC + "linear_amx_kernel.h",
          "const uint16_t* source = weight + step * kStep;",
          "const uint16_t* source = weight + (step - begin) * kStep;", files=LINEAR),
    Fault("few rows on products of another order", CSRC + "linear.cpp",
          "const LinearKernel kernel = find_kernel(path, args.dtype);",
          "const LinearKernel kernel = args.num_rows == 1 ? portable_linear(args.dtype)"
          " : find_kernel(path, args.dtype);", files=LINEAR),
    Fault("last row of a block packed as zeros", CSRC + "linear_amx_kernel.h",
          "rows[n] = n < count ?", "rows[n] = n + 1 < count ?", files=LINEAR),
    # ---- checks
    Fault("block ids not checked", CSRC + "attention_plan.cpp",
          "is_good &= index < 3 && id < counts[index < 3 ? index : 0];", "", files=CHECKS),
    Fault("lengths not checked", CSRC + "attention_plan.cpp",
          "if (seq_len < 0 || seq_len > max_tokens) {", "if (seq_len < 0) {", files=CHECKS),
]  # fmt: skip
