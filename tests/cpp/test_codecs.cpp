// The codecs on memory that ends where nobody may touch: real numbers there and back, then any
// bytes at all with the right sums, as a hostile record would have them.
#include "kvkernels/codecs.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/cpu/codec_paths.h"
#include "guarded.h"
#include "kvkernels/cpu_features.h"

using kvkernels::AttentionPath;
using kvkernels::CodecArgs;
using kvkernels::LayerFormat;
using kvkernels::SideFormat;
using kvkernels::WordSums;

namespace {

std::mt19937_64 random_bits(7);

struct Shape {
  int64_t num_layers, num_heads, head_dim, block_size;
  DType dtype;
  int64_t latent_dim = 0;  // of rows that are keys and values at once

  int64_t item_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  int64_t num_planes() const { return latent_dim > 0 ? 1 : 2; }
  int64_t block_bytes() const {
    return num_layers * num_planes() * num_heads * block_size * head_dim * item_bytes();
  }
};

int64_t align(int64_t value, int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Parts one after the other, as kvkernels/codecs.py places them; `end` moves behind the last.
SideFormat format_side(const Shape& shape, SideFormat side, int64_t group, int64_t& end) {
  const int64_t dim = side.num_channels, rows = shape.num_heads * shape.block_size;
  const int64_t items = rows * dim;
  std::vector<int64_t> sizes;
  if (side.bits == kvkernels::kRawBits) {
    sizes = {items * shape.item_bytes()};
  } else if (side.bits == kvkernels::kLosslessBits) {
    sizes = {items, items / 2, shape.num_heads * 64, shape.num_heads * dim};
  } else {
    const int64_t length = side.is_key ? shape.block_size : dim;
    side.num_groups = length % group == 0 ? length / group : 1;
    const int64_t sets = side.is_key ? shape.num_heads * dim : rows;
    sizes = {items * side.bits / 8, sets * side.num_groups * 4};
  }
  for (size_t i = 0; i < sizes.size(); ++i) {
    side.parts[i] = align(end, 4);
    end = side.parts[i] + sizes[i];
  }
  return side;
}

class Blocks {
 public:
  Blocks(const Shape& shape, int64_t key_bits, int64_t value_bits, int64_t group)
      : shape_(shape),
        block_bytes_(shape.block_bytes()),
        formats_(make_formats(shape, key_bits, value_bits, group)),
        payload_bytes_(formats_.back().offset + formats_.back().num_bytes),
        pool_(kNumBlocks * block_bytes_),
        payloads_(kNumBlocks * payload_bytes_),
        sums_(kNumBlocks * shape.num_layers * sizeof(WordSums)),
        is_good_(kNumBlocks * shape.num_layers) {
    args_ = {pool_.as<std::byte>(),
             block_bytes_,
             shape.num_layers,
             shape.num_planes(),
             shape.num_heads,
             shape.block_size,
             shape.head_dim,
             shape.dtype,
             kIds,
             kNumBlocks,
             formats_.data(),
             payloads_.as<std::byte>(),
             payload_bytes_,
             sums_.as<WordSums>(),
             is_good_.as<uint8_t>()};
  }

  void fill_with_numbers() {
    std::normal_distribution<float> normal;
    const int64_t num_items = kNumBlocks * block_bytes_ / shape_.item_bytes();
    for (int64_t i = 0; i < num_items; ++i) {
      put(pool_.as<void>(), shape_.dtype, i, normal(random_bits));
    }
  }

  // Anything, and what it sums up to.
  void fill_payloads() {
    auto* bytes = payloads_.as<uint8_t>();
    std::generate_n(bytes, kNumBlocks * payload_bytes_,
                    [] { return static_cast<uint8_t>(random_bits()); });
    for_each_layer([](const std::byte* layer, int64_t num_bytes, WordSums& sums) {
      sums = kvkernels::checksum_words(layer, num_bytes);
    });
  }

  std::vector<uint8_t> encode(AttentionPath path) {
    std::memset(payloads_.as<void>(), 0xaa, kNumBlocks * payload_bytes_);
    kvkernels::encode_blocks(args_, path, 2);
    check_all_good();
    for_each_layer([](const std::byte* bytes, int64_t num_bytes, const WordSums& sums) {
      const WordSums found = kvkernels::checksum_words(bytes, num_bytes);
      CHECK(found.sum == sums.sum && found.weighted == sums.weighted);
    });
    const auto* bytes = payloads_.as<uint8_t>();
    return {bytes, bytes + kNumBlocks * payload_bytes_};
  }

  std::vector<uint8_t> decode(AttentionPath path) {
    std::memset(pool_.as<void>(), 0xaa, kNumBlocks * block_bytes_);
    kvkernels::decode_blocks(args_, path, 2);
    check_all_good();
    const auto* bytes = pool_.as<uint8_t>();
    return {bytes, bytes + kNumBlocks * block_bytes_};
  }

 private:
  static constexpr int64_t kNumBlocks = 2;
  static constexpr int64_t kIds[kNumBlocks] = {1, 0};

  static std::vector<LayerFormat> make_formats(const Shape& shape, int64_t key_bits,
                                               int64_t value_bits, int64_t group) {
    std::vector<LayerFormat> formats;
    int64_t offset = 0;
    for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
      std::vector<SideFormat> sides = {{0, 0, shape.head_dim, true, key_bits, 0, {}}};
      if (shape.latent_dim == 0) {
        sides.push_back({1, 0, shape.head_dim, false, value_bits, 0, {}});
      } else if (key_bits < kvkernels::kLosslessBits && shape.latent_dim < shape.head_dim) {
        sides[0].num_channels = shape.latent_dim;
        const int64_t rest = shape.head_dim - shape.latent_dim;
        sides.push_back({0, shape.latent_dim, rest, true, kvkernels::kRawBits, 0, {}});
      }
      LayerFormat format = {offset, 0, static_cast<int64_t>(sides.size()), {}};
      int64_t end = 0;
      for (size_t i = 0; i < sides.size(); ++i) {
        format.sides[i] = format_side(shape, sides[i], group, end);
      }
      format.num_bytes = align(end, 64);
      formats.push_back(format);
      offset += format.num_bytes;
    }
    return formats;
  }

  // Its bytes in the payload, how many, and its sums.
  template <typename Visit>
  void for_each_layer(const Visit& visit) {
    for (int64_t block = 0; block < kNumBlocks; ++block) {
      for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
        visit(payloads_.as<std::byte>() + block * payload_bytes_ + formats_[layer].offset,
              formats_[layer].num_bytes, sums_.as<WordSums>()[block * shape_.num_layers + layer]);
      }
    }
  }

  void check_all_good() {
    const auto* good = is_good_.as<uint8_t>();
    CHECK(std::all_of(good, good + kNumBlocks * shape_.num_layers, [](uint8_t is) { return is; }));
  }

  Shape shape_;
  int64_t block_bytes_;
  std::vector<LayerFormat> formats_;
  int64_t payload_bytes_;
  Guarded pool_, payloads_, sums_, is_good_;
  CodecArgs args_;
};

void check(const Shape& shape, int64_t key_bits, int64_t value_bits, int64_t group) {
  const AttentionPath paths[] = {AttentionPath::kAvx512Bf16, AttentionPath::kAvx512,
                                 AttentionPath::kAvx2, AttentionPath::kPortable};
  Blocks blocks(shape, key_bits, value_bits, group);
  blocks.fill_with_numbers();
  std::vector<uint8_t> encoded, decoded;
  for (const AttentionPath path : paths) {
    const std::vector<uint8_t> bytes = blocks.encode(path);
    CHECK(encoded.empty() || bytes == encoded);
    encoded = bytes;
  }
  for (const AttentionPath path : paths) {
    const std::vector<uint8_t> bytes = blocks.decode(path);
    CHECK(decoded.empty() || bytes == decoded);
    decoded = bytes;
  }
  for (int i = 0; i < 3; ++i) {
    blocks.fill_payloads();
    for (const AttentionPath path : paths) blocks.decode(path);
  }
}

// Threads share layers, whatever lies in them: of the shapes two do for the sanitizer of threads,
// with which all would take minutes.
#ifdef __SANITIZE_THREAD__
constexpr int64_t kDims[] = {12, 128};
#else
constexpr int64_t kDims[] = {4, 12, 64, 80, 100, 128, 256, 576};
#endif

}  // namespace

int main() {
  const std::pair<int64_t, int64_t> latents[] = {
      {512, 576}, {96, 112}, {20, 23}, {12, 12}, {4, 30}};
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const int64_t dim : kDims) {
      for (const int64_t size : {16, 64}) {
        const Shape shape = {2, 2, dim, size, dtype};
        for (const int64_t bits : {16, 8, 4, 2}) {
          check(shape, bits, bits, 32);
          check(shape, bits, 4, 64);
        }
        if (dtype == DType::kBFloat16) check(shape, 12, 12, 0);
      }
    }
    for (const auto& [latent_dim, dim] : latents) {
      const Shape shape = {2, 2, dim, 16, dtype, latent_dim};
      for (const int64_t bits : {16, 8, 4, 2}) check(shape, bits, bits, 32);
      if (dtype == DType::kBFloat16 && dim % 2 == 0) check(shape, 12, 12, 0);
    }
  }
  // Of more rows than sums are taken of at once.
  check({1, 6, 64, 256, DType::kBFloat16}, 12, 12, 0);
  std::printf("codecs: every path gives the same bytes and stays within its memory\n");
}
