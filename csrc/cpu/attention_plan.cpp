// Cuts the work of a paged attention call into items, after checking the values in its index
// tensors.
#include "cpu/attention_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/attention_rows.h"

namespace kvkernels {
namespace {

// Chunks end at multiples of this many keys, as do the key tiles of all kernels but AMX (128 keys).
constexpr int64_t kChunkUnit = 64;
// Each chunk has a result of its own for every head, which must be written and merged: on two cores
// of Zen 5, decode of 4 x 8k took 3 to 7 % less time in chunks of 1024 keys than in chunks of 256,
// that of one sequence of 4k with 3 heads a tenth less in chunks of 768. So a chunk is as long as
// leaves a sequence kMinItems items if each had one head, within these bounds. It has also at least
// kMinChunkPerRow keys for each row of its tile, so that results take little memory beside the
// keys.
constexpr int64_t kMinChunk = 256, kMaxMinChunk = 1024, kMinItems = 16, kMinChunkPerRow = 32;
// A long sequence is cut into about this many items: enough to fill the threads of a large machine,
// and to balance them, when it comes alone. More would cost bandwidth for results that must be
// merged.
constexpr int64_t kItemsPerSequence = 128;
// A tile of few rows spends its time on reading keys, and processors read long contiguous pieces
// faster: decode ran at 31, 35 and 37 GB/s in pieces of 16, 64 and 128 KiB (2 cores of Zen 5, which
// read one long array at 47). The heads of a block are neighbours in memory, so a tile takes as
// many heads as make such a piece, and no more, to leave items for other threads.
constexpr int64_t kPieceBytes = 128 << 10;
constexpr int64_t kMaxRowsOfHeads =
    32;  // summed over a tile's heads: they should stay in the L1 cache
// Where a call has fewer items than this for each thread, its tiles take fewer heads.
constexpr int64_t kItemsPerThread = 2;
// Keys per chunk where chunks are cut by position. Fewer would cost more merging; more would leave
// threads idle when one sequence of a few thousand tokens comes alone.
constexpr int64_t kPositionChunk = 512;
// The most floats that partial results of chunks cut by position may take in one call; past it a
// tile's chunks stay in one item.
constexpr int64_t kMaxPartialFloats = 4 << 20;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct QueryRange {
  int64_t begin, end;
};

QueryRange queries_of(const PagedAttentionArgs& args, int64_t seq) {
  if (args.cu_seqlens_q == nullptr) return {seq, seq + 1};
  return {args.cu_seqlens_q[seq], args.cu_seqlens_q[seq + 1]};
}

// The first key that any of the sequence's queries sees.
int64_t first_visible_key(const PagedAttentionArgs& args, int64_t seq_len, int64_t num_queries) {
  if (args.window == 0) return 0;
  return std::clamp<int64_t>(seq_len - num_queries - args.window + 1, 0, seq_len);
}

std::string number(int64_t value) { return std::to_string(value); }

void check_running_sum(const PagedAttentionArgs& args) {
  const int32_t* sums = args.cu_seqlens_q;
  if (sums == nullptr) return;
  if (sums[0] != 0 || sums[args.num_seqs] != args.num_tokens) {
    throw std::invalid_argument("cu_seqlens_q: expected to run from 0 to " +
                                number(args.num_tokens) + ", got " + number(sums[0]) + " to " +
                                number(sums[args.num_seqs]));
  }
  for (int64_t seq = 0; seq < args.num_seqs; ++seq) {
    if (sums[seq + 1] >= sums[seq]) continue;
    throw std::invalid_argument("cu_seqlens_q: expected no decrease, got one at sequence " +
                                number(seq));
  }
}

// Entries [begin, end) of the sequence's row of the table.
void check_blocks(const PagedAttentionArgs& args, int64_t seq, int64_t begin, int64_t end) {
  const int64_t counts[] = {args.num_blocks, args.int8.num_blocks, args.int4.num_blocks};
  const int32_t* entries = args.block_table + seq * args.table_stride;
  bool is_good = true;
  for (int64_t i = begin; i < end; ++i) {
    const auto [kind, id] = block_entry(entries[i]);
    const auto index = static_cast<uint32_t>(kind);
    is_good &= index < 3 && id < counts[index < 3 ? index : 0];
  }
  if (is_good) return;
  for (int64_t i = begin; i < end; ++i) {
    const auto [kind, id] = block_entry(entries[i]);
    const auto index = static_cast<uint32_t>(kind);
    if (index < 3 && id < counts[index]) continue;
    const bool is_named =
        index == 1 || index == 2;  // any other kind is reported as a plain id out of range
    const char* const names[] = {"", "int8 ", "int4 "};
    const std::string name = names[is_named ? index : 0], of_seq = " for sequence " + number(seq);
    if (is_named && counts[index] == 0) {
      throw std::invalid_argument("block_table: expected no " + name +
                                  "block without such a cache, got one" + of_seq);
    }
    throw std::invalid_argument("block_table: expected " + name + "block ids 0 to " +
                                number(counts[is_named ? index : 0] - 1) + ", got " +
                                number(is_named ? id : entries[i]) + of_seq);
  }
}

void check_sequence(const PagedAttentionArgs& args, int64_t seq) {
  const int64_t max_tokens = args.max_blocks_per_seq * args.block_size;
  const int64_t seq_len = args.seq_lens[seq];
  if (seq_len < 0 || seq_len > max_tokens) {
    throw std::invalid_argument("seq_lens: expected 0 to " + number(max_tokens) +
                                " (the table's width), got " + number(seq_len) + " for sequence " +
                                number(seq));
  }
  const QueryRange queries = queries_of(args, seq);
  if (queries.begin == queries.end || seq_len == 0) return;
  if (args.tree_mask != nullptr && queries.end - queries.begin > kMaxTreeTokens) {
    throw std::invalid_argument("tree_mask: expected at most " + number(kMaxTreeTokens) +
                                " queries a sequence, got " + number(queries.end - queries.begin) +
                                " for sequence " + number(seq));
  }
  const int64_t begin =
      first_visible_key(args, seq_len, queries.end - queries.begin) / args.block_size;
  const int64_t end = (seq_len + args.block_size - 1) / args.block_size;
  check_blocks(args, seq, begin, end);
}

int64_t heads_per_tile(const PagedAttentionArgs& args, const AttentionKernel& kernel,
                       int64_t num_rows) {
  if (num_rows > kernel.max_rows_many_heads || args.batch_invariant) return 1;
  const int64_t head_bytes = args.block_size * args.head_dim * item_bytes(args.dtype);
  const int64_t num_heads = (kPieceBytes + head_bytes - 1) / std::max<int64_t>(head_bytes, 1);
  return std::clamp<int64_t>(num_heads, 1,
                             std::min({args.num_kv_heads, kMaxTileHeads,
                                       std::max<int64_t>(kMaxRowsOfHeads / num_rows, 1)}));
}

void group_heads(SequencePlan& plan, int64_t heads_per_tile) {
  plan.heads_per_tile = heads_per_tile;
  plan.num_head_tiles = (plan.num_kv_heads + heads_per_tile - 1) / heads_per_tile;
}

// Cuts the keys into about as many chunks as give kItemsPerSequence items, or fewer where those
// would be too short.
void cut_by_length(SequencePlan& plan, int64_t first_visible) {
  plan.first_key = first_visible / kChunkUnit * kChunkUnit;
  const int64_t num_keys = plan.seq_len - plan.first_key;
  const int64_t num_wanted = std::clamp<int64_t>(
      kItemsPerSequence / (plan.num_tiles * plan.num_head_tiles), 1, kMaxChunks);
  const int64_t min_chunk = std::clamp(num_keys * plan.num_tiles * plan.num_kv_heads / kMinItems,
                                       kMinChunk, kMaxMinChunk);
  plan.chunk_size = std::max(
      {min_chunk, kMinChunkPerRow * plan.rows_per_tile, (num_keys + num_wanted - 1) / num_wanted});
  plan.chunk_size = round_up(plan.chunk_size, kChunkUnit);
  plan.num_chunks =
      std::clamp<int64_t>((num_keys + plan.chunk_size - 1) / plan.chunk_size, 1, num_wanted);
  if (num_wanted == 1) plan.chunk_size = std::max<int64_t>(num_keys, 1);
  plan.num_splits = plan.num_chunks;
}

// Cuts the keys at the same positions whatever the length and the number of queries. A query's
// chunks are merged in order whoever computes them, so their distribution over items may depend on
// the length.
void cut_by_position(SequencePlan& plan, int64_t first_visible, int64_t& partials_left) {
  plan.first_key = first_visible / kPositionChunk * kPositionChunk;
  plan.chunk_size = kPositionChunk;
  plan.num_chunks =
      std::max<int64_t>(1, (plan.seq_len - plan.first_key + kPositionChunk - 1) / kPositionChunk);
  const int64_t num_tiles = plan.num_tiles * plan.num_head_tiles;
  const int64_t num_floats = num_tiles * plan.num_chunks * plan.heads_per_tile * plan.result_size;
  const bool is_split = num_tiles < kItemsPerSequence && num_floats <= partials_left;
  plan.num_splits = is_split ? plan.num_chunks : 1;
  if (plan.num_splits > 1) partials_left -= num_floats;
}

SequencePlan plan_sequence(const PagedAttentionArgs& args, int64_t seq,
                           const AttentionKernel& kernel, int64_t& partials_left) {
  const QueryRange queries = queries_of(args, seq);
  const int64_t num_queries = queries.end - queries.begin;
  SequencePlan plan = {};
  plan.blocks = args.block_table + seq * args.table_stride;
  plan.seq_len = args.seq_lens[seq];
  plan.first_token = queries.begin;
  plan.first_position = plan.seq_len - num_queries;
  plan.num_rows = num_queries * (args.num_heads / args.num_kv_heads);
  plan.rows_per_tile = std::min(plan.num_rows, kernel.max_rows);
  plan.num_tiles = (plan.num_rows + plan.rows_per_tile - 1) / plan.rows_per_tile;
  plan.result_size =
      plan.rows_per_tile * (args.value_dim + 2);  // in floats, per row: out, max, sum
  plan.num_kv_heads = args.num_kv_heads;
  group_heads(plan, heads_per_tile(args, kernel, plan.num_rows));
  const int64_t first_visible = first_visible_key(args, plan.seq_len, num_queries);
  if (args.batch_invariant) {
    cut_by_position(plan, first_visible, partials_left);
  } else {
    cut_by_length(plan, first_visible);
  }
  return plan;
}

// Gives tiles fewer heads where there are fewer items than the threads want. No head's result
// depends on the heads beside it.
void spread_heads(std::vector<SequencePlan>& sequences, int num_threads) {
  int64_t num_items = 0;
  for (const SequencePlan& seq : sequences) num_items += seq.num_items();
  const int64_t num_wanted = num_threads > 1 ? kItemsPerThread * num_threads : 1;
  if (num_items == 0 || num_items >= num_wanted) return;
  const int64_t num_parts = (num_wanted + num_items - 1) / num_items;
  for (SequencePlan& seq : sequences) {
    group_heads(seq, (seq.heads_per_tile + num_parts - 1) / num_parts);
  }
}

}  // namespace

AttentionTile SequencePlan::tile(const PagedAttentionArgs& args, int64_t index) const {
  const int64_t row_begin = (num_tiles - 1 - index / num_head_tiles) * rows_per_tile;
  const int64_t kv_head = index % num_head_tiles * heads_per_tile;
  AttentionTile tile = {&args,
                        blocks,
                        seq_len,
                        first_token,
                        first_position,
                        kv_head,
                        std::min(heads_per_tile, num_kv_heads - kv_head),
                        row_begin,
                        std::min(num_rows, row_begin + rows_per_tile),
                        0,
                        seq_len,
                        nullptr};
  const int64_t begin = visible_keys(tile, tile.row_begin).begin;
  const int64_t end = visible_keys(tile, tile.row_end - 1).end;
  tile.key_begin = begin;
  tile.key_end = end;
  return tile;
}

bool SequencePlan::clip_to_chunk(AttentionTile& tile, int64_t chunk) const {
  const int64_t begin = first_key + chunk * chunk_size;
  tile.key_begin = std::max(tile.key_begin, begin);
  tile.key_end = std::min(tile.key_end, begin + chunk_size);
  return tile.key_begin < tile.key_end;
}

void check_indices(const PagedAttentionArgs& args) {
  check_running_sum(args);
  for (int64_t seq = 0; seq < args.num_seqs; ++seq) check_sequence(args, seq);
}

Plan make_plan(const PagedAttentionArgs& args, const AttentionKernel& kernel, int num_threads) {
  Plan plan;
  plan.sequences.reserve(args.num_seqs);
  int64_t partials_left = kMaxPartialFloats;
  for (int64_t seq = 0; seq < args.num_seqs; ++seq) {
    const QueryRange queries = queries_of(args, seq);
    if (queries.begin < queries.end) {
      plan.sequences.push_back(plan_sequence(args, seq, kernel, partials_left));
    }
  }
  spread_heads(plan.sequences, num_threads);
  for (SequencePlan& seq : plan.sequences) {
    const int64_t chunks_per_item = seq.num_chunks / seq.num_splits;
    seq.item_cost = seq.rows_per_tile * seq.heads_per_tile * seq.chunk_size * chunks_per_item;
  }
  // The costliest items first, so that the threads end at about the same time.
  std::stable_sort(
      plan.sequences.begin(), plan.sequences.end(),
      [](const SequencePlan& a, const SequencePlan& b) { return a.item_cost > b.item_cost; });
  for (SequencePlan& seq : plan.sequences) {
    const int64_t num_tiles = seq.num_tiles * seq.num_head_tiles;
    seq.first_item = plan.num_items;
    plan.num_items += seq.num_items();
    seq.cost_before = plan.cost;
    plan.cost += seq.num_items() * seq.item_cost;
    // Up to four rows take equally long: reading the keys takes all of that time.
    plan.num_scores += std::max<int64_t>(seq.num_rows, 4) * seq.num_kv_heads * seq.seq_len;
    if (seq.num_splits == 1) continue;
    seq.first_partial = plan.num_partials;
    seq.first_split_tile = plan.num_split_tiles;
    plan.num_partials += num_tiles * seq.num_splits * seq.heads_per_tile * seq.result_size;
    plan.num_split_tiles += num_tiles;
  }
  return plan;
}

}  // namespace kvkernels
