// One hash table for all parent-to-child edges of a radix tree: open addressing, eight bytes a
// slot.
//
//   slot      0           1           2           3
//          [h=..4, n=7] [h=..4, n=9] [   free   ] [h=..3, n=2]
//
// An entry lies at `hash mod size` or, where that is taken, in the next free slot after it; no free
// slot lies between the two. Removal moves later entries back, so there are no tombstones and the
// table does not wear out. The table knows hashes and node numbers only: the caller compares.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvkernels {

inline constexpr std::uint32_t kNoNode = 0xffffffffu;

class ChildTable {
 public:
  // The node with this hash for which `is_wanted(node)` holds, or kNoNode.
  template <class Predicate>
  std::uint32_t find(std::uint32_t hash, Predicate is_wanted) const {
    if (slots_.empty()) return kNoNode;
    for (std::size_t i = hash & mask();; i = (i + 1) & mask()) {
      const Slot& slot = slots_[i];
      if (slot.node == kNoNode) return kNoNode;
      if (slot.hash == hash && is_wanted(slot.node)) return slot.node;
    }
  }

  // Makes room for one more entry, so that the next insert cannot fail.
  void reserve_one();

  // Adds an entry; reserve_one() was called since the last insert.
  void insert(std::uint32_t hash, std::uint32_t node) noexcept;

  // Lets the entry of `old_node` name `new_node`; the entry exists.
  void rename(std::uint32_t hash, std::uint32_t old_node, std::uint32_t new_node) noexcept;

  // Removes the entry of `node`; it exists.
  void erase(std::uint32_t hash, std::uint32_t node) noexcept;

  std::size_t size() const { return size_; }
  std::size_t size_bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t node = kNoNode;  // kNoNode: free
  };

  std::size_t mask() const { return slots_.size() - 1; }  // the size is a power of two
  std::size_t slot_of(std::uint32_t hash, std::uint32_t node) const noexcept;

  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

}  // namespace kvkernels
