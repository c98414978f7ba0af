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

// Counts everything again that the tree keeps count of, and reports what disagrees.
class RadixTree::Recount {
 public:
  explicit Recount(const RadixTree& tree)
      : tree_(tree),
        children_(tree.nodes_.size(), 0),
        children_xor_(tree.nodes_.size(), 0),
        kept_children_(tree.nodes_.size(), 0),
        queued_ticks_(tree.nodes_.size(), 0) {}

  std::vector<std::string> run() {
    count_children();
    check_queue();
    for (NodeId id = 0; id < tree_.nodes_.size(); ++id) check_node(id);
    check_free_nodes();
    check_totals();
    return std::move(problems_);
  }

 private:
  void report(const std::string& what) { problems_.push_back(what); }
  void report(NodeId id, const char* what) { report("node " + std::to_string(id) + ": " + what); }
  void expect(const char* what, std::size_t counted, std::size_t kept) {
    if (counted == kept) return;
    report(std::string(what) + ": counted " + std::to_string(counted) + ", kept " +
           std::to_string(kept));
  }

  void count_children() {
    for (NodeId id = 0; id < tree_.nodes_.size(); ++id) {
      const Node& node = tree_.nodes_[id];
      if (!node.is_live || node.parent >= tree_.nodes_.size()) continue;
      ++children_[node.parent];
      children_xor_[node.parent] ^= id;
    }
    count_kept();
  }

  // From every pinned node up, as long as nobody came that way before.
  void count_kept() {
    std::vector<bool> is_kept(tree_.nodes_.size(), false);
    for (NodeId id = 0; id < tree_.nodes_.size(); ++id) {
      if (!tree_.nodes_[id].is_live || tree_.nodes_[id].num_pins == 0) continue;
      for (NodeId one = id; !is_kept[one];) {
        is_kept[one] = true;
        num_kept_blocks_ += tree_.nodes_[one].num_blocks;
        const NodeId parent = tree_.nodes_[one].parent;
        if (parent >= tree_.nodes_.size()) break;
        ++kept_children_[parent];
        one = parent;
      }
    }
  }

  void check_queue() {
    for (const Queued& entry : tree_.queue_) {
      if (entry.node >= tree_.nodes_.size() || !tree_.nodes_[entry.node].is_queued) {
        report("queue: node " + std::to_string(entry.node) + " is not marked queued");
        continue;
      }
      if (queued_ticks_[entry.node] != 0) report("queue: a node is queued twice");
      queued_ticks_[entry.node] = entry.tick;
    }
    if (!std::is_heap(tree_.queue_.begin(), tree_.queue_.end())) report("queue: not a heap");
  }

  void check_node(NodeId id) {
    const Node& node = tree_.nodes_[id];
    num_queued_ += node.is_queued;
    if (!node.is_live) {
      if (node.capacity != 0 || node.holder != kNoNode) report(id, "is free but not empty");
      return;
    }
    const auto& holders = tree_.holders_;
    const bool is_listed = node.holder < holders.size() && holders[node.holder] == id;
    if (tree_.holds_windowed(node) && !is_listed) report(id, "holds what strip() does not find");
    num_holders_ += is_listed;
    ++num_live_;
    num_blocks_ += node.num_blocks;
    num_pinned_ += node.num_pins > 0;
    capacity_ += node.capacity;
    if (children_[id] != node.num_children || children_xor_[id] != node.children_xor) {
      report(id, "wrong number of children, or others");
    }
    if (kept_children_[id] != node.num_kept_children) report(id, "wrong number of kept children");
    if (node.parent == kNoNode) {
      check_root(id);
    } else {
      check_run(id);
      check_place(id);
    }
  }

  void check_root(NodeId id) {
    const Node& node = tree_.nodes_[id];
    ++num_roots_;
    const auto salt = tree_.salts_.find(id);
    const bool is_detached = tree_.detached_.count(id) > 0;
    if (salt == tree_.salts_.end() || (tree_.root_of(salt->second) == id) == is_detached) {
      report(id, "root of no salt, or of one that it is detached from");
    }
    if (node.num_blocks != 0 || (node.first_block != 0 && !is_detached)) {
      report(id, "a root with blocks");
    }
    if (is_detached && node.num_children != 1) report(id, "detached without its run");
  }

  void check_run(NodeId id) {
    const Node& node = tree_.nodes_[id];
    if (node.num_blocks == 0 || node.num_blocks > node.capacity) report(id, "wrong size");
    if (node.num_pins > 0 && !node.is_handed_out) report(id, "pinned without a handle");
    if (node.tick == 0 || node.tick > tree_.clock_ || node.matched_tick > node.tick) {
      report(id, "touched in the future");
    }
    if (tree_.is_evictable(node) && tree_.num_unheld_at_end(node) > 0) {
      report(id, "ends in nothing");
    }
  }

  // What a node is to its parent, its siblings and the other leaves.
  void check_place(NodeId id) {
    const Node& node = tree_.nodes_[id];
    if (node.parent >= tree_.nodes_.size() || !tree_.nodes_[node.parent].is_live) {
      report(id, "has no live parent");
      return;
    }
    const Node& parent = tree_.nodes_[node.parent];
    if (node.first_block != parent.first_block + parent.num_blocks) report(id, "wrong depth");
    if (parent.num_blocks > 0 && parent.tick < node.tick) report(id, "newer than its parent");
    if (!is_only_one_found(id)) report(id, "not found, or twice, below its parent");
    if (node.num_children == 0 && !leaf_ticks_.insert(node.tick).second) {
      report(id, "another leaf has the same tick");
    }
    if (tree_.is_evictable(node) && (!node.is_queued || queued_ticks_[id] > node.tick)) {
      report(id, "an unpinned leaf is not queued, or with too late a tick");
    }
  }

  // A second sibling with the same first block would be found in place of this one, or of itself.
  bool is_only_one_found(NodeId id) const {
    const Node& node = tree_.nodes_[id];
    const std::uint32_t* tokens = tree_.tokens_of(node);
    std::size_t num_same = 0;
    const NodeId found =
        tree_.children_.find(tree_.hash_of(node.parent, tokens), [&](NodeId other) {
          const Node& sibling = tree_.nodes_[other];
          num_same += sibling.parent == node.parent &&
                      std::equal(tokens, tokens + tree_.block_size_, tree_.tokens_of(sibling));
          return other == id;
        });
    return found == id && num_same == 1;
  }

  void check_free_nodes() {
    const std::size_t num_nodes = tree_.nodes_.size();
    for (NodeId id = tree_.first_free_; id != kNoNode && num_free_ <= num_nodes; ++num_free_) {
      if (tree_.nodes_[id].is_live) report(id, "is live but on the free list");
      id = tree_.nodes_[id].parent;
    }
  }

  void check_totals() {
    expect("nodes", num_live_, tree_.num_nodes_);
    expect("free nodes", num_free_, tree_.nodes_.size() - num_live_);
    expect("salts", num_roots_, tree_.roots_.size() + tree_.detached_.size());
    expect("salts of roots", num_roots_, tree_.salts_.size());
    expect("blocks", num_blocks_, tree_.num_blocks_);
    expect("kept blocks", num_kept_blocks_, tree_.num_kept_blocks_);
    expect("blocks inserted less evicted", num_blocks_,
           tree_.inserted_blocks_ - tree_.evicted_blocks_);
    expect("pinned runs", num_pinned_, tree_.num_pinned_);
    expect("queued nodes", num_queued_, tree_.queue_.size());
    expect("holders", num_holders_, tree_.holders_.size());
    expect("entries of the child table", num_live_ - num_roots_, tree_.children_.size());
    expect("capacity", capacity_, tree_.capacity_blocks_);
  }

  const RadixTree& tree_;
  std::vector<std::string> problems_;
  std::vector<std::uint32_t> children_, children_xor_, kept_children_;  // by NodeId
  std::vector<std::uint64_t> queued_ticks_;                             // by NodeId; 0: not queued
  std::unordered_set<std::uint64_t> leaf_ticks_;
  std::size_t num_live_ = 0, num_free_ = 0, num_roots_ = 0, num_blocks_ = 0, num_pinned_ = 0;
  std::size_t num_kept_blocks_ = 0, num_queued_ = 0, num_holders_ = 0, capacity_ = 0;
};

std::vector<std::string> RadixTree::check() const { return Recount(*this).run(); }

}  // namespace kvkernels
