// Writes new keys and values into the block-table cache: one copy for each head of each token.
#include "kvkernels/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kvkernels/parallel.h"

namespace kvkernels {
namespace {

// Bytes per piece of work: waking a thread takes about as long as copying this many.
constexpr int64_t kGrainBytes = 512 << 10;

void check_slots(const StoreKVArgs& args) {
  const int64_t num_slots = args.num_blocks * args.block_size;
  int64_t largest = -1;
  for (int64_t token = 0; token < args.num_tokens; ++token) {
    largest = std::max(largest, args.slot_mapping[token * args.slot_mapping_stride]);
  }
  if (largest >= num_slots) {
    throw std::invalid_argument("slot_mapping: expected slots below " + std::to_string(num_slots) +
                                ", got " + std::to_string(largest));
  }
}

void copy_token(const StoreSide& side, const StoreKVArgs& args, int64_t token, int64_t block,
                int64_t offset) {
  const std::byte* source = side.source + token * side.source_token_stride;
  std::byte* target =
      side.cache + block * side.cache_block_stride + offset * side.cache_slot_stride;
  for (int64_t head = 0; head < args.num_kv_heads; ++head) {
    std::memcpy(target + head * side.cache_head_stride, source + head * side.source_head_stride,
                args.head_bytes);
  }
}

}  // namespace

void store_kv(const StoreKVArgs& args, int num_threads) {
  check_slots(args);
  const int64_t token_bytes = std::max<int64_t>(1, 2 * args.num_kv_heads * args.head_bytes);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / token_bytes);
  parallel_ranges(args.num_tokens, grain, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = args.slot_mapping[token * args.slot_mapping_stride];
      if (slot < 0) continue;
      copy_token(args.key, args, token, slot / args.block_size, slot % args.block_size);
      copy_token(args.value, args, token, slot / args.block_size, slot % args.block_size);
    }
  });
}

}  // namespace kvkernels
