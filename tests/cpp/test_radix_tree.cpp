// The radix tree by itself, so that the sanitizers see it; Python tests hold it to its promises.
#undef NDEBUG
#include "kvkernels/radix_tree.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <map>
#include <random>
#include <stdexcept>
#include <vector>

using kvkernels::ChildTable;
using kvkernels::kNoNode;
using kvkernels::RadixTree;

namespace {

using Ids = std::vector<std::int32_t>;
using TokenIds = std::vector<std::uint32_t>;

template <class Call>
bool refuses(Call call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

// Entries that share a few home slots, added and removed at random, are found as a map has them.
void test_child_table_survives_collisions() {
  std::mt19937 rng(1);
  for (const std::uint32_t num_homes : {1u, 3u, 20u, 1u << 30}) {
    ChildTable table;
    std::map<std::uint32_t, std::uint32_t> hash_of;  // by node
    for (std::uint32_t step = 0; step < 4000; ++step) {
      if (hash_of.empty() || rng() % 16 < 9) {
        // Homes at both ends of the table, so that runs of entries wrap around.
        const std::uint32_t hash = (rng() % num_homes) - 2;
        table.reserve_one();
        table.insert(hash, step);
        hash_of[step] = hash;
      } else {
        const auto victim = std::next(hash_of.begin(), rng() % hash_of.size());
        table.erase(victim->second, victim->first);
        hash_of.erase(victim);
      }
      if (step % 50 != 0) continue;
      assert(table.size() == hash_of.size());
      for (const auto& [node, hash] : hash_of) {
        assert(table.find(hash, [node = node](auto found) { return found == node; }) == node);
      }
      assert(table.find(7, [](auto) { return false; }) == kNoNode);
    }
  }
}

void test_split_keeps_the_lower_handle() {
  RadixTree tree(2, 1);
  const TokenIds prompt{1, 2, 3, 4, 5, 6};
  tree.insert(prompt, Ids{4, 5, 6}, "");
  const auto whole = tree.match(prompt, "");
  tree.pin(whole.handle);
  const auto front = tree.match(TokenIds{1, 2, 3, 4, 9, 9}, "");
  assert(front.num_blocks == 2 && front.block_ids == (Ids{4, 5}));
  assert(front.handle.node != whole.handle.node);
  tree.insert(TokenIds{1, 2, 3, 4, 9, 9}, Ids{-1, -1, 9}, "");
  assert(tree.evict(9) == Ids{9});
  tree.unpin(whole.handle);
  assert(tree.evict(1) == Ids{6});
  assert(refuses([&] { tree.pin(whole.handle); }));
  assert(tree.evict(9) == (Ids{5, 4}));
  assert(tree.check().empty() && tree.num_blocks() == 0);
}

void test_outline_has_the_tree_without_its_tokens() {
  RadixTree tree(2, 1);
  tree.insert(TokenIds{1, 2, 3, 4}, Ids{4, 5}, "a");
  tree.insert(TokenIds{1, 2, 7, 8}, Ids{-1, 6}, "a");
  tree.insert(TokenIds{1, 2}, Ids{7}, "b");
  const RadixTree::Outline outline = tree.outline();
  assert(outline.handles.size() == 4 && outline.salts.size() == 2 && outline.clock == 3);
  for (std::size_t row = 0; row < 4; ++row) {
    const auto run = tree.describe(outline.handles[row]);
    assert(run && run->salt == outline.salts[outline.salt_numbers[row]]);
    assert(run->first_block == outline.first_blocks[row] && run->tick == outline.ticks[row]);
    assert(run->block_ids.size() == outline.num_blocks[row]);
    const std::int32_t parent = outline.parents[row];
    assert(parent < static_cast<std::int32_t>(row));
    assert((parent < 0) == (run->first_block == 0));
    if (parent >= 0) assert(tree.describe(outline.handles[parent])->salt == "a");
  }
}

// The picture in radix_tree.h.
void test_what_is_detached_is_out_of_reach() {
  RadixTree tree(2, 1);
  tree.insert(TokenIds{1, 2, 3, 4, 5, 6}, Ids{4, 5, 6}, "s");
  tree.insert(TokenIds{1, 2, 3, 4, 7, 8}, Ids{4, 5, 9}, "s");
  const auto pinned = tree.match(TokenIds{1, 2, 3, 4, 5, 6}, "s");
  tree.pin(pinned.handle);

  assert(tree.detach(TokenIds{1, 2, 3, 4}, 2, "s").empty());  // no third block
  assert(tree.detach(TokenIds{9, 9, 3, 4}, 1, "s").empty());
  assert(tree.detach(TokenIds{1, 2, 3, 4}, 1, "t").empty());
  assert((tree.detach(TokenIds{1, 2, 3, 4}, 1, "s") == Ids{5}));
  assert((tree.match(TokenIds{1, 2, 3, 4, 7, 8}, "s").block_ids == Ids{4}));
  assert(tree.num_blocks() == 4 && tree.check().empty());
  const auto outline = tree.outline();
  assert(outline.salts.size() == 1 && outline.handles.size() == 4);

  assert((tree.insert(TokenIds{1, 2, 3, 4}, Ids{4, 7}, "s") == Ids{4, -1}));  // in its place
  assert((tree.detach(TokenIds{1, 2}, 0, "s") == Ids{4}));
  assert(tree.match(TokenIds{1, 2}, "s").num_blocks == 0);
  assert(tree.stats().num_salts == 0 && tree.outline().salts.size() == 2);

  assert(tree.evict(10).size() == 3 && tree.check().empty());  // 9, 7 and 4: not what is pinned
  tree.unpin(pinned.handle);
  assert((tree.evict(10) == Ids{6, 5}));
  assert(tree.num_blocks() == 0 && tree.stats().num_runs == 0 && tree.check().empty());
}

// The picture in radix_tree.h; then what a strip leaves without any id is freed while it is queued.
void test_strips_one_group() {
  RadixTree tree(2, 2, {RadixTree::kNoWindow, 1});
  const TokenIds prompt{1, 2, 3, 4, 5, 6};
  tree.insert(prompt, Ids{4, 14, 5, 15, 6, 16}, "");
  assert(tree.strip(1, 1) == Ids{14});
  assert((tree.peek(prompt, "").block_ids == Ids{4, -1, 5, 15, 6, 16}));
  assert((tree.strip(1, 9) == Ids{15, 16}));
  assert(refuses([&] { tree.strip(0, 1); }) && refuses([&] { tree.strip(2, 1); }));
  assert((tree.evict(9) == Ids{6, -1, 5, -1, 4, -1}) && tree.check().empty());

  RadixTree windows_only(1, 1, {1});
  for (std::uint32_t round = 0; round < 100; ++round) {
    const TokenIds run{round, 7, 8};
    windows_only.insert(run, Ids{1, 2, 3}, "");
    assert(windows_only.strip(0, 3).size() == 3);
    assert(windows_only.num_blocks() == 0 && windows_only.check().empty());
  }
  windows_only.insert(prompt, Ids{1, 2}, "");
  assert((windows_only.evict(9) == Ids{2, 1}));  // past the entries of those that were freed
}

void test_refuses_what_it_cannot_do() {
  assert(refuses([] { RadixTree(0, 1); }));
  assert(refuses([] { RadixTree(1, 65536); }));
  assert(refuses([] { RadixTree(1, 2, {1}); }));
  RadixTree tree(4, 1);
  assert(refuses([&] { tree.insert(TokenIds{1, 2, 3}, Ids{1}, ""); }));
  assert(refuses([&] { tree.pin({0, 0}); }));
  assert(refuses([&] { tree.pin({12345, 0}); }));
  tree.insert(TokenIds{1, 2, 3, 4}, Ids{1}, "");
  for (std::uint32_t node = 0; node < 4; ++node) {
    for (std::uint32_t generation = 1; generation < 4; ++generation) {
      assert(refuses([&] { tree.pin({node, generation}); }));
    }
  }
  assert(refuses([&] { tree.pin({0, 0}); }));  // the root
  assert(tree.check().empty());
}

// A long run cut from its end gives its memory back.
void test_memory_follows_the_blocks() {
  RadixTree tree(1, 1);
  const std::size_t num_blocks = 10000;
  tree.insert(TokenIds(num_blocks, 7), Ids(num_blocks, 7), "");
  const std::size_t before = tree.stats().overhead_bytes;
  tree.evict(num_blocks - 10);
  assert(tree.stats().overhead_bytes < before / 2);
  assert(tree.check().empty());
}

// Random operations against a map of every cached prefix, with hashes of 32 bits, and of 1 bit so
// that nearly every look-up meets a collision.
void test_agrees_with_a_map(std::uint32_t hash_mask, std::uint32_t seed) {
  struct Block {
    std::int32_t id;
    std::uint64_t tick;
    int num_pins;
  };
  constexpr std::uint32_t kBlockSize = 3;
  RadixTree tree(kBlockSize, 1, {}, hash_mask);
  std::map<TokenIds, Block> blocks;
  std::mt19937 rng(seed);
  std::uint64_t tick = 0;
  std::vector<std::pair<TokenIds, RadixTree::Handle>> pinned;

  const auto evict_one = [&] {
    auto victim = blocks.end();
    for (auto it = blocks.begin(); it != blocks.end(); ++it) {
      const TokenIds& path = it->first;
      // Paths are in lexical order, so what continues this one comes right after it.
      const auto next = std::next(it);
      const bool has_next = next != blocks.end() && next->first.size() > path.size() &&
                            std::equal(path.begin(), path.end(), next->first.begin());
      if (has_next || it->second.num_pins > 0) continue;
      if (victim == blocks.end() || it->second.tick < victim->second.tick) victim = it;
    }
    if (victim == blocks.end()) return Ids{};
    const Ids id{victim->second.id};
    blocks.erase(victim);
    return id;
  };

  for (int step = 0; step < 3000; ++step) {
    TokenIds prompt(rng() % (8 * kBlockSize));
    for (auto& token : prompt) token = rng() % 8 == 0;
    const std::size_t num_blocks = prompt.size() / kBlockSize;
    ++tick;
    switch (rng() % 5) {
      case 0:
      case 1: {
        Ids ids(num_blocks), expected(num_blocks, -1);
        for (std::size_t i = 0; i < num_blocks; ++i) {
          ids[i] = static_cast<std::int32_t>(rng() >> 1);
          const TokenIds path(prompt.begin(), prompt.begin() + (i + 1) * kBlockSize);
          const auto [it, is_new] = blocks.try_emplace(path, Block{ids[i], tick, 0});
          if (!is_new) expected[i] = ids[i];
          it->second.tick = tick;
        }
        assert(tree.insert(prompt, ids, "") == expected);
        break;
      }
      case 2: {
        const auto match = tree.match(prompt, "");
        Ids expected;
        TokenIds end;
        for (std::size_t i = 0; i < num_blocks; ++i) {
          const TokenIds path(prompt.begin(), prompt.begin() + (i + 1) * kBlockSize);
          const auto it = blocks.find(path);
          if (it == blocks.end()) break;
          it->second.tick = tick;
          expected.push_back(it->second.id);
          end = path;
        }
        assert(match.block_ids == expected && match.num_blocks == expected.size());
        if (!end.empty() && rng() % 2 == 0) {
          tree.pin(match.handle);
          ++blocks.at(end).num_pins;
          pinned.emplace_back(end, match.handle);
        }
        break;
      }
      case 3:
        if (!pinned.empty()) {
          std::swap(pinned[rng() % pinned.size()], pinned.back());
          tree.unpin(pinned.back().second);
          --blocks.at(pinned.back().first).num_pins;
          pinned.pop_back();
        }
        break;
      case 4: {
        const std::size_t wanted = rng() % 6;
        Ids expected;
        for (std::size_t i = 0; i < wanted; ++i) {
          for (const std::int32_t id : evict_one()) expected.push_back(id);
        }
        assert(tree.evict(wanted) == expected);
        break;
      }
    }
    assert(tree.num_blocks() == blocks.size());
    const auto is_kept = [&](const auto& entry) {
      const TokenIds& path = entry.first;
      return std::any_of(pinned.begin(), pinned.end(), [&](const auto& one) {
        return one.first.size() >= path.size() &&
               std::equal(path.begin(), path.end(), one.first.begin());
      });
    };
    const auto num_kept = std::count_if(blocks.begin(), blocks.end(), is_kept);
    assert(tree.num_evictable() == blocks.size() - static_cast<std::size_t>(num_kept));
    for (const std::string& problem : tree.check()) {
      std::printf("step %d: %s\n", step, problem.c_str());
      std::abort();
    }
  }
}

}  // namespace

int main() {
  test_child_table_survives_collisions();
  test_split_keeps_the_lower_handle();
  test_outline_has_the_tree_without_its_tokens();
  test_what_is_detached_is_out_of_reach();
  test_strips_one_group();
  test_refuses_what_it_cannot_do();
  test_memory_follows_the_blocks();
  for (const std::uint32_t hash_mask : {0xffffffffu, 1u}) {
    for (std::uint32_t seed = 1; seed <= 3; ++seed) test_agrees_with_a_map(hash_mask, seed);
  }
  std::puts("radix tree: ok");
}
