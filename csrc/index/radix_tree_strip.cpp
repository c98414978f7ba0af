// Giving up ids of one windowed group: first those that no prompt needs, then those unused for
// longest.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kvkernels/radix_tree.h"

namespace kvkernels {
namespace {

constexpr std::uint64_t kPinned = std::uint64_t{1} << 63;  // more than any tick

}  // namespace

std::vector<std::int32_t> RadixTree::strip(std::uint32_t group, std::size_t num_blocks) {
  if (group >= window_blocks_.size() || window_blocks_[group] == kNoWindow) {
    throw std::invalid_argument("group: expected one with a window, got " + std::to_string(group));
  }
  std::vector<Strippable> heap = strippable(group);
  std::make_heap(heap.begin(), heap.end());
  std::vector<std::int32_t> victims;
  std::vector<NodeId> touched;
  victims.reserve(heap.size());
  touched.reserve(heap.size());
  reserve_queue(heap.size());

  std::uint64_t worth = 0;
  while (!heap.empty()) {
    const Strippable next = heap.front();
    // A window is given up as a whole, since a part of it is of no use. No two ends have the same
    // worth.
    if (victims.size() >= num_blocks && (next.worth == 0 || next.worth != worth)) break;
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    const Node& node = nodes_[next.node];
    std::int32_t& id =
        ids_of(node)[std::size_t{next.depth - node.first_block} * num_groups_ + group];
    victims.push_back(std::exchange(id, -1));
    worth = next.worth;
    if (touched.empty() || touched.back() != next.node) touched.push_back(next.node);
  }
  for (const NodeId id : touched) {
    if (!nodes_[id].is_live) continue;
    if (!holds_windowed(nodes_[id])) unlist_holder(id);
    settle(id);
  }
  stripped_blocks_ += victims.size();
  return victims;
}

// All blocks for which the group has an id.
std::vector<RadixTree::Strippable> RadixTree::strippable(std::uint32_t group) const {
  const std::uint32_t window = window_blocks_[group];
  std::vector<Strippable> found;
  std::vector<NeededBy> ends;
  for (const NodeId id : holders_) {
    const Node& node = nodes_[id];
    find_ends(id, window, ends);
    std::size_t num_ends = ends.size();
    // From the last block of the node backwards, further from every end with each step.
    for (std::uint32_t num_after = 0; num_after < node.num_blocks; ++num_after) {
      while (num_ends > 0 && ends[num_ends - 1].num_after + num_after >= window) --num_ends;
      const std::uint64_t worth = num_ends > 0 ? ends[num_ends - 1].worth : 0;
      const std::uint32_t row = node.num_blocks - 1 - num_after;
      if (holds(node, row, group)) {
        found.push_back({worth, node.tick, node.first_block + row, id});
      }
    }
  }
  return found;
}

// Finds the ends of runs at the node's end and fewer than `reach` blocks after it, nearest first,
// as far as the path has no branch.
void RadixTree::find_ends(NodeId id, std::uint32_t reach, std::vector<NeededBy>& ends) const {
  ends.clear();
  std::uint32_t num_after = 0;
  std::uint64_t worth = 0;
  while (num_after < reach) {
    const Node& node = nodes_[id];
    worth = std::max(worth, worth_of_end(node));
    ends.push_back({num_after, worth});
    if (node.num_children != 1) return;
    id = node.children_xor;
    num_after += nodes_[id].num_blocks;
  }
}

// How recently somebody went on from the node's end, as a tick: the next prompt may do so again. 0
// where one insert only continued another, as a growing sequence's do: nobody else is known to end
// there. A pinned end most likely is in use, so giving up its window frees nothing; but its
// sequence may have passed it since.
std::uint64_t RadixTree::worth_of_end(const Node& node) const {
  if (node.num_pins > 0) return kPinned | node.tick;
  if (node.num_children == 0) return node.tick;
  if (node.matched_tick > 0) return node.matched_tick;
  return node.num_children > 1 ? node.tick : 0;
}

bool RadixTree::holds_windowed(const Node& node) const {
  for (std::uint32_t group = 0; group < window_blocks_.size(); ++group) {
    if (window_blocks_[group] == kNoWindow) continue;
    for (std::uint32_t row = 0; row < node.num_blocks; ++row) {
      if (holds(node, row, group)) return true;
    }
  }
  return false;
}

void RadixTree::list_holder(NodeId id) {
  if (nodes_[id].holder != kNoNode) return;
  nodes_[id].holder = static_cast<std::uint32_t>(holders_.size());
  holders_.push_back(id);
}

void RadixTree::unlist_holder(NodeId id) {
  Node& node = nodes_[id];
  if (node.holder == kNoNode) return;
  const NodeId last = holders_.back();
  holders_[node.holder] = last;
  nodes_[last].holder = node.holder;
  holders_.pop_back();
  node.holder = kNoNode;
}

}  // namespace kvkernels
