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
    // A part has entries (i0 + r row_parts, j0 + s col_parts); those outside repeat the last
    // inside. Neighbouring threads have neighbouring j, whose reads meet different banks.
    const int row_parts = (rows + kRows - 1) / kRows, col_parts = (cols + kCols - 1) / kCols;
    for (int part = int(threadIdx.x); part < row_parts * col_parts; part += kThreads) {
      const int i0 = part / col_parts, j0 = part % col_parts;
      T sum[kRows][kCols] = {};
      T bias[kRows] = {};
      for (int t = 0; t < num_terms; ++t)
        for (int q = 0; q < terms[t].count; ++q) {
          const Stack<T>&A = terms[t].A, &B = terms[t].B;
          const T *a_at[kRows], *b_at[kCols];
          const int a_step = form == Form::kProduct ? int(A.ld) : 1;
          const int b_step = form == Form::kForward ? 1 : int(B.ld);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int i = inside(i0 + r * row_parts, rows);
            a_at[r] = A.matrix(m, k + q) + (form == Form::kProduct ? i : i * A.ld);
          }
#pragma unroll
          for (int s = 0; s < kCols; ++s) {
            const int j = inside(j0 + s * col_parts, cols);
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
        const int i = i0 + r * row_parts;
        if (i >= rows) continue;
#pragma unroll
        for (int s = 0; s < kCols; ++s)
          if (j0 + s * col_parts < cols) epilogue(m, k, i, j0 + s * col_parts, sum[r][s]);
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
  static constexpr int kRows = 2, kCols = 4;  // 4 by 4 spills with two blocks a multiprocessor
  __device__ static int inside(int i, int count) { return i < count ? i : count - 1; }
};

}  // namespace hvpfast::cuda
