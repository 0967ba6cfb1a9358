#include "arena.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hvpfast {

class BlockCache {
 public:
  using Block = Arena::Block;

  Block get(size_t size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      size_t best = blocks_.size();
      for (size_t i = 0; i < blocks_.size(); ++i) {
        if (blocks_[i].size < size || blocks_[i].size > 2 * size) continue;
        if (best == blocks_.size() || blocks_[i].size < blocks_[best].size) best = i;
      }
      if (best != blocks_.size()) {
        const Block block = blocks_[best];
        blocks_[best] = blocks_.back();
        blocks_.pop_back();
        cached_ -= block.size;
        return block;
      }
    }
    const bool huge = size >= 2 * kHugePage;
    const size_t alignment = huge ? kHugePage : kSmallAlignment;
    size = (size + alignment - 1) / alignment * alignment;
    char* data = static_cast<char*>(std::aligned_alloc(alignment, size));
    if (!data) throw std::bad_alloc();
#if defined(__linux__)
    if (huge) madvise(data, size, MADV_HUGEPAGE);  // a hint: its failure changes nothing but speed
#endif
    return {data, size};
  }

  void put(Block block) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (cached_ + block.size <= kMostCached) {
        blocks_.push_back(block);
        cached_ += block.size;
        return;
      }
    }
    std::free(block.data);
  }

 private:
  static constexpr size_t kSmallAlignment = 4096;
  static constexpr size_t kHugePage = size_t(2) << 20;
  static constexpr size_t kMostCached = size_t(64) << 20;
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t cached_ = 0;
};

namespace {
BlockCache& cache() {
  static BlockCache* instance = new BlockCache;  // outlives every arena
  return *instance;
}
constexpr size_t kBlock = size_t(256) << 10;
constexpr size_t kLine = 64;
}  // namespace

Arena::~Arena() {
  for (const Block& block : blocks_) cache().put(block);
}

void* Arena::take_bytes(size_t bytes) {
  bytes = (bytes + kLine - 1) / kLine * kLine;
  if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
    blocks_.reserve(blocks_.size() + 1);
    blocks_.push_back(cache().get(std::max(bytes, std::min(kBlock, expected_))));
    expected_ = SIZE_MAX;
    num_bytes_ += blocks_.back().size;
    used_ = 0;
  }
  void* data = blocks_.back().data + used_;
  used_ += bytes;
  return data;
}

}  // namespace hvpfast
