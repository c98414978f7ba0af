// Pins, and which blocks go: the queue of leaves, how a leaf loses its tail, and what is detached.
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
  if (node.num_pins++ == 0) ++num_pinned_;
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
  if (is_evictable(node)) enqueue(handle.node);
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
    if (!is_evictable(node)) continue;  // queued again when its last child or pin goes
    if (front.tick != node.tick) {      // touched since it was queued
      enqueue(front.node);
      continue;
    }
    // All blocks of the node have its tick, which is the least: so its whole tail is next in line.
    const std::size_t count = std::min<std::size_t>(wanted, node.num_blocks);
    cut_tail(front.node, count, victims);
    wanted -= count;
    if (node.num_blocks > 0) {
      enqueue(front.node);
    } else {
      remove_leaf(front.node);
    }
  }
  return victims;
}

void RadixTree::cut_tail(NodeId id, std::size_t num_blocks, std::vector<std::int32_t>& victims) {
  Node& node = nodes_[id];
  if (num_blocks == node.num_blocks) {  // unlinked while its tokens are there to be hashed
    children_.erase(hash_of(node.parent, tokens_of(node)), id);
  }
  for (std::size_t i = 0; i < num_blocks; ++i) {
    const std::int32_t* ids = ids_of(node) + std::size_t{--node.num_blocks} * num_groups_;
    victims.insert(victims.end(), ids, ids + num_groups_);
  }
  ++node.generation;
  node.is_handed_out = false;
  num_blocks_ -= num_blocks;
  evicted_blocks_ += num_blocks;
  if (node.num_blocks == 0 || node.num_blocks > node.capacity / 2) return;
  try {
    set_words(node, copy_words(node, 0, node.num_blocks, node.num_blocks), node.num_blocks);
  } catch (const std::bad_alloc&) {
    // The array stays larger than it need be; the victims must not be lost for that.
  }
}

// Unlinks a leaf that has lost its last block; its parent may become the next leaf.
void RadixTree::remove_leaf(NodeId id) {
  const NodeId parent_id = nodes_[id].parent;
  free_node(id);
  Node& parent = nodes_[parent_id];
  --parent.num_children;
  if (is_evictable(parent)) {
    enqueue(parent_id);
  } else if (parent.num_blocks == 0 && parent.num_children == 0) {
    remove_root(parent_id);
  }
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
  const End end = follow(root, tokens.data(), num_kept);  // splits, so that a node begins there
  if (end.num_blocks < num_kept) return {};
  const NodeId id = find_child(end.node, tokens.data() + num_kept * block_size_);
  if (id == kNoNode) return {};
  std::vector<std::int32_t> ids(ids_of(nodes_[id]), ids_of(nodes_[id]) + num_groups_);
  children_.reserve_one();
  reserve_queue();
  const NodeId detached = add_detached_root(salt, nodes_[id].first_block);

  children_.erase(hash_of(end.node, tokens_of(nodes_[id])), id);
  nodes_[id].parent = detached;
  children_.insert(hash_of(detached, tokens_of(nodes_[id])), id);
  nodes_[detached].num_children = 1;
  Node& parent = nodes_[end.node];
  --parent.num_children;
  if (is_evictable(parent)) {
    enqueue(end.node);
  } else if (parent.num_blocks == 0 && parent.num_children == 0) {
    remove_root(end.node);
  }
  return ids;
}

void RadixTree::reserve_queue() {
  if (queue_.size() == queue_.capacity()) queue_.reserve(16 + queue_.size() + queue_.size() / 4);
}

// Queues an evictable leaf, once; there is room for one more entry.
void RadixTree::enqueue(NodeId id) {
  Node& node = nodes_[id];
  if (node.is_queued) return;
  queue_.push_back({node.tick, id});
  std::push_heap(queue_.begin(), queue_.end());
  node.is_queued = true;
}

}  // namespace kvkernels
