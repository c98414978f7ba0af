// What looks at a whole tree: statistics, the list of its runs, and the recount of every invariant.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "kvkernels/radix_tree.h"

namespace kvkernels {

RadixTree::Stats RadixTree::stats() const {
  constexpr std::size_t kMallocBytes =
      16;  // what glibc's malloc adds to an array, rounding included
  Stats stats;
  stats.num_blocks = num_blocks_;
  stats.num_runs = num_nodes_ - salts_.size();
  stats.num_salts = roots_.size();
  stats.num_pinned_runs = num_pinned_;
  stats.num_matches = num_matches_;
  stats.lookup_blocks = lookup_blocks_;
  stats.hit_blocks = hit_blocks_;
  stats.inserted_blocks = inserted_blocks_;
  stats.evicted_blocks = evicted_blocks_;
  stats.stripped_blocks = stripped_blocks_;
  stats.token_bytes = num_blocks_ * block_size_ * sizeof(std::uint32_t);
  stats.overhead_bytes = capacity_blocks_ * words_per_block() * sizeof(std::uint32_t) -
                         stats.token_bytes + stats.num_runs * kMallocBytes +
                         nodes_.size() * sizeof(Node) + children_.size_bytes() +
                         queue_.capacity() * sizeof(Queued) + holders_.capacity() * sizeof(NodeId);
  return stats;
}

std::vector<RadixTree::Handle> RadixTree::runs() const {
  // Sorts pairs, because comparing the nodes themselves would miss the cache at every step.
  std::vector<std::pair<std::uint32_t, NodeId>> order;
  order.reserve(num_nodes_);
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (node.is_live && node.num_blocks > 0) order.emplace_back(node.first_block, id);
  }
  std::sort(order.begin(), order.end());
  std::vector<Handle> handles;
  handles.reserve(order.size());
  for (const auto& [first_block, id] : order) handles.push_back({id, nodes_[id].generation});
  return handles;
}

std::optional<RadixTree::Run> RadixTree::describe(Handle handle) const {
  if (handle.node >= nodes_.size()) return std::nullopt;
  const Node& node = nodes_[handle.node];
  if (!node.is_live || node.num_blocks == 0 || node.generation != handle.generation) {
    return std::nullopt;
  }
  NodeId root = handle.node;
  while (nodes_[root].parent != kNoNode) root = nodes_[root].parent;
  const std::uint32_t* tokens = tokens_of(node);
  const std::int32_t* ids = ids_of(node);
  return Run{std::string(salts_.at(root)),
             node.first_block,
             {tokens, tokens + std::size_t{node.num_blocks} * block_size_},
             {ids, ids + std::size_t{node.num_blocks} * num_groups_},
             node.tick,
             node.num_pins};
}

RadixTree::Outline RadixTree::outline() const {
  Outline outline;
  outline.handles = runs();
  outline.clock = clock_;
  std::unordered_map<NodeId, std::uint32_t> numbers;  // numbers of the salts, by root
  for (const auto& [root, salt] : salts_) {
    // A detached run shares the number of its salt, if that still has a root.
    if (detached_.count(root) > 0 && root_of(salt) != kNoNode) continue;
    numbers.emplace(root, static_cast<std::uint32_t>(outline.salts.size()));
    outline.salts.emplace_back(salt);
  }
  for (const auto& [root, salt] : detached_) {
    if (root_of(salt) != kNoNode) numbers.emplace(root, numbers.at(root_of(salt)));
  }
  std::vector<std::int32_t> rows(nodes_.size(), -1);  // roots hold no blocks and have no row
  for (const Handle handle : outline.handles) {
    const Node& node = nodes_[handle.node];
    const std::int32_t above = rows[node.parent];
    rows[handle.node] = static_cast<std::int32_t>(outline.parents.size());
    outline.parents.push_back(above);
    outline.salt_numbers.push_back(above < 0 ? numbers.at(node.parent)
                                             : outline.salt_numbers[above]);
    outline.first_blocks.push_back(node.first_block);
    outline.num_blocks.push_back(node.num_blocks);
    outline.num_pins.push_back(node.num_pins);
    outline.ticks.push_back(node.tick);
  }
  return outline;
}

std::vector<std::string> RadixTree::check() const {
  std::vector<std::string> problems;
  const auto report = [&](const std::string& what) { problems.push_back(what); };
  const auto expect = [&](const char* what, std::size_t counted, std::size_t kept) {
    if (counted == kept) return;
    report(std::string(what) + ": counted " + std::to_string(counted) + ", kept " +
           std::to_string(kept));
  };

  std::vector<std::uint32_t> children(nodes_.size(), 0), children_xor(nodes_.size(), 0);
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    if (!node.is_live || node.parent >= nodes_.size()) continue;
    ++children[node.parent];
    children_xor[node.parent] ^= id;
  }
  std::vector<std::uint64_t> queued_tick(nodes_.size(), 0);
  for (const Queued& entry : queue_) {
    const bool is_valid = entry.node < nodes_.size() && nodes_[entry.node].is_queued;
    if (!is_valid) report("queue: node " + std::to_string(entry.node) + " is not marked queued");
    if (is_valid && queued_tick[entry.node] != 0) report("queue: a node is queued twice");
    if (is_valid) queued_tick[entry.node] = entry.tick;
  }
  if (!std::is_heap(queue_.begin(), queue_.end())) report("queue: not a heap");

  std::size_t num_live = 0, num_roots = 0, num_blocks = 0, num_pinned = 0, num_queued = 0;
  std::size_t capacity = 0, num_holders = 0;
  std::unordered_set<std::uint64_t> leaf_ticks;
  for (NodeId id = 0; id < nodes_.size(); ++id) {
    const Node& node = nodes_[id];
    const std::string name = "node " + std::to_string(id) + ": ";
    num_queued += node.is_queued;
    if (!node.is_live) {
      if (node.capacity != 0 || node.holder != kNoNode) report(name + "is free but not empty");
      continue;
    }
    const bool is_listed = node.holder < holders_.size() && holders_[node.holder] == id;
    num_holders += is_listed;
    if (holds_windowed(node) && !is_listed) report(name + "holds what strip() does not find");
    ++num_live;
    num_blocks += node.num_blocks;
    num_pinned += node.num_pins > 0;
    capacity += node.capacity;
    if (children[id] != node.num_children || children_xor[id] != node.children_xor) {
      report(name + "wrong number of children, or others");
    }
    if (node.parent == kNoNode) {
      ++num_roots;
      const auto salt = salts_.find(id);
      const bool is_detached = detached_.count(id) > 0;
      if (salt == salts_.end() || (root_of(salt->second) == id) == is_detached) {
        report(name + "root of no salt, or of one that it is detached from");
      }
      if (node.num_blocks != 0 || (node.first_block != 0 && !is_detached)) {
        report(name + "a root with blocks");
      }
      if (is_detached && node.num_children != 1) report(name + "detached without its run");
      continue;
    }
    if (node.num_blocks == 0 || node.num_blocks > node.capacity) report(name + "wrong size");
    if (node.num_pins > 0 && !node.is_handed_out) report(name + "pinned without a handle");
    if (node.tick == 0 || node.tick > clock_ || node.matched_tick > node.tick) {
      report(name + "touched in the future");
    }
    if (is_evictable(node) && num_unheld_at_end(node) > 0) report(name + "ends in nothing");
    const Node* parent = node.parent < nodes_.size() ? &nodes_[node.parent] : nullptr;
    if (parent == nullptr || !parent->is_live) {
      report(name + "has no live parent");
      continue;
    }
    if (node.first_block != parent->first_block + parent->num_blocks) report(name + "wrong depth");
    if (parent->num_blocks > 0 && parent->tick < node.tick) report(name + "newer than its parent");
    // Counts siblings with the same first block: a second one would be found in place of this one.
    std::size_t num_same = 0;
    const NodeId found = children_.find(hash_of(node.parent, tokens_of(node)), [&](NodeId other) {
      const std::uint32_t* tokens = tokens_of(node);
      num_same += nodes_[other].parent == node.parent &&
                  std::equal(tokens, tokens + block_size_, tokens_of(nodes_[other]));
      return other == id;
    });
    if (found != id || num_same != 1) report(name + "not found, or twice, below its parent");
    if (node.num_children == 0 && !leaf_ticks.insert(node.tick).second) {
      report(name + "another leaf has the same tick");
    }
    if (is_evictable(node) && (!node.is_queued || queued_tick[id] > node.tick)) {
      report(name + "an unpinned leaf is not queued, or with too late a tick");
    }
  }

  std::size_t num_free = 0;
  for (NodeId id = first_free_; id != kNoNode && num_free <= nodes_.size(); ++num_free) {
    if (nodes_[id].is_live) report("node " + std::to_string(id) + ": is live but on the free list");
    id = nodes_[id].parent;
  }
  expect("nodes", num_live, num_nodes_);
  expect("free nodes", num_free, nodes_.size() - num_live);
  expect("salts", num_roots, roots_.size() + detached_.size());
  expect("salts of roots", num_roots, salts_.size());
  expect("blocks", num_blocks, num_blocks_);
  expect("blocks inserted less evicted", num_blocks, inserted_blocks_ - evicted_blocks_);
  expect("pinned runs", num_pinned, num_pinned_);
  expect("queued nodes", num_queued, queue_.size());
  expect("holders", num_holders, holders_.size());
  expect("entries of the child table", num_live - num_roots, children_.size());
  expect("capacity", capacity, capacity_blocks_);
  return problems;
}

}  // namespace kvkernels
