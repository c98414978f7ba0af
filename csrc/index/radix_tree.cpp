// Match, insert, and the nodes they make. Each operation first allocates all that it needs and only
// then changes the tree, so that running out of memory leaves it whole.
#include "kvkernels/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>

namespace kvkernels {
namespace {

constexpr std::uint32_t kMaxBlockSize = 65535;  // a record stores it in 16 bits
constexpr std::uint32_t kMaxGroups = 65535;

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

std::uint32_t check_range(const char* name, std::uint32_t value, std::uint32_t highest) {
  if (value >= 1 && value <= highest) return value;
  throw std::invalid_argument(std::string(name) + ": expected 1 to " + std::to_string(highest) +
                              ", got " + std::to_string(value));
}

std::uint64_t random_seed() {
  std::random_device device;
  return (std::uint64_t{device()} << 32) | device();
}

}  // namespace

RadixTree::RadixTree(std::uint32_t block_size, std::uint32_t num_groups,
                     std::vector<std::uint32_t> window_blocks, std::uint32_t hash_mask)
    : block_size_(check_range("block_size", block_size, kMaxBlockSize)),
      num_groups_(check_range("num_groups", num_groups, kMaxGroups)),
      window_blocks_(std::move(window_blocks)),
      hash_mask_(hash_mask),
      // Prompts come from strangers: with a known seed they could choose blocks that collide.
      hash_seed_(random_seed()) {
  if (!window_blocks_.empty() && window_blocks_.size() != num_groups_) {
    throw std::invalid_argument("window_blocks: expected " + std::to_string(num_groups_) +
                                " (one a group), got " + std::to_string(window_blocks_.size()));
  }
  const auto has_none = [](std::uint32_t window) { return window == kNoWindow; };
  if (std::all_of(window_blocks_.begin(), window_blocks_.end(), has_none)) window_blocks_.clear();
}

// ---- following a path -----------------------------------------------------------------------

std::uint32_t RadixTree::hash_of(NodeId parent, const std::uint32_t* block) const {
  constexpr std::uint64_t kA = 0xa0761d6478bd642full, kB = 0xe7037ed1a0b428dbull;
  std::uint64_t hash = mix(hash_seed_ ^ kA, parent ^ kB);
  std::size_t i = 0;
  for (; i + 4 <= block_size_; i += 4) {
    std::uint64_t pair[2];
    std::memcpy(pair, block + i, sizeof pair);
    hash = mix(pair[0] ^ kA ^ hash_seed_, pair[1] ^ kB ^ hash);
  }
  for (; i < block_size_; ++i) hash = mix(block[i] ^ kA ^ hash_seed_, hash ^ kB);
  return static_cast<std::uint32_t>(hash ^ (hash >> 32)) & hash_mask_;
}

RadixTree::NodeId RadixTree::find_child(NodeId parent, const std::uint32_t* block) const {
  return children_.find(hash_of(parent, block), [&](NodeId id) {
    const Node& node = nodes_[id];
    return node.parent == parent &&
           std::memcmp(tokens_of(node), block, block_size_ * sizeof *block) == 0;
  });
}

// How many of the node's first `num_blocks` blocks have these tokens.
std::size_t RadixTree::count_equal_blocks(const Node& node, const std::uint32_t* tokens,
                                          std::size_t num_blocks) const {
  // Compares stretches of 4 KB, for which memcmp is fast; then block by block in the one that
  // differs.
  const std::size_t stretch = std::max<std::size_t>(1, 1024 / block_size_);
  const std::uint32_t* stored = tokens_of(node);
  const auto is_equal = [&](std::size_t first, std::size_t count) {
    const std::size_t offset = first * block_size_;
    return std::memcmp(stored + offset, tokens + offset, count * block_size_ * sizeof *tokens) == 0;
  };
  std::size_t equal = 0;
  while (equal < num_blocks) {
    const std::size_t count = std::min(stretch, num_blocks - equal);
    if (!is_equal(equal, count)) break;
    equal += count;
  }
  while (equal < num_blocks && is_equal(equal, 1)) ++equal;
  return equal;
}

// Follows the tree from a root as far as the tokens agree, splits the node if that is inside one,
// and touches the path.
RadixTree::End RadixTree::follow(NodeId root, const std::uint32_t* tokens, std::size_t num_blocks) {
  ++clock_;
  End end{root, 0};
  while (end.num_blocks < num_blocks) {
    const std::uint32_t* rest = tokens + end.num_blocks * block_size_;
    NodeId child = find_child(end.node, rest);
    if (child == kNoNode) break;
    const std::size_t length = nodes_[child].num_blocks;
    const std::size_t comparable = std::min(length, num_blocks - end.num_blocks);
    const std::size_t equal = count_equal_blocks(nodes_[child], rest, comparable);
    if (equal < length) child = split(child, static_cast<std::uint32_t>(equal));
    nodes_[child].tick = clock_;
    end = {child, end.num_blocks + equal};
    if (equal < length) break;
  }
  return end;
}

// Splits a node after `num_upper` blocks; returns the new upper part. The lower part keeps its
// number.
RadixTree::NodeId RadixTree::split(NodeId id, std::uint32_t num_upper) {
  Node& lower = nodes_[id];
  const std::uint32_t num_lower = lower.num_blocks - num_upper;
  Words upper_words = copy_words(lower, 0, num_upper, num_upper);
  Words lower_words = copy_words(lower, num_upper, num_lower, num_lower);
  children_.reserve_one();
  const NodeId upper_id = new_node();

  Node& upper = nodes_[upper_id];
  children_.rename(hash_of(lower.parent, tokens_of(lower)), id, upper_id);
  upper.tick = lower.tick;
  upper.parent = lower.parent;
  nodes_[upper.parent].children_xor ^= id ^ upper_id;
  upper.first_block = lower.first_block;
  upper.num_blocks = num_upper;
  set_words(upper, std::move(upper_words), num_upper);
  lower.parent = upper_id;
  add_to_parent(id);
  upper.num_kept_children = is_kept(lower);
  lower.first_block += num_upper;
  lower.num_blocks = num_lower;
  set_words(lower, std::move(lower_words), num_lower);
  children_.insert(hash_of(upper_id, tokens_of(lower)), id);
  if (lower.holder != kNoNode) list_holder(upper_id);
  return upper_id;
}

// ---- match and insert -----------------------------------------------------------------------

RadixTree::Match RadixTree::match(Tokens tokens, std::string_view salt) {
  const std::size_t num_blocks = tokens.size() / block_size_;
  ++num_matches_;
  lookup_blocks_ += num_blocks;
  const NodeId root = root_of(salt);
  if (root == kNoNode) return {};
  const End end = follow(root, tokens.data(), num_blocks);
  if (end.node != root) nodes_[end.node].matched_tick = clock_;
  hit_blocks_ += end.num_blocks;
  return describe_end(end, root);
}

RadixTree::Match RadixTree::peek(Tokens tokens, std::string_view salt) {
  const NodeId root = root_of(salt);
  if (root == kNoNode) return {};
  return describe_end(follow(root, tokens.data(), tokens.size() / block_size_), root);
}

// The run from a root to an end that follow() found, with a handle to it.
RadixTree::Match RadixTree::describe_end(End end, NodeId root) {
  if (end.node == root) return {};
  Match match{end.num_blocks, {end.node, nodes_[end.node].generation}, {}};
  match.block_ids.resize(end.num_blocks * num_groups_);
  for (NodeId id = end.node; id != root; id = nodes_[id].parent) {
    const Node& node = nodes_[id];
    std::copy_n(ids_of(node), std::size_t{node.num_blocks} * num_groups_,
                match.block_ids.data() + std::size_t{node.first_block} * num_groups_);
  }
  nodes_[end.node].is_handed_out = true;
  return match;
}

std::vector<std::int32_t> RadixTree::insert(Tokens tokens, std::span<const std::int32_t> block_ids,
                                            std::string_view salt) {
  const std::size_t num_blocks = block_ids.size() / num_groups_;
  if (num_blocks * block_size_ > tokens.size()) {
    throw std::invalid_argument(
        "block_ids: expected at most " + std::to_string(tokens.size() / block_size_) +
        " rows (whole blocks of tokens), got " + std::to_string(num_blocks));
  }
  std::vector<std::int32_t> offered(block_ids.begin(), block_ids.end());
  if (num_blocks == 0) return offered;

  NodeId root = root_of(salt);
  if (root == kNoNode) root = add_root(salt);
  const End end = follow(root, tokens.data(), num_blocks);
  NodeId last = end.node;
  if (end.num_blocks < num_blocks) {
    const std::uint32_t* rest = tokens.data() + end.num_blocks * block_size_;
    const std::int32_t* rest_ids = offered.data() + end.num_blocks * num_groups_;
    Node& node = nodes_[end.node];
    // Decoding appends block after block: growing the leaf keeps one node where a chain would form.
    if (is_evictable(node) && !node.is_handed_out) {
      extend(node, rest, rest_ids, num_blocks - end.num_blocks);
    } else {
      last = add_child(end.node, rest, rest_ids, num_blocks - end.num_blocks);
    }
    if (holds_windowed(nodes_[last])) list_holder(last);
    std::fill(offered.begin() + end.num_blocks * num_groups_, offered.end(), -1);
  }
  take_holes(end.node, offered);
  settle(last);
  return offered;
}

void RadixTree::extend(Node& node, const std::uint32_t* tokens, const std::int32_t* ids,
                       std::size_t num_blocks) {
  const std::size_t needed = node.num_blocks + num_blocks;
  if (needed > node.capacity) {
    const std::size_t capacity = std::max(needed, node.capacity + std::size_t{node.capacity} / 4);
    set_words(node, copy_words(node, 0, node.num_blocks, capacity), capacity);
  }
  std::copy_n(tokens, num_blocks * block_size_,
              tokens_of(node) + std::size_t{node.num_blocks} * block_size_);
  std::copy_n(ids, num_blocks * num_groups_,
              ids_of(node) + std::size_t{node.num_blocks} * num_groups_);
  node.num_blocks += static_cast<std::uint32_t>(num_blocks);
  num_blocks_ += num_blocks;
  inserted_blocks_ += num_blocks;
}

RadixTree::NodeId RadixTree::add_child(NodeId parent, const std::uint32_t* tokens,
                                       const std::int32_t* ids, std::size_t num_blocks) {
  Words words = std::make_unique_for_overwrite<std::uint32_t[]>(num_blocks * words_per_block());
  children_.reserve_one();
  reserve_queue();
  const NodeId id = new_node();

  Node& node = nodes_[id];
  node.tick = clock_;
  node.parent = parent;
  node.first_block = nodes_[parent].first_block + nodes_[parent].num_blocks;
  set_words(node, std::move(words), num_blocks);
  extend(node, tokens, ids, num_blocks);
  children_.insert(hash_of(parent, tokens), id);
  add_to_parent(id);
  return id;
}

// Gives blocks on the path to `end` the offered ids where they have none (-1). What is taken
// becomes -1 in `offered`.
void RadixTree::take_holes(NodeId end, std::span<std::int32_t> offered) {
  for (NodeId id = end; nodes_[id].num_blocks > 0; id = nodes_[id].parent) {
    const Node& node = nodes_[id];
    std::int32_t* held = ids_of(node);
    std::int32_t* rows = offered.data() + std::size_t{node.first_block} * num_groups_;
    bool has_taken = false;
    for (std::size_t i = 0; i < std::size_t{node.num_blocks} * num_groups_; ++i) {
      if (held[i] >= 0 || rows[i] < 0) continue;
      std::swap(held[i], rows[i]);
      has_taken = true;
    }
    if (has_taken && holds_windowed(node)) list_holder(id);
  }
}

}  // namespace kvkernels
