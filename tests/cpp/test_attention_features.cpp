// Blocks of codes and of float8, soft caps, sinks, ALiBi and tree masks on memory that ends at a
// page nobody may touch. What is right is what the portable kernel makes of the same numbers as
// floats; that it means what the reference says is shown by the Python tests.
#include <algorithm>
#include <cmath>
#include <vector>

#include "guarded.h"
#include "kvkernels/attention.h"

namespace {

using namespace kvkernels;

struct Shape {
  int64_t num_heads, num_kv_heads, head_dim, value_dim, block_size;
  int32_t seq_len, num_queries;
  int64_t window;
};

float half_to_float(uint16_t bits) {  // of normal numbers
  const int exponent = (bits >> 10) & 31;
  const float value = std::ldexp(1.0f + static_cast<float>(bits & 1023) / 1024, exponent - 15);
  return bits & 0x8000 ? -value : value;
}

// One quantised cache, filled with codes and scales, and what they stand for.
class Codes {
 public:
  Codes(const Shape& shape, int64_t num_blocks, bool is_int4)
      : shape_(shape),
        is_int4_(is_int4),
        key_groups_(is_int4 && shape.block_size % 32 == 0 ? shape.block_size / 32 : 1),
        value_groups_(is_int4 && shape.value_dim % 64 == 0 ? shape.value_dim / 32 : 1),
        heads_(num_blocks * shape.num_kv_heads),
        key_codes_(heads_ * shape.block_size * bytes_of(shape.head_dim)),
        key_scales_(heads_ * key_groups_ * shape.head_dim * 4),
        value_codes_(heads_ * shape.block_size * bytes_of(shape.value_dim)),
        value_scales_(heads_ * shape.block_size * value_groups_ * 4) {
    fill_codes(key_codes_, heads_ * shape.block_size * bytes_of(shape.head_dim));
    fill_codes(value_codes_, heads_ * shape.block_size * bytes_of(shape.value_dim));
    fill_scales(key_scales_, heads_ * key_groups_ * shape.head_dim);
    fill_scales(value_scales_, heads_ * shape.block_size * value_groups_);
  }

  QuantizedCache cache(int64_t num_blocks) const {
    const Shape& s = shape_;
    const int64_t key = s.block_size * bytes_of(s.head_dim), key_pairs = key_groups_ * s.head_dim;
    const int64_t value = s.block_size * bytes_of(s.value_dim);
    const int64_t value_pairs = s.block_size * value_groups_, heads = s.num_kv_heads;
    return {{key_codes_.as<uint8_t>(), heads * key, key},
            {key_scales_.as<uint16_t>(), heads * key_pairs * 2, key_pairs * 2},
            {value_codes_.as<uint8_t>(), heads * value, value},
            {value_scales_.as<uint16_t>(), heads * value_pairs * 2, value_pairs * 2},
            num_blocks,
            key_groups_,
            value_groups_};
  }

  // Element i of slot `slot` of head `head`, counted over all blocks.
  float key(int64_t head, int64_t slot, int64_t i) const {
    const int64_t group = slot / (shape_.block_size / key_groups_);
    const int64_t pair = (head * key_groups_ + group) * shape_.head_dim + i;
    return element(key_codes_, head * shape_.block_size + slot, shape_.head_dim, i, key_scales_,
                   pair);
  }
  float value(int64_t head, int64_t slot, int64_t i) const {
    const int64_t row = head * shape_.block_size + slot;
    const int64_t group = i / (shape_.value_dim / value_groups_);
    return element(value_codes_, row, shape_.value_dim, i, value_scales_,
                   row * value_groups_ + group);
  }

 private:
  int64_t bytes_of(int64_t dim) const { return is_int4_ ? dim / 2 : dim; }

  static void fill_codes(const Guarded& codes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) codes.as<uint8_t>()[i] = static_cast<uint8_t>(std::rand());
  }

  void fill_scales(const Guarded& scales, int64_t count) const {
    // Scales such that elements lie between about -1 and 1, whatever the number of codes.
    const int exponent = is_int4_ ? 12 : 8;
    for (int64_t i = 0; i < count; ++i) {
      scales.as<uint16_t>()[2 * i] =
          static_cast<uint16_t>((exponent - 1) << 10 | (std::rand() & 1023));
      scales.as<uint16_t>()[2 * i + 1] =
          static_cast<uint16_t>(0x8000 | 14 << 10 | (std::rand() & 1023));
    }
  }

  float element(const Guarded& codes, int64_t row, int64_t dim, int64_t i, const Guarded& scales,
                int64_t pair) const {
    const uint8_t* bytes = codes.as<uint8_t>() + row * bytes_of(dim);
    int code = is_int4_ ? bytes[i % (dim / 2)] : bytes[i];
    if (is_int4_) code = i < dim / 2 ? code & 15 : code >> 4;
    const uint16_t* both = scales.as<uint16_t>() + 2 * pair;
    return half_to_float(both[1]) + half_to_float(both[0]) * static_cast<float>(code);
  }

  Shape shape_;
  bool is_int4_;
  int64_t key_groups_, value_groups_, heads_;
  Guarded key_codes_, key_scales_, value_codes_, value_scales_;
};

PagedAttentionArgs args_of(const Shape& shape, DType dtype) {
  PagedAttentionArgs args = {};
  args.num_tokens = shape.num_queries;
  args.num_heads = shape.num_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.value_dim = shape.value_dim;
  args.num_seqs = 1;
  args.block_size = shape.block_size;
  args.max_blocks_per_seq = args.num_blocks = args.table_stride =
      (shape.seq_len + shape.block_size - 1) / shape.block_size;
  args.query_token_stride = shape.num_heads * shape.head_dim;
  args.query_head_stride = args.key_slot_stride = shape.head_dim;
  args.value_slot_stride = shape.value_dim;
  args.key_head_stride = shape.block_size * shape.head_dim;
  args.value_head_stride = shape.block_size * shape.value_dim;
  args.key_block_stride = shape.num_kv_heads * args.key_head_stride;
  args.value_block_stride = shape.num_kv_heads * args.value_head_stride;
  args.sm_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  args.causal = true;
  args.window = shape.window;
  args.dtype = args.cache_dtype = dtype;
  return args;
}

struct Rules {
  bool soft_cap, sinks, alibi, tree;
};

// Runs the same call on blocks of codes, and in float32 on what they stand for.
void test_codes(const Shape& shape, const Rules& rules, DType dtype, AttentionPath path) {
  const int64_t item = dtype == DType::kFloat32 ? 4 : 2;
  PagedAttentionArgs args = args_of(shape, dtype);
  const int64_t num_blocks = args.num_blocks, num_kv_heads = shape.num_kv_heads;
  const Codes codes[] = {Codes(shape, num_blocks, false), Codes(shape, num_blocks, true)};
  args.int8 = codes[0].cache(num_blocks);
  args.int4 = codes[1].cache(num_blocks);

  const int64_t query_size = shape.num_queries * shape.num_heads * shape.head_dim;
  const int64_t out_size = shape.num_queries * shape.num_heads * shape.value_dim;
  const int64_t key_size = num_blocks * args.key_block_stride;
  const int64_t value_size = num_blocks * args.value_block_stride;
  const Guarded query(query_size * item), keys(key_size * item), values(value_size * item);
  const Guarded out(out_size * item), lse(shape.num_queries * shape.num_heads * 4);
  const Guarded table(num_blocks * 4), lens(4), running(8), sinks(shape.num_heads * 4);
  const Guarded slopes(shape.num_heads * 4), tree(shape.num_queries * 4);
  const Guarded plain_table(num_blocks * 4);
  std::vector<float> wide_query(query_size), wide_keys(key_size), wide_values(value_size);
  std::vector<float> wide_out(out_size), wide_lse(shape.num_queries * shape.num_heads);
  for (int64_t i = 0; i < query_size; ++i) {
    wide_query[i] = some_number();
    put(query.as<void>(), dtype, i, wide_query[i]);
  }
  for (int64_t block = 0; block < num_blocks; ++block) {
    // The last block is not full: never codes. The others take turns.
    const bool is_full = (block + 1) * shape.block_size <= shape.seq_len;
    const auto kind = static_cast<int32_t>(is_full ? (block + 1) % 3 : 0);
    const int64_t id = kind == 0 ? block : num_blocks - 1 - block;
    table.as<int32_t>()[block] = static_cast<int32_t>(kind << kKindShift | id);
    plain_table.as<int32_t>()[block] = static_cast<int32_t>(block);
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      for (int64_t slot = 0; slot < shape.block_size; ++slot) {
        const int64_t from = id * num_kv_heads + head, to = block * num_kv_heads + head;
        for (int64_t i = 0; i < shape.head_dim; ++i) {
          const int64_t index = (to * shape.block_size + slot) * shape.head_dim + i;
          wide_keys[index] = kind == 0 ? some_number() : codes[kind - 1].key(from, slot, i);
          put(keys.as<void>(), dtype, index, kind == 0 ? wide_keys[index] : NAN);
        }
        for (int64_t i = 0; i < shape.value_dim; ++i) {
          const int64_t index = (to * shape.block_size + slot) * shape.value_dim + i;
          wide_values[index] = kind == 0 ? some_number() : codes[kind - 1].value(from, slot, i);
          put(values.as<void>(), dtype, index, kind == 0 ? wide_values[index] : NAN);
        }
      }
    }
  }
  *lens.as<int32_t>() = shape.seq_len;
  running.as<int32_t>()[0] = 0;
  running.as<int32_t>()[1] = shape.num_queries;
  for (int64_t head = 0; head < shape.num_heads; ++head) {
    sinks.as<float>()[head] = some_number();
    slopes.as<float>()[head] = std::abs(some_number()) / 4;
  }
  for (int64_t i = 0; i < std::min<int64_t>(shape.num_queries, kMaxTreeTokens); ++i) {
    tree.as<int32_t>()[i] = static_cast<int32_t>((std::rand() & ((1 << i) - 1)) | 1 << i);
  }
  args.query = query.as<void>();
  args.key_cache = keys.as<void>();
  args.value_cache = values.as<void>();
  args.block_table = table.as<int32_t>();
  args.seq_lens = lens.as<int32_t>();
  args.cu_seqlens_q = running.as<int32_t>();
  args.out = out.as<void>();
  args.lse = lse.as<float>();
  if (rules.soft_cap) args.soft_cap = 2.0f;
  if (rules.sinks) args.sinks = sinks.as<float>();
  if (rules.alibi) args.alibi_slopes = slopes.as<float>();
  if (rules.tree) args.tree_mask = tree.as<int32_t>();
  paged_attention(args, path, 2);

  PagedAttentionArgs wide = args;
  wide.query = wide_query.data();
  wide.key_cache = wide_keys.data();
  wide.value_cache = wide_values.data();
  wide.block_table = plain_table.as<int32_t>();
  wide.out = wide_out.data();
  wide.lse = wide_lse.data();
  wide.int8 = wide.int4 = {};
  wide.dtype = wide.cache_dtype = DType::kFloat32;
  paged_attention(wide, AttentionPath::kPortable, 1);
  const float tolerance = dtype == DType::kFloat32 ? 1e-5f : 3e-2f;
  for (int64_t i = 0; i < out_size; ++i) {
    CHECK(std::abs(get(args.out, dtype, i) - wide_out[i]) < tolerance);
  }
  for (size_t i = 0; i < wide_lse.size(); ++i) {
    CHECK(std::abs(args.lse[i] - wide_lse[i]) < tolerance);
  }
}

// Every float8 number, once as a key and once as a value.
void test_float8(AttentionPath path, DType dtype) {
  const Shape shape = {1, 1, 16, 16, 16, 16, 1, 0};
  PagedAttentionArgs args = args_of(shape, dtype);
  args.cache_dtype = DType::kFloat8;
  const int64_t item = dtype == DType::kFloat32 ? 4 : 2;
  const Guarded keys(256), values(256), query(16 * item), out(16 * item), table(4), lens(4);
  *table.as<int32_t>() = 0;
  *lens.as<int32_t>() = 1;
  std::memset(query.as<void>(), 0, 16 * item);
  args.query = query.as<void>();
  args.key_cache = keys.as<void>();
  args.value_cache = values.as<void>();
  args.block_table = table.as<int32_t>();
  args.seq_lens = lens.as<int32_t>();
  args.out = out.as<void>();
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;  // not a number
    std::memset(keys.as<void>(), 0, 256);
    std::memset(values.as<void>(), code, 256);
    paged_attention(args, path, 1);
    const int exponent = (code >> 3) & 15, fraction = code & 7;
    float want = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                               : std::ldexp(1.0f + static_cast<float>(fraction) / 8, exponent - 7);
    if (code & 0x80) want = -want;
    for (int64_t i = 0; i < 16; ++i) CHECK(get(args.out, dtype, i) == want);
  }
}

}  // namespace

int main() {
  const AttentionPath paths[] = {AttentionPath::kPortable, AttentionPath::kAvx2,
                                 AttentionPath::kAvx512,   AttentionPath::kAvx512Bf16,
                                 AttentionPath::kAmx,      AttentionPath::kAmxEmulated};
  const Shape shapes[] = {
      {4, 1, 64, 64, 64, 200, 1, 0},     // decode, one head
      {8, 2, 128, 128, 64, 700, 1, 0},   // decode, heads together
      {6, 2, 80, 80, 16, 150, 2, 0},     // several kinds in a tile of keys
      {4, 4, 256, 256, 32, 100, 1, 30},  // window
      {2, 1, 64, 64, 64, 333, 40, 0},    // many rows
      {5, 1, 96, 64, 32, 130, 3, 0},     // values narrower than keys
      {3, 1, 128, 128, 48, 120, 7, 0},   // tiles and blocks do not end together
  };
  const Rules rules[] = {
      {false, false, false, false}, {true, true, true, false}, {true, false, true, true}};
  for (const AttentionPath path : paths) {
    if (!has_attention_path(path)) continue;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      test_float8(path, dtype);
      for (const Shape& shape : shapes) {
        for (const Rules& rule : rules) {
          if (rule.tree && shape.num_queries > kMaxTreeTokens) continue;
          test_codes(shape, rule, dtype, path);
        }
      }
    }
  }
  std::puts("ok");
  return 0;
}
