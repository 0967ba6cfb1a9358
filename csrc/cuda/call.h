// What one call brings: a stream, and workspace that the caller allocated.
#pragma once
#include <algorithm>
#include <cstddef>

#include "dialect.h"

namespace hvpfast::cuda {

// Memory handed out in order. Without memory it only counts, and nothing is launched: the same code
// that runs an operation says how much it needs.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* base, size_t capacity) : base_(static_cast<char*>(base)), capacity_(capacity) {}

  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    if (!base_) return reinterpret_cast<T*>(kNowhere + at);
    if (used_ > capacity_)
      throw std::invalid_argument("the workspace has " + std::to_string(capacity_) +
                                  " bytes, too few for this operation");
    return reinterpret_cast<T*>(base_ + at);
  }
  bool counting() const { return base_ == nullptr; }
  size_t used() const { return used_; }
  void release(size_t mark) {
    peak_ = std::max(peak_, used_);
    used_ = mark;
  }
  size_t peak() const { return std::max(peak_, used_); }

 private:
  static constexpr uintptr_t kNowhere = 256;  // not null: null means that there is no such array
  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
  size_t peak_ = 0;
};

// The device as the choice of launches needs it.
struct Device {
  int index = 0;
  int multiprocessors = 1;
  size_t shared_bytes = 48 << 10;  // most that a block can have
};

class Blas;

struct Call {
  const Device& device;
  cudaStream_t stream;
  Workspace& workspace;
  Workspace* kept = nullptr;  // what a penalty keeps for its gradient
  Blas* blas = nullptr;       // where there is one
  bool counting() const { return workspace.counting(); }
};

}  // namespace hvpfast::cuda
