// cuBLAS, looked up when the process runs: among the libraries that torch has loaded, else on the
// system's paths. Building needs nothing of it. Without it tiles.h computes all products.
#pragma once
#include <mutex>
#include <string>
#include <vector>

#include "dialect.h"

namespace hvpfast::cuda {

// Which products cuBLAS computes. On a busy device it is about twice as fast as tiles.h, but every
// term is a launch of its own, and the epilogue one more, which reads what the product wrote: some
// 10 us, in which tiles.h does 2^26 multiply-adds. A side below 32 fills the tiles of neither, and
// one launch is better. These are estimates from the rates of an H100, not measurements.
struct BlasRule {
  int64_t least_macs = int64_t(1) << 26;  // over all items and terms
  int least_side = 32;
  size_t workspace_bytes = size_t(32) << 20;  // what NVIDIA advises for an H100
  bool takes(int64_t rows, int64_t cols, int64_t depth, int64_t repeats) const {
    return repeats > 0 && rows >= least_side && cols >= least_side && depth >= least_side &&
           rows * cols * depth * repeats >= least_macs;
  }
};

// A call of cuBLAS that failed.
struct BlasError : std::runtime_error {
  bool memory;  // for want of memory
  BlasError(const char* function, int status);
};

// C = op(A) op(B), or C + op(A) op(B), column-major, for `batch` items at these distances; C is
// (m, n), the sum is over k.
template <class T>
struct Gemm {
  bool transpose_a, transpose_b;
  int m, n, k;
  const T* A;
  int64_t lda, next_a;
  const T* B;
  int64_t ldb, next_b;
  T* C;
  int64_t ldc, next_c;
  int batch;
  bool add;
};

// cuBLAS on one device, in full precision. Products are queued by one thread at a time.
class Blas {
 public:
  // Null without the library, of which nothing runs before the first product.
  static Blas* of(int device);
  // Which products go where, and the library's name or why there is none.
  static std::string text();
  static const BlasRule& rule();
  // For tests: replaces the names of the library and the rule, and drops every handle.
  static void use(std::vector<std::string> names, const BlasRule& rule);

  // On the current device; workspace of rule().workspace_bytes.
  template <class T>
  void multiply(cudaStream_t stream, void* workspace, const Gemm<T>& gemm);

  ~Blas();
  Blas() = default;
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

 private:
  void make_handle();
  std::mutex mutex_;
  void* handle_ = nullptr;
};

}  // namespace hvpfast::cuda
