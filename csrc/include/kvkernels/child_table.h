// One hash table for all parent-to-child edges of a radix tree: open addressing, 8 bytes a slot.
//
//   slot      0           1           2           3
//          [h=..4, n=7] [h=..4, n=9] [   free   ] [h=..3, n=2]
//
// An entry lies at its home slot, `hash * size / 2^32`, or, where that is taken, in the next free
// slot after it; no free slot lies between the two. Removing an entry moves later ones back, so
// there are no tombstones and the table does not fill up with them. This home works for any size,
// so the table grows by a quarter instead of doubling, and growing goes through memory in order.
// The table knows hashes and node numbers only: the caller compares tokens.
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
    for (std::size_t i = home(hash);; i = after(i)) {
      const Slot& slot = slots_[i];
      if (slot.node == kNoNode) return kNoNode;
      if (slot.hash == hash && is_wanted(slot.node)) return slot.node;
    }
  }

  // Makes room for one more entry, so that the next insert cannot fail.
  void reserve_one();

  // Adds an entry. reserve_one() must have been called since the last insert.
  void insert(std::uint32_t hash, std::uint32_t node) noexcept;

  // Changes the entry of `old_node`, which must exist, to name `new_node`.
  void rename(std::uint32_t hash, std::uint32_t old_node, std::uint32_t new_node) noexcept;

  // Removes the entry of `node`, which must exist.
  void erase(std::uint32_t hash, std::uint32_t node) noexcept;

  std::size_t size() const { return size_; }
  std::size_t size_bytes() const { return slots_.capacity() * sizeof(Slot); }

 private:
  struct Slot {
    std::uint32_t hash = 0;
    std::uint32_t node = kNoNode;  // kNoNode: free
  };

  std::size_t home(std::uint32_t hash) const {
    return static_cast<std::size_t>((std::uint64_t{hash} * slots_.size()) >> 32);
  }
  std::size_t after(std::size_t i) const { return i + 1 == slots_.size() ? 0 : i + 1; }
  std::size_t steps(std::size_t from, std::size_t to) const {
    return to >= from ? to - from : to + slots_.size() - from;
  }
  std::size_t slot_of(std::uint32_t hash, std::uint32_t node) const noexcept;

  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

}  // namespace kvkernels
