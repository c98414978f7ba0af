// Runs the attention and cache kernels on memory that ends at a page nobody may touch, so that a
// vector read past the end of a cache, a table or a query faults. Needs no Python; also run with
// AddressSanitizer and UndefinedBehaviorSanitizer.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "guarded.h"
#include "kvkernels/attention.h"
#include "kvkernels/kv_cache.h"
#include "kvkernels/parallel.h"

namespace {

using namespace kvkernels;

struct Shape {
  std::vector<int32_t> num_queries, seq_lens;
  int64_t num_heads, num_kv_heads, head_dim, block_size, window;
};

// Attention of one query head at one position, in double precision.
std::vector<double> expected_row(const PagedAttentionArgs& args, int64_t seq, int64_t token,
                                 int64_t head, int64_t position) {
  const int64_t kv_head = head / (args.num_heads / args.num_kv_heads);
  const int64_t first = args.window > 0 ? std::max<int64_t>(0, position - args.window + 1) : 0;
  std::vector<double> out(args.head_dim), scores;
  double sum = 0, max = -INFINITY;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t key = first; key <= position; ++key) {
      const int64_t block = args.block_table[seq * args.table_stride + key / args.block_size];
      const int64_t start = block * args.key_block_stride + kv_head * args.key_head_stride +
                            key % args.block_size * args.key_slot_stride;
      if (pass == 0) {
        double score = 0;
        for (int64_t i = 0; i < args.head_dim; ++i) {
          const int64_t q = token * args.query_token_stride + head * args.query_head_stride + i;
          score += static_cast<double>(get(args.query, args.dtype, q)) *
                   get(args.key_cache, args.dtype, start + i);
        }
        scores.push_back(score * args.sm_scale);
        max = std::max(max, scores.back());
        continue;
      }
      const double weight = std::exp(scores[key - first] - max);
      sum += weight;
      for (int64_t i = 0; i < args.head_dim; ++i) {
        out[i] += weight * get(args.value_cache, args.dtype, start + i);
      }
    }
  }
  for (double& value : out) value = sum > 0 ? value / sum : 0;
  return out;
}

void test_attention(const Shape& shape, DType dtype, AttentionPath path, int num_threads) {
  const int64_t item = dtype == DType::kFloat32 ? 4 : 2;
  const int64_t num_seqs = static_cast<int64_t>(shape.seq_lens.size());
  std::vector<int32_t> sums = {0};
  int64_t num_blocks = 0, width = 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const int64_t needed = (shape.seq_lens[seq] + shape.block_size - 1) / shape.block_size;
    sums.push_back(sums.back() + shape.num_queries[seq]);
    num_blocks += needed;
    width = std::max(width, needed);
  }
  const int64_t num_tokens = sums.back();
  const int64_t query_size = num_tokens * shape.num_heads * shape.head_dim;
  const int64_t slot_bytes = shape.head_dim * item;
  const int64_t cache_size = num_blocks * shape.num_kv_heads * shape.block_size * shape.head_dim;
  // The last slots of the last block are cut off: where the last sequence does not fill it, the
  // kernels have no business there. Only possible with one head, which is then the last in memory.
  const int64_t unused = shape.num_kv_heads == 1 && shape.seq_lens.back() % shape.block_size != 0
                             ? shape.block_size - shape.seq_lens.back() % shape.block_size
                             : 0;
  const Guarded query(query_size * item), out(query_size * item);
  const Guarded keys(cache_size * item - unused * slot_bytes);
  const Guarded values(cache_size * item - unused * slot_bytes);
  const Guarded lse(num_tokens * shape.num_heads * 4), lens(num_seqs * 4);
  const Guarded running(sums.size() * 4), table(num_seqs * width * 4);
  for (int64_t i = 0; i < query_size; ++i) put(query.as<void>(), dtype, i, some_number());
  for (int64_t i = 0; i < cache_size - unused * shape.head_dim; ++i) {
    put(keys.as<void>(), dtype, i, some_number());
    put(values.as<void>(), dtype, i, some_number());
  }
  std::memcpy(lens.as<void>(), shape.seq_lens.data(), num_seqs * 4);
  std::memcpy(running.as<void>(), sums.data(), sums.size() * 4);
  int32_t next = 0;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    const int64_t needed = (shape.seq_lens[seq] + shape.block_size - 1) / shape.block_size;
    for (int64_t i = 0; i < width; ++i) {
      table.as<int32_t>()[seq * width + i] = i < needed ? next++ : 2147480000;
    }
  }

  PagedAttentionArgs args = {};
  args.query = query.as<void>();
  args.key_cache = keys.as<void>();
  args.value_cache = values.as<void>();
  args.block_table = table.as<int32_t>();
  args.seq_lens = lens.as<int32_t>();
  args.cu_seqlens_q = running.as<int32_t>();
  args.out = out.as<void>();
  args.lse = lse.as<float>();
  args.num_tokens = num_tokens;
  args.num_heads = shape.num_heads;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = args.value_dim = shape.head_dim;
  args.num_seqs = num_seqs;
  args.max_blocks_per_seq = args.table_stride = width;
  args.num_blocks = num_blocks;
  args.block_size = shape.block_size;
  args.query_token_stride = shape.num_heads * shape.head_dim;
  args.query_head_stride = shape.head_dim;
  args.key_slot_stride = args.value_slot_stride = shape.head_dim;
  args.key_head_stride = args.value_head_stride = shape.block_size * shape.head_dim;
  args.key_block_stride = args.value_block_stride = shape.num_kv_heads * args.key_head_stride;
  args.sm_scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
  args.causal = true;
  args.window = shape.window;
  args.dtype = args.cache_dtype = dtype;
  paged_attention(args, path, num_threads);

  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : 2e-2;
  for (int64_t seq = 0; seq < num_seqs; ++seq) {
    for (int64_t token = sums[seq]; token < sums[seq + 1]; ++token) {
      const int64_t position = shape.seq_lens[seq] - (sums[seq + 1] - token);
      for (int64_t head = 0; head < shape.num_heads; ++head) {
        const std::vector<double> expected = expected_row(args, seq, token, head, position);
        for (int64_t i = 0; i < shape.head_dim; ++i) {
          const int64_t index = (token * shape.num_heads + head) * shape.head_dim + i;
          CHECK(std::abs(get(args.out, dtype, index) - expected[i]) < tolerance);
        }
      }
    }
  }
}

void test_all_attention() {
  const AttentionPath paths[] = {AttentionPath::kPortable, AttentionPath::kAvx2,
                                 AttentionPath::kAvx512,   AttentionPath::kAvx512Bf16,
                                 AttentionPath::kAmx,      AttentionPath::kAmxEmulated};
  const Shape shapes[] = {
      {{1, 1, 1}, {5, 33, 17}, 4, 1, 64, 16, 0},   // decode
      {{1, 1}, {300, 700}, 2, 2, 128, 64, 0},      // several chunks
      {{3, 0, 20}, {9, 8, 21}, 3, 1, 80, 16, 0},   // mixed, 63 rows
      {{70, 5}, {70, 131}, 4, 1, 96, 32, 0},       // many rows
      {{40, 1}, {90, 70}, 2, 1, 64, 16, 25},       // window
      {{9, 2}, {4, 1}, 2, 1, 32, 16, 0},           // queries before position 0
      {{11, 1}, {30, 19}, 2, 1, 7, 5, 0},          // nothing even
      {{9, 1, 2}, {70, 33, 13}, 5, 1, 40, 16, 0},  // vectors of 8, not of 16
      {{1, 2}, {301, 43}, 20, 20, 64, 16, 0},      // more heads than a tile has
      {{2}, {333}, 15, 5, 128, 32, 100},           // heads together, window, several chunks
  };
  for (const Shape& shape : shapes) {
    for (const AttentionPath path : paths) {
      if (!has_attention_path(path)) continue;
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        test_attention(shape, dtype, path, 1);
        test_attention(shape, dtype, path, 3);
      }
    }
  }
}

void expect_refused(const std::function<void()>& call, const std::string& start) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).rfind(start, 0) == 0);
    return;
  }
  CHECK(!"nothing was thrown");
}

void test_store() {
  const int64_t head_bytes = 24, num_slots = 6;
  const Guarded source(3 * 2 * head_bytes), keys(num_slots * 2 * head_bytes);
  const Guarded values(num_slots * 2 * head_bytes), slots(3 * 8);
  for (int64_t i = 0; i < 3 * 2 * head_bytes; ++i) source.as<char>()[i] = static_cast<char>(i + 1);
  const int64_t mapping[3] = {5, -1, 0};
  std::memcpy(slots.as<void>(), mapping, sizeof(mapping));
  const auto side = [&](const Guarded& cache) {
    // [3 blocks, 2 heads, 2 slots]
    return StoreSide{source.as<std::byte>(), cache.as<std::byte>(), 2 * head_bytes, head_bytes,
                     4 * head_bytes,         2 * head_bytes,        head_bytes};
  };
  const StoreKVArgs args = {side(keys), side(values), slots.as<int64_t>(), 1, 3, 2, 3,
                            2,          head_bytes};
  store_kv(args, 2);
  for (const Guarded* cache : {&keys, &values}) {
    for (int64_t head = 0; head < 2; ++head) {
      CHECK(std::memcmp(cache->as<char>() + (2 * 4 + head * 2 + 1) * head_bytes,
                        source.as<char>() + head * head_bytes, head_bytes) == 0);
      CHECK(std::memcmp(cache->as<char>() + head * 2 * head_bytes,
                        source.as<char>() + (4 + head) * head_bytes, head_bytes) == 0);
    }
    CHECK(cache->as<char>()[head_bytes] == 0);
  }
  slots.as<int64_t>()[2] = num_slots;
  expect_refused([&] { store_kv(args, 2); }, "slot_mapping: expected slots below 6, got 6");
}

void test_threads() {
  std::vector<int> seen(1000);
  parallel_ranges(1000, 7, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++seen[i];
  });
  for (const int count : seen) CHECK(count == 1);
  for (const int num_threads : {1, 4}) {
    try {
      run_parallel(num_threads, [] { throw std::out_of_range("from a body"); });
      CHECK(!"nothing was thrown");
    } catch (const std::out_of_range& error) {
      CHECK(std::string(error.what()) == "from a body");
    }
  }
}

}  // namespace

int main() {
  test_threads();
  test_store();
  test_all_attention();
  std::puts("ok");
  return 0;
}
