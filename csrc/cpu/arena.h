// Memory of one operation or one linearization: arrays are cut from blocks one after the other and
// returned together. Up to a bound, returned blocks are kept for the next caller, because fresh
// pages cost more than the arithmetic on them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hvpfast {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // `count` uninitialised elements, aligned to a cache line. Throws std::bad_alloc with the arena
  // unchanged.
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // About how many bytes will be taken in all: a small arena then holds no more than that.
  void expect(size_t bytes) { expected_ = bytes; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  struct Block {
    char* data;
    size_t size;
  };
  void* take_bytes(size_t bytes);

  std::vector<Block> blocks_;
  size_t used_ = 0;  // of the last block
  size_t num_bytes_ = 0;
  size_t expected_ = SIZE_MAX;  // of the next block

  friend class BlockCache;
};

}  // namespace hvpfast
