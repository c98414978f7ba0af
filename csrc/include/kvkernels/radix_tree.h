// The prefix index: a radix tree over token ids whose edges are runs of whole blocks.
//
// Block size 2. One prompt of three blocks was inserted at tick 1:
//
//   root -- [a b|c d|e f]         node 7: block ids 4 5 6, tick 1, pinned once
//
// match(a b c d x y) at tick 2 hits two blocks of the three, so the run is split after them. The
// lower part stays node 7 and keeps its handle, its pins and its children:
//
//   root -- [a b|c d] -- [e f]    node 8: block ids 4 5, tick 2; node 7: block id 6, tick 1, pinned
//
// insert(a b c d x y) at tick 3 then adds a second child, and evict(1) takes block 9, not block 6:
//
//   root -- [a b|c d] -+- [e f]   node 7: block id 6, tick 1, pinned
//                      +- [x y]   node 9: block id 9, tick 3
//
// detach(a b c d, 1) then takes block 5, and all blocks after it, out of reach: they move below a
// root of their own that no salt leads to. They keep handles and pins, and are evicted when their
// turn comes:
//
//   root -- [a b]                 node 10: block id 4
//   (no salt) -- [c d] -+- [e f]  node 8: block id 5; node 7: block id 6, pinned
//                       +- ...
//
// With two groups of layers, the second of which has a window of one block, strip(1, n) gives up
// ids of that group alone. Below, each block with its two ids. A prompt that ends behind a block
// needs the ids of the window before that place, and no others of the group; so ids that no end
// needs go first:
//
//   root -- [a b|c d|e f]         ids 4/14 5/15 6/16; all that was inserted ends after block 6
//   strip(1, 1)                   ids 4/-1 5/15 6/16; block 6 is as old, but its end needs it
//
// Invariants, all recounted by check():
//  1. A node other than a root holds one block or more; a root (one per salt, and one for each
//     detached run) holds none. The first blocks of siblings differ, so each sequence of blocks has
//     one place. Only a detached root may have blocks before it on its path.
//  2. All blocks of a node were last touched at the same tick: a match or insert touches its whole
//     path at one tick and splits where the path ends inside a node. Hence recency is exact for
//     each block, and ticks never rise from a parent to its child.
//  3. Two leaves never have the same tick, since one tick touches one path. So "the least recently
//     touched block with no cached block after it" is one block: ties cannot arise.
//  4. Pins stand on the last node of the pinned run. All before it is kept by invariant 5. Kept is
//     a node that is pinned or has a child that is kept; each counts such children, so that pin()
//     and unpin() go up only as far as that changes, and num_evictable() is a subtraction.
//  5. Only the tail of an unpinned leaf is ever evicted.
//  6. Every unpinned leaf has one entry in the eviction heap, keyed by a tick no later than its
//     own. Touching a node leaves the entry alone; evict() puts stale entries right when they
//     surface, so a match costs no heap work and an eviction O(log n), amortised.
//  7. A handle names a node and its generation; the generation changes when the last block of the
//     node is evicted. A node whose handle was given out never grows at its end. So a handle stands
//     for the same blocks as long as it is valid.
//  8. With windowed groups an unpinned leaf ends in a block that some group holds.
//  9. Every node that holds an id of a windowed group is in holders_, once: as many as that group's
//     pool has blocks at most, and strip() looks at no others.
//
// No operation walks the tree, but check(), runs() and outline(). One caller at a time: the binding
// locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvkernels/child_table.h"

namespace kvkernels {

class RadixTree {
 public:
  using NodeId = std::uint32_t;
  using Tokens = std::span<const std::uint32_t>;

  struct Handle {
    NodeId node = kNoNode;  // kNoNode: the empty run, which may be pinned to no effect
    std::uint32_t generation = 0;
  };

  struct Match {
    std::size_t num_blocks = 0;
    Handle handle;
    std::vector<std::int32_t> block_ids;  // [num_blocks, num_groups], -1: not resident
  };

  struct Run {  // one node, for walks
    std::string salt;
    std::size_t first_block = 0;  // number of blocks before it on its path
    std::vector<std::uint32_t> tokens;
    std::vector<std::int32_t> block_ids;
    std::uint64_t tick = 0;
    std::uint32_t num_pins = 0;
  };

  // All nodes as they stand in the tree, without their tokens: enough to draw a large tree. Row i
  // of each array is one node; parents come before their children.
  struct Outline {
    std::vector<Handle> handles;
    std::vector<std::int32_t> parents;  // row of the parent; -1: a root, of a salt or detached
    std::vector<std::uint32_t> salt_numbers, first_blocks, num_blocks, num_pins;
    std::vector<std::uint64_t> ticks;
    std::vector<std::string> salts;  // by number
    std::uint64_t clock = 0;         // the latest tick
  };

  static constexpr std::uint32_t kNoWindow = 0xffffffffu;

  struct Stats {
    std::size_t num_blocks = 0, num_runs = 0, num_salts = 0, num_pinned_runs = 0;
    std::uint64_t num_matches = 0, lookup_blocks = 0, hit_blocks = 0;
    std::uint64_t inserted_blocks = 0, evicted_blocks = 0, stripped_blocks = 0;
    std::size_t token_bytes = 0, overhead_bytes = 0;  // token ids; all else
  };

  // `window_blocks`: for each group, how many blocks before a position the next token there can
  // see; kNoWindow: all. Empty: kNoWindow for every group. `hash_mask` is for tests: with few bits
  // nearly all hashes collide, which costs time and nothing else.
  //
  // Throws std::invalid_argument unless block_size and num_groups are in 1..65535 and window_blocks
  // is empty or has one entry per group.
  RadixTree(std::uint32_t block_size, std::uint32_t num_groups,
            std::vector<std::uint32_t> window_blocks = {}, std::uint32_t hash_mask = 0xffffffffu);

  // Finds the longest cached run of whole blocks at the front of `tokens`, and makes its blocks the
  // most recently touched ones.
  Match match(Tokens tokens, std::string_view salt);

  // As match, for a caller that goes on with a run it has matched before: counts neither as a
  // look-up in the statistics nor as a place where a prompt ended (see strip).
  Match peek(Tokens tokens, std::string_view salt);

  // Caches the first blocks of `tokens`, one for each row of `block_ids` [num_blocks, num_groups].
  // Returns, in the same shape, the ids that were not taken since the block had an id already (the
  // caller keeps those), and -1 for those taken. Throws std::invalid_argument if there are fewer
  // tokens than the rows need.
  std::vector<std::int32_t> insert(Tokens tokens, std::span<const std::int32_t> block_ids,
                                   std::string_view salt);

  // A pinned run, and all blocks before it, is not evicted until it has been unpinned as often.
  // Both throw std::invalid_argument for a stale handle, unpin also for a run that is not pinned.
  void pin(Handle handle);
  void unpin(Handle handle);

  // Removes up to `num_blocks` blocks, least recently touched first; returns their ids [n,
  // num_groups] in order of eviction. Fewer where the rest are pinned.
  std::vector<std::int32_t> evict(std::size_t num_blocks);

  // Blocks that evict() would remove if it was asked for all: those of the nodes that no pin keeps.
  std::size_t num_evictable() const { return num_blocks_ - num_kept_blocks_; }

  // Gives up `num_blocks` ids of one group that has a window, and returns them; the other groups
  // keep theirs. First go ids that no end of a run needs; then the windows of the ends that were
  // used least recently, each as a whole, so that there may be a few ids more; the windows of
  // pinned ends last. Throws std::invalid_argument if the group has no window.
  std::vector<std::int32_t> strip(std::uint32_t group, std::size_t num_blocks);

  // Takes the block after the first `num_kept` blocks of `tokens`, and all that is cached after it,
  // out of reach: no match finds them and no insert adds to them. Returns the block's ids
  // [num_groups]; nothing if it is not cached.
  std::vector<std::int32_t> detach(Tokens tokens, std::size_t num_kept, std::string_view salt);

  std::vector<Handle> runs() const;                  // all nodes but roots, parents first
  std::optional<Run> describe(Handle handle) const;  // nothing for a stale handle
  Outline outline() const;

  std::uint32_t block_size() const { return block_size_; }
  std::uint32_t num_groups() const { return num_groups_; }
  std::size_t num_blocks() const { return num_blocks_; }
  Stats stats() const;
  std::vector<std::string> check() const;  // one line for each invariant that is broken

 private:
  // One array: the tokens of `capacity` blocks, then the block ids of as many.
  using Words = std::unique_ptr<std::uint32_t[]>;

  // 64 bytes, which is why flags share a word with a count: a path touches every node on it.
  struct Node {
    Words words;
    std::uint64_t tick = 0;
    std::uint64_t matched_tick = 0;  // tick of the last match that ended at this node's end
    NodeId parent = kNoNode;         // in a free node: the next free one
    NodeId children_xor = 0;  // exclusive or of the children's numbers: with one child, its number
    std::uint32_t holder = kNoNode;  // index in holders_, see invariant 9
    std::uint32_t first_block = 0;
    std::uint32_t num_blocks = 0;
    std::uint32_t capacity = 0;
    std::uint32_t num_children = 0;
    std::uint32_t num_pins = 0;
    std::uint32_t generation = 0;
    std::uint32_t num_kept_children : 29 = 0;  // see invariant 4
    bool is_live : 1 = false;
    bool is_queued : 1 = false;      // has an entry in queue_, maybe of a node freed since
    bool is_handed_out : 1 = false;  // a handle of this generation exists
  };
  static_assert(sizeof(Node) <= 64);

  struct Queued {
    std::uint64_t tick;
    NodeId node;
    friend bool operator<(const Queued& a, const Queued& b) { return a.tick > b.tick; }  // min-heap
  };

  struct End {
    NodeId node;
    std::size_t num_blocks;
  };

  // A block whose id of the group strip() may take.
  struct Strippable {
    std::uint64_t worth;  // highest worth_of_end of the ends that need it; 0: no end needs it
    std::uint64_t tick;   // of its node
    std::uint32_t depth;  // blocks before it on its path
    NodeId node;
    friend bool operator<(const Strippable& a, const Strippable& b) {  // min-heap
      return std::tie(a.worth, a.tick, a.depth) > std::tie(b.worth, b.tick, b.depth);
    }
  };

  struct NeededBy {
    std::uint32_t num_after;  // blocks between the end of a node and this end of a run
    std::uint64_t worth;      // the highest of this end and those before it
  };

  class Recount;  // what check() does

  std::uint32_t* tokens_of(const Node& node) const { return node.words.get(); }
  std::int32_t* ids_of(const Node& node) const {
    return reinterpret_cast<std::int32_t*>(node.words.get() + words_before_ids(node.capacity));
  }
  std::size_t words_before_ids(std::size_t capacity) const { return capacity * block_size_; }
  std::size_t words_per_block() const { return std::size_t{block_size_} + num_groups_; }
  bool is_kept(const Node& node) const { return node.num_pins > 0 || node.num_kept_children > 0; }
  bool is_evictable(const Node& node) const {
    return node.num_children == 0 && node.num_pins == 0 && node.num_blocks > 0;
  }

  std::uint32_t hash_of(NodeId parent, const std::uint32_t* block) const;
  NodeId find_child(NodeId parent, const std::uint32_t* block) const;
  std::size_t count_equal_blocks(const Node& node, const std::uint32_t* tokens,
                                 std::size_t num_blocks) const;
  End follow(NodeId root, const std::uint32_t* tokens, std::size_t num_blocks);
  NodeId split(NodeId id, std::uint32_t num_upper);

  NodeId root_of(std::string_view salt) const;
  NodeId add_root(std::string_view salt);
  NodeId add_detached_root(std::string_view salt, std::uint32_t first_block);
  NodeId new_node();
  void free_node(NodeId id) noexcept;
  NodeId add_child(NodeId parent, const std::uint32_t* tokens, const std::int32_t* ids,
                   std::size_t num_blocks);
  void extend(Node& node, const std::uint32_t* tokens, const std::int32_t* ids,
              std::size_t num_blocks);
  void take_holes(NodeId end, std::span<std::int32_t> offered);
  Words copy_words(const Node& node, std::size_t first, std::size_t num_blocks,
                   std::size_t capacity) const;
  void set_words(Node& node, Words words, std::size_t capacity);

  Match describe_end(End end, NodeId root);
  void add_to_parent(NodeId id);
  void take_from_parent(NodeId id);
  void keep_path(NodeId id);
  void let_path_go(NodeId id);

  void reserve_queue(std::size_t num_nodes = 1);
  void enqueue(NodeId id);
  void cut_tail(NodeId id, std::size_t num_blocks);
  void settle(NodeId id);
  std::uint32_t num_unheld_at_end(const Node& node) const;
  bool is_held(const Node& node, std::uint32_t row) const;
  void remove_root(NodeId id);

  bool has_windows() const { return !window_blocks_.empty(); }
  bool holds(const Node& node, std::uint32_t row, std::uint32_t group) const {
    return ids_of(node)[std::size_t{row} * num_groups_ + group] >= 0;
  }
  bool holds_windowed(const Node& node) const;
  void list_holder(NodeId id);
  void unlist_holder(NodeId id);
  std::uint64_t worth_of_end(const Node& node) const;
  void find_ends(NodeId id, std::uint32_t reach, std::vector<NeededBy>& ends) const;
  std::vector<Strippable> strippable(std::uint32_t group) const;

  const Node& resolve(Handle handle) const;
  Node& resolve(Handle handle) { return const_cast<Node&>(std::as_const(*this).resolve(handle)); }

  struct SaltHash {
    using is_transparent = void;
    std::size_t operator()(std::string_view salt) const {
      return std::hash<std::string_view>{}(salt);
    }
  };

  std::uint32_t block_size_;
  std::uint32_t num_groups_;
  std::vector<std::uint32_t> window_blocks_;  // by group; empty if no group has a window
  std::uint32_t hash_mask_;
  std::uint64_t hash_seed_;
  std::uint64_t clock_ = 0;
  std::deque<Node> nodes_;  // by NodeId; never moves a node, never shrinks
  NodeId first_free_ = kNoNode;
  std::unordered_map<std::string, NodeId, SaltHash, std::equal_to<>> roots_;
  std::unordered_map<NodeId, std::string> detached_;    // detached roots, and their salts
  std::unordered_map<NodeId, std::string_view> salts_;  // of all roots; views of the above
  ChildTable children_;
  std::vector<Queued> queue_;  // a heap: the least recently touched leaf in front, see invariant 6
  std::vector<NodeId> holders_;  // see invariant 9
  std::size_t num_blocks_ = 0, num_kept_blocks_ = 0, num_nodes_ = 0, num_pinned_ = 0;
  std::size_t capacity_blocks_ = 0;
  std::uint64_t num_matches_ = 0, lookup_blocks_ = 0, hit_blocks_ = 0;
  std::uint64_t inserted_blocks_ = 0, evicted_blocks_ = 0, stripped_blocks_ = 0;
};

}  // namespace kvkernels
