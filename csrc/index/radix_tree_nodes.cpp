// Roots, nodes and their memory.
#include <algorithm>
#include <stdexcept>

#include "kvkernels/radix_tree.h"

namespace kvkernels {

RadixTree::NodeId RadixTree::root_of(std::string_view salt) const {
  const auto found = roots_.find(salt);
  return found == roots_.end() ? kNoNode : found->second;
}

RadixTree::NodeId RadixTree::add_root(std::string_view salt) {
  const auto entry = roots_.emplace(salt, kNoNode).first;
  try {
    entry->second = new_node();
    salts_.emplace(entry->second, entry->first);
  } catch (...) {
    if (entry->second != kNoNode) free_node(entry->second);
    roots_.erase(entry);
    throw;
  }
  return entry->second;
}

RadixTree::NodeId RadixTree::add_detached_root(std::string_view salt, std::uint32_t first_block) {
  const NodeId id = new_node();
  try {
    const auto entry = detached_.emplace(id, salt).first;
    salts_.emplace(id, entry->second);
  } catch (...) {
    detached_.erase(id);
    free_node(id);
    throw;
  }
  nodes_[id].first_block = first_block;
  return id;
}

RadixTree::NodeId RadixTree::new_node() {
  NodeId id = first_free_;
  if (id == kNoNode) {
    if (nodes_.size() >= kNoNode) throw std::length_error("RadixTree: too many nodes");
    id = static_cast<NodeId>(nodes_.size());
    // Reserved now, so that listing a node cannot fail later, when the tree has been changed.
    if (has_windows() && holders_.capacity() <= id) holders_.reserve(16 + 2 * id);
    nodes_.emplace_back();
  } else {
    first_free_ = nodes_[id].parent;
  }
  nodes_[id].is_live = true;
  nodes_[id].parent = kNoNode;
  ++num_nodes_;
  return id;
}

void RadixTree::add_to_parent(NodeId id) {
  Node& parent = nodes_[nodes_[id].parent];
  ++parent.num_children;
  parent.children_xor ^= id;
}

void RadixTree::take_from_parent(NodeId id) {
  Node& parent = nodes_[nodes_[id].parent];
  --parent.num_children;
  parent.children_xor ^= id;
}

void RadixTree::free_node(NodeId id) noexcept {
  Node& node = nodes_[id];
  set_words(node, nullptr, 0);
  unlist_holder(id);
  const std::uint32_t next_generation = node.generation + 1;
  const bool is_queued = node.is_queued;
  node = Node{};
  node.generation = next_generation;
  node.is_queued =
      is_queued;  // its entry stays in the queue; its tick is early enough for the next node here
  node.parent = first_free_;
  first_free_ = id;
  --num_nodes_;
}

// A new array with room for `capacity` blocks that begins with `num_blocks` blocks of the node from
// `first` on.
RadixTree::Words RadixTree::copy_words(const Node& node, std::size_t first, std::size_t num_blocks,
                                       std::size_t capacity) const {
  Words words = std::make_unique_for_overwrite<std::uint32_t[]>(capacity * words_per_block());
  std::copy_n(tokens_of(node) + first * block_size_, num_blocks * block_size_, words.get());
  std::copy_n(ids_of(node) + first * num_groups_, num_blocks * num_groups_,
              reinterpret_cast<std::int32_t*>(words.get() + words_before_ids(capacity)));
  return words;
}

void RadixTree::set_words(Node& node, Words words, std::size_t capacity) {
  capacity_blocks_ += capacity - node.capacity;
  node.words = std::move(words);
  node.capacity = static_cast<std::uint32_t>(capacity);
}

}  // namespace kvkernels
