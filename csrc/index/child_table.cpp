// Open addressing with linear probing, at most three quarters full.
#include "kvkernels/child_table.h"

#include <utility>

namespace kvkernels {

void ChildTable::reserve_one() {
  if ((size_ + 1) * 4 <= slots_.size() * 3) return;
  std::vector<Slot> old(slots_.empty() ? 16 : slots_.size() * 2);
  std::swap(old, slots_);
  size_ = 0;
  for (const Slot& slot : old) {
    if (slot.node != kNoNode) insert(slot.hash, slot.node);
  }
}

void ChildTable::insert(std::uint32_t hash, std::uint32_t node) noexcept {
  std::size_t i = hash & mask();
  while (slots_[i].node != kNoNode) i = (i + 1) & mask();
  slots_[i] = {hash, node};
  ++size_;
}

std::size_t ChildTable::slot_of(std::uint32_t hash, std::uint32_t node) const noexcept {
  std::size_t i = hash & mask();
  while (slots_[i].node != node) i = (i + 1) & mask();
  return i;
}

void ChildTable::rename(std::uint32_t hash, std::uint32_t old_node,
                        std::uint32_t new_node) noexcept {
  slots_[slot_of(hash, old_node)].node = new_node;
}

void ChildTable::erase(std::uint32_t hash, std::uint32_t node) noexcept {
  std::size_t hole = slot_of(hash, node);
  for (std::size_t i = (hole + 1) & mask(); slots_[i].node != kNoNode; i = (i + 1) & mask()) {
    // An entry may move back to the hole unless its home lies after the hole.
    const std::size_t from_home = (i - slots_[i].hash) & mask();
    const std::size_t from_hole = (i - hole) & mask();
    if (from_home < from_hole) continue;
    slots_[hole] = slots_[i];
    hole = i;
  }
  slots_[hole] = {};
  --size_;
}

}  // namespace kvkernels
