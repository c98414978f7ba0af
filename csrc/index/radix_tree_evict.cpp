// Pins, eviction (the queue of leaves, how a leaf loses its tail), and detaching.
#include <algorithm>
#include <new>
#include <stdexcept>

#include "kvkernels/radix_tree.h"

namespace kvkernels {

const RadixTree::Node& RadixTree::resolve(Handle handle) const {
  if (handle.node < nodes_.size()) {
    const Node& node = nodes_[handle.node];
    if (node.is_live && node.num_blocks > 0 && node.generation == handle.generation) return node;
  }
  throw std::invalid_argument(
      "match: expected a run that is still cached, got one evicted since it was matched");
}

void RadixTree::pin(Handle handle) {
  if (handle.node == kNoNode) return;
  Node& node = resolve(handle);
  if (node.num_pins > 0) {
    ++node.num_pins;
    return;
  }
  const bool was_kept = is_kept(node);
  node.num_pins = 1;
  ++num_pinned_;
  if (!was_kept) keep_path(handle.node);
}

void RadixTree::unpin(Handle handle) {
  if (handle.node == kNoNode) return;
  Node& node = resolve(handle);
  if (node.num_pins == 0) {
    throw std::invalid_argument("match: expected a pinned run, got one that is not pinned");
  }
  if (node.num_pins == 1) {
    reserve_queue();
    --num_pinned_;
  }
  --node.num_pins;
  if (!is_kept(node)) let_path_go(handle.node);
  settle(handle.node);
}

// A node that was not kept is kept from now on, and so are those before it on its path.
void RadixTree::keep_path(NodeId id) {
  while (true) {
    num_kept_blocks_ += nodes_[id].num_blocks;
    const NodeId parent = nodes_[id].parent;
    if (parent == kNoNode) return;
    const bool was_kept = is_kept(nodes_[parent]);
    ++nodes_[parent].num_kept_children;
    if (was_kept) return;
    id = parent;
  }
}

// A node that was kept is not kept any more, nor are those before it that were for its sake alone.
void RadixTree::let_path_go(NodeId id) {
  while (true) {
    num_kept_blocks_ -= nodes_[id].num_blocks;
    const NodeId parent = nodes_[id].parent;
    if (parent == kNoNode) return;
    --nodes_[parent].num_kept_children;
    if (is_kept(nodes_[parent])) return;
    id = parent;
  }
}

std::vector<std::int32_t> RadixTree::evict(std::size_t num_blocks) {
  std::vector<std::int32_t> victims;
  std::size_t wanted = std::min(num_blocks, num_blocks_);
  victims.reserve(wanted * num_groups_);
  while (wanted > 0 && !queue_.empty()) {
    const Queued front = queue_.front();
    std::pop_heap(queue_.begin(), queue_.end());
    queue_.pop_back();
    Node& node = nodes_[front.node];
    node.is_queued = false;
    if (!is_evictable(node)) continue;  // freed, or to be queued when its last child or pin goes
    if (front.tick != node.tick) {      // touched since it was queued
      enqueue(front.node);
      continue;
    }
    // All blocks of the node have its tick, the lowest of all leaves: so its tail is next, block by
    // block.
    std::size_t num_cut = 0;
    for (; num_cut < node.num_blocks && wanted > 0; ++num_cut) {
      const auto row = static_cast<std::uint32_t>(node.num_blocks - 1 - num_cut);
      if (has_windows() && !is_held(node, row))
        continue;  // no id to return; settle() drops such tails too
      const std::int32_t* ids = ids_of(node) + std::size_t{row} * num_groups_;
      victims.insert(victims.end(), ids, ids + num_groups_);
      --wanted;
    }
    cut_tail(front.node, num_cut);
    settle(front.node);
  }
  return victims;
}

void RadixTree::cut_tail(NodeId id, std::size_t num_blocks) {
  Node& node = nodes_[id];
  if (num_blocks == node.num_blocks) {  // unlinked now, while its tokens can be hashed
    children_.erase(hash_of(node.parent, tokens_of(node)), id);
  }
  node.num_blocks -= static_cast<std::uint32_t>(num_blocks);
  ++node.generation;
  node.is_handed_out = false;
  node.matched_tick = 0;
  num_blocks_ -= num_blocks;
  evicted_blocks_ += num_blocks;
  if (node.num_blocks == 0 || node.num_blocks > node.capacity / 2) return;
  try {
    set_words(node, copy_words(node, 0, node.num_blocks, node.num_blocks), node.num_blocks);
  } catch (const std::bad_alloc&) {
    // Keeps the larger array: that must not cost the caller the victims.
  }
}

// To be called when a node may have become an evictable leaf. Drops blocks at its end that no group
// holds an id for, removes the node if none is left, then its parents likewise, and queues the node
// where that ends. The queue must have room for one more entry.
void RadixTree::settle(NodeId id) {
  while (nodes_[id].parent != kNoNode) {
    Node& node = nodes_[id];
    if (is_evictable(node)) {
      const std::uint32_t num_unheld = num_unheld_at_end(node);
      if (num_unheld > 0) cut_tail(id, num_unheld);
    }
    if (node.num_blocks > 0) {
      if (is_evictable(node)) enqueue(id);
      return;
    }
    const NodeId parent = node.parent;
    take_from_parent(id);
    free_node(id);
    id = parent;
  }
  if (nodes_[id].num_children == 0) remove_root(id);
}

// Blocks at the end of a node for which no group holds an id: only windowed groups leave those, and
// nothing can be restored from them.
std::uint32_t RadixTree::num_unheld_at_end(const Node& node) const {
  if (!has_windows()) return 0;
  std::uint32_t num_rest = node.num_blocks;
  while (num_rest > 0 && !is_held(node, num_rest - 1)) --num_rest;
  return node.num_blocks - num_rest;
}

bool RadixTree::is_held(const Node& node, std::uint32_t row) const {
  const std::int32_t* ids = ids_of(node) + std::size_t{row} * num_groups_;
  return std::any_of(ids, ids + num_groups_, [](std::int32_t id) { return id >= 0; });
}

void RadixTree::remove_root(NodeId id) {
  const auto salt = salts_.find(id);
  const auto detached = detached_.find(id);
  if (detached == detached_.end()) {
    roots_.erase(roots_.find(salt->second));
  } else {
    detached_.erase(detached);
  }
  salts_.erase(salt);
  free_node(id);
}

std::vector<std::int32_t> RadixTree::detach(Tokens tokens, std::size_t num_kept,
                                            std::string_view salt) {
  const NodeId root = root_of(salt);
  if (root == kNoNode || (num_kept + 1) * block_size_ > tokens.size()) return {};
  const End end = follow(root, tokens.data(),
                         num_kept);  // splits there, so that the block to detach begins a node
  if (end.num_blocks < num_kept) return {};
  const NodeId id = find_child(end.node, tokens.data() + num_kept * block_size_);
  if (id == kNoNode) return {};
  std::vector<std::int32_t> ids(ids_of(nodes_[id]), ids_of(nodes_[id]) + num_groups_);
  children_.reserve_one();
  reserve_queue();
  const NodeId detached = add_detached_root(salt, nodes_[id].first_block);

  children_.erase(hash_of(end.node, tokens_of(nodes_[id])), id);
  const bool is_pinned_below = is_kept(nodes_[id]);
  if (is_pinned_below) let_path_go(id);
  take_from_parent(id);
  nodes_[id].parent = detached;
  add_to_parent(id);
  if (is_pinned_below) keep_path(id);
  children_.insert(hash_of(detached, tokens_of(nodes_[id])), id);
  settle(end.node);
  return ids;
}

void RadixTree::reserve_queue(std::size_t num_nodes) {
  const std::size_t needed = queue_.size() + num_nodes;
  if (needed > queue_.capacity()) queue_.reserve(16 + needed + needed / 4);
}

// Queues an evictable leaf unless it is queued. The queue must have room for one more entry.
void RadixTree::enqueue(NodeId id) {
  Node& node = nodes_[id];
  if (node.is_queued) return;
  queue_.push_back({node.tick, id});
  std::push_heap(queue_.begin(), queue_.end());
  node.is_queued = true;
}

}  // namespace kvkernels
