// csrc/cpu/arena.cpp for the sanitizers. Every array is a heap block of its own and of its exact
// size, so that a step beyond it is found. It starts as NaN, so that an element read before it is
// written reaches a result.
#include "cpu/arena.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace hvpfast {

Arena::~Arena() {
  for (const Block& block : blocks_) std::free(block.data);
}

void* Arena::take_bytes(size_t bytes) {
  constexpr size_t kLine = 64;
  void* data = nullptr;
  if (posix_memalign(&data, kLine, bytes) != 0) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);  // all bits set is a NaN
  blocks_.push_back({static_cast<char*>(data), bytes});
  num_bytes_ += bytes;
  return data;
}

}  // namespace hvpfast
