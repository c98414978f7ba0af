// Open addressing with linear probing, at most three quarters full.
#include "kvkernels/child_table.h"

#include <utility>

namespace kvkernels {

void ChildTable::reserve_one() {
  if ((size_ + 1) * 4 <= slots_.size() * 3) return;
  std::vector<Slot> old(16 + slots_.size() + slots_.size() / 4);
  std::swap(old, slots_);
  size_ = 0;
  for (const Slot& slot : old) {
    if (slot.node != kNoNode) insert(slot.hash, slot.node);
  }
}

void ChildTable::insert(std::uint32_t hash, std::uint32_t node) noexcept {
  std::size_t i = home(hash);
  while (slots_[i].node != kNoNode) i = after(i);
  slots_[i] = {hash, node};
  ++size_;
}

std::size_t ChildTable::slot_of(std::uint32_t hash, std::uint32_t node) const noexcept {
  std::size_t i = home(hash);
  while (slots_[i].node != node) i = after(i);
  return i;
}

void ChildTable::rename(std::uint32_t hash, std::uint32_t old_node,
                        std::uint32_t new_node) noexcept {
  slots_[slot_of(hash, old_node)].node = new_node;
}

void ChildTable::erase(std::uint32_t hash, std::uint32_t node) noexcept {
  std::size_t hole = slot_of(hash, node);
  for (std::size_t i = after(hole); slots_[i].node != kNoNode; i = after(i)) {
    // An entry may move back to the hole unless its home lies after the hole.
    if (steps(home(slots_[i].hash), i) < steps(hole, i)) continue;
    slots_[hole] = slots_[i];
    hole = i;
  }
  slots_[hole] = {};
  --size_;
}

}  // namespace kvkernels
