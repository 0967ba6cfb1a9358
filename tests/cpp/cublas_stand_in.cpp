// The functions of cuBLAS that csrc/cuda/blas.cpp asks for, on the host's memory, for tests. It is
// strict where cuBLAS allows more, and overwrites the workspace that it is lent. A chosen call
// fails.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <set>

namespace {

constexpr int kSuccess = 0;
constexpr int kNotInitialized = 1;
constexpr int kInvalidValue = 7;

struct Handle {
  int math = -1;
  bool has_stream = false;
  void* workspace = nullptr;
  size_t bytes = 0;
};
std::set<Handle*> handles;
long calls = 0;
long failing = -1;
long products = 0;
int failure = kSuccess;

int status() { return calls++ == failing ? failure : kSuccess; }

template <class T>
int multiply(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k, const T* alpha,
             const T* A, int lda, long long next_a, const T* B, int ldb, long long next_b,
             const T* beta, T* C, int ldc, long long next_c, int batch) {
  if (const int failed = status()) return failed;
  if (!handles.count(handle) || handle->math != 0) return kNotInitialized;
  if (!handle->has_stream || !handle->workspace) return kInvalidValue;
  if (m < 1 || n < 1 || k < 1 || batch < 1) return kInvalidValue;
  if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return kInvalidValue;
  if (batch > 1 && next_c < (long long)(n - 1) * ldc + m) return kInvalidValue;  // C overlaps
  std::memset(handle->workspace, 0xFF, handle->bytes);
  ++products;
  for (long long item = 0; item < batch; ++item)
    for (long long j = 0; j < n; ++j)
      for (long long i = 0; i < m; ++i) {
        double sum = 0;
        for (long long c = 0; c < k; ++c) {
          const T a = A[item * next_a + (transpose_a ? c + i * lda : i + c * lda)];
          const T b = B[item * next_b + (transpose_b ? j + c * ldb : c + j * ldb)];
          sum += double(a) * double(b);
        }
        T& out = C[item * next_c + i + j * ldc];
        out = *alpha * T(sum) + (*beta == T(0) ? T(0) : *beta * out);  // 0: C is not read
      }
  return kSuccess;
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) {
  if (const int failed = status()) return failed;
  handles.insert(*handle = new Handle);
  return kSuccess;
}
int cublasDestroy_v2(Handle* handle) {
  if (handles.erase(handle) == 0) return kNotInitialized;
  delete handle;
  return status();
}
int cublasSetMathMode(Handle* handle, int mode) {
  if (!handles.count(handle)) return kNotInitialized;
  handle->math = mode;
  return status();
}
int cublasSetStream_v2(Handle* handle, void*) {
  if (!handles.count(handle)) return kNotInitialized;
  handle->has_stream = true;
  handle->workspace = nullptr;  // as cuBLAS does: its own from now on
  return status();
}
int cublasSetWorkspace_v2(Handle* handle, void* workspace, size_t bytes) {
  if (!handles.count(handle)) return kNotInitialized;
  handle->workspace = workspace;
  handle->bytes = bytes;
  return status();
}
int cublasSgemmStridedBatched(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,
                              const float* alpha, const float* A, int lda, long long next_a,
                              const float* B, int ldb, long long next_b, const float* beta,
                              float* C, int ldc, long long next_c, int batch) {
  return multiply(handle, transpose_a, transpose_b, m, n, k, alpha, A, lda, next_a, B, ldb, next_b,
                  beta, C, ldc, next_c, batch);
}
int cublasDgemmStridedBatched(Handle* handle, int transpose_a, int transpose_b, int m, int n, int k,
                              const double* alpha, const double* A, int lda, long long next_a,
                              const double* B, int ldb, long long next_b, const double* beta,
                              double* C, int ldc, long long next_c, int batch) {
  return multiply(handle, transpose_a, transpose_b, m, n, k, alpha, A, lda, next_a, B, ldb, next_b,
                  beta, C, ldc, next_c, batch);
}

// Makes call number `index` return `status`, -1: none. Returns the number of calls since the last
// stand_in_fail.
long stand_in_fail(long index, int status) {
  failing = index;
  failure = status;
  const long before = calls;
  calls = 0;
  return before;
}
long stand_in_products() { return products; }
long stand_in_handles() { return long(handles.size()); }
}
