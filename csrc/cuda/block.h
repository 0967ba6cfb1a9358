// The steps of passes.h inside one block of threads, for one model m and one tangent k: each step
// ends with a barrier.
#pragma once
#include "passes.h"

namespace hvpfast::cuda {

template <class T>
class Block {
 public:
  int64_t m = 0, k = 0;
  double total = 0;  // this thread's part of sum()

  template <Form form, class Epilogue>
  HVPFAST_CALL __device__ void multiply(const Term<T>* terms, int num_terms, int rows, int cols,
                                        int depth, int, const Epilogue& epilogue) {
    const int thread = int(threadIdx.x), ti = thread / kColThreads, tj = thread % kColThreads;
    for (int i0 = ti; i0 < rows; i0 += kRowThreads * kRows)
      for (int j0 = tj; j0 < cols; j0 += kColThreads * kCols) {
        // Entries (i0 + r kRowThreads, j0 + s kColThreads); those outside repeat the last inside.
        T sum[kRows][kCols] = {}, bias[kRows] = {};
        for (int t = 0; t < num_terms; ++t)
          for (int q = 0; q < terms[t].count; ++q) {
            const Stack<T>&A = terms[t].A, &B = terms[t].B;
            const T *a_at[kRows], *b_at[kCols];
            const int a_step = form == Form::kProduct ? int(A.ld) : 1;
            const int b_step = form == Form::kForward ? 1 : int(B.ld);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int i = inside(i0 + r * kRowThreads, rows);
              a_at[r] = A.matrix(m, k + q) + (form == Form::kProduct ? i : i * A.ld);
            }
#pragma unroll
            for (int s = 0; s < kCols; ++s) {
              const int j = inside(j0 + s * kColThreads, cols);
              b_at[s] = B.matrix(m, k + q) + (form == Form::kForward ? j * B.ld : j);
            }
            // Runs of kRun terms, added up: long sums round less.
            for (int c0 = 0; c0 < depth; c0 += kRun) {
              T run[kRows][kCols] = {};
              const int end = c0 + kRun < depth ? c0 + kRun : depth;
#pragma unroll 2
              for (int c = c0; c < end; ++c) {
                T a[kRows], b[kCols];
#pragma unroll
                for (int r = 0; r < kRows; ++r) a[r] = a_at[r][c * a_step];
#pragma unroll
                for (int s = 0; s < kCols; ++s) b[s] = b_at[s][c * b_step];
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                  if (form == Form::kProduct && t == 0) bias[r] += a[r];
#pragma unroll
                  for (int s = 0; s < kCols; ++s) run[r][s] += a[r] * b[s];
                }
              }
#pragma unroll
              for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int s = 0; s < kCols; ++s) sum[r][s] += run[r][s];
            }
          }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int i = i0 + r * kRowThreads;
          if (i >= rows) continue;
#pragma unroll
          for (int s = 0; s < kCols; ++s)
            if (j0 + s * kColThreads < cols) epilogue(m, k, i, j0 + s * kColThreads, sum[r][s]);
          if constexpr (form == Form::kProduct)
            if (j0 == 0 && epilogue.b) epilogue.bias(m, k, i, bias[r]);
        }
      }
    __syncthreads();
  }

  template <class Body>
  HVPFAST_CALL __device__ void samples(int N, int, const Body& body) {
    for (int n = int(threadIdx.x) / kTeam; n < N; n += kThreads / kTeam)
      body.template sample<Comers::kTeams>(m, k, n);
    __syncthreads();
  }

  template <class Body>
  __device__ void models(const Body& body) {
    body(m);
    __syncthreads();
  }

  template <class Body>
  HVPFAST_CALL __device__ void sum(int rows, int cols, int, const Body& body) {
    for (int entry = int(threadIdx.x); entry < rows * cols; entry += kThreads)
      total += body(m, k, entry / cols, entry % cols);
    __syncthreads();
  }

 private:
  static constexpr int kRun = 32;
  static constexpr int kRows = 2, kCols = 4, kColThreads = 8, kRowThreads = kThreads / kColThreads;
  __device__ static int inside(int i, int count) { return i < count ? i : count - 1; }
};

}  // namespace hvpfast::cuda
