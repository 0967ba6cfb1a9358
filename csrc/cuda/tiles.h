// Products of stacked matrices on any size: a block of threads computes one tile of one product, or
// one part of its sum.
#pragma once
#include "stack.h"

namespace hvpfast::cuda {

constexpr int kMostTerms = 4;
constexpr int kTile = 64, kDepth = 16;  // a tile, and how much of the sum is staged at once
constexpr int kEach = 4, kSide = kTile / kEach;  // a thread has kEach x kEach entries
constexpr int kRunSteps = 32;  // steps summed in one run: bounds the rounding of long sums
static_assert(kSide * kSide == kThreads);

template <class T>
struct Products {
  Term<T> term[kMostTerms];
  int num_terms, rows, cols, depth, K;
  int chunks;     // ceil(depth / kDepth)
  int splits;     // parts of the sum
  T* partial;     // (splits, M K, rows, width), or null: the epilogue gets the value
  int width;      // cols, or cols + 1 with the sums of A's rows last
  int64_t batch;  // M K
};

template <class T, bool with_bias, class Epilogue>
__device__ void finish_entry(const Epilogue& epilogue, int64_t m, int64_t k, int i, int j, int cols,
                             T value) {
  if constexpr (with_bias) {
    if (j == cols) {
      epilogue.bias(m, k, i, value);
      return;
    }
  }
  epilogue(m, k, i, j, value);
}

template <Form form>
constexpr bool kHasBias = form == Form::kProduct;

template <class T, Form form, class Epilogue>
__global__ void __launch_bounds__(kThreads) tile_kernel(Products<T> p, Epilogue epilogue) {
  __shared__ T a_tile[kDepth][kTile + 1], b_tile[kDepth][kTile + 1];
  const int col_tiles = (p.cols + kTile - 1) / kTile, row_tiles = (p.rows + kTile - 1) / kTile;
  int64_t task = blockIdx.x;
  const int j0 = int(task % col_tiles) * kTile;
  task /= col_tiles;
  const int i0 = int(task % row_tiles) * kTile;
  task /= row_tiles;
  const int64_t item = task % p.batch, split = task / p.batch;
  const int64_t m = item / p.K, k = item % p.K;
  const int thread = int(threadIdx.x);
  const int ti = thread / kSide;
  const int tj = thread % kSide;

  // Steps (term, tangent, chunk of the depth) of all terms in order; this part has [step, end).
  int64_t steps = 0;
  for (int t = 0; t < p.num_terms; ++t) steps += int64_t(p.term[t].count) * p.chunks;
  const int64_t per_split = (steps + p.splits - 1) / p.splits;
  int64_t step = split * per_split;
  const int64_t end = step + per_split < steps ? step + per_split : steps;

  // Four entries per thread of A's part (kTile, kDepth) and of B's.
  constexpr int kLoads = kTile * kDepth / kThreads;
  T a_next[kLoads], b_next[kLoads];
  bool first_term = false;
  const auto load = [&](int64_t at) {
    int64_t rest = at;
    int t = 0;
    for (; rest >= int64_t(p.term[t].count) * p.chunks; ++t)
      rest -= int64_t(p.term[t].count) * p.chunks;
    const int64_t q = rest / p.chunks;
    const int c0 = int(rest % p.chunks) * kDepth;
    const T* A = p.term[t].A.matrix(m, k + q);
    const T* B = p.term[t].B.matrix(m, k + q);
    const int64_t lda = p.term[t].A.ld, ldb = p.term[t].B.ld;
    first_term = t == 0;
    for (int e = 0; e < kLoads; ++e) {
      const int entry = thread + e * kThreads;
      const int i = form == Form::kProduct ? entry % kTile : entry / kDepth;
      const int ca = form == Form::kProduct ? entry / kTile : entry % kDepth;
      const int j = form == Form::kForward ? entry / kDepth : entry % kTile;
      const int cb = form == Form::kForward ? entry % kDepth : entry / kTile;
      const bool a_inside = i0 + i < p.rows && c0 + ca < p.depth;
      const bool b_inside = j0 + j < p.cols && c0 + cb < p.depth;
      a_next[e] = T(0);
      b_next[e] = T(0);
      if (a_inside)
        a_next[e] =
            form == Form::kProduct ? A[(c0 + ca) * lda + i0 + i] : A[(i0 + i) * lda + c0 + ca];
      if (b_inside)
        b_next[e] =
            form == Form::kForward ? B[(j0 + j) * ldb + c0 + cb] : B[(c0 + cb) * ldb + j0 + j];
    }
  };

  T total[kEach][kEach] = {}, run[kEach][kEach] = {};
  T bias_total[kEach] = {}, bias_run[kEach] = {};
  const bool sums_bias = kHasBias<form> && p.width > p.cols && j0 == 0 && tj == 0;
  if (step < end) load(step);
  for (int in_run = 1; step < end; ++step, ++in_run) {
    __syncthreads();  // the tiles of the step before were read
    const bool bias_step = sums_bias && first_term;
    for (int e = 0; e < kLoads; ++e) {
      const int entry = thread + e * kThreads;
      if constexpr (form == Form::kProduct) {
        a_tile[entry / kTile][entry % kTile] = a_next[e];
      } else {
        a_tile[entry % kDepth][entry / kDepth] = a_next[e];
      }
      if constexpr (form == Form::kForward) {
        b_tile[entry % kDepth][entry / kDepth] = b_next[e];
      } else {
        b_tile[entry / kTile][entry % kTile] = b_next[e];
      }
    }
    __syncthreads();
    if (step + 1 < end) load(step + 1);
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      T a[kEach], b[kEach];
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        a[e] = a_tile[c][ti + e * kSide];
        b[e] = b_tile[c][tj + e * kSide];
      }
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        if (bias_step) bias_run[r] += a[r];
#pragma unroll
        for (int s = 0; s < kEach; ++s) run[r][s] += a[r] * b[s];
      }
    }
    if (in_run % kRunSteps == 0 || step + 1 == end) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        bias_total[r] += bias_run[r];
        bias_run[r] = T(0);
#pragma unroll
        for (int s = 0; s < kEach; ++s) {
          total[r][s] += run[r][s];
          run[r][s] = T(0);
        }
      }
    }
  }

  const auto put = [&](int i, int j, T value) {
    if (p.partial) {
      p.partial[((split * p.batch + item) * p.rows + i) * p.width + j] = value;
    } else {
      finish_entry<T, kHasBias<form>>(epilogue, m, k, i, j, p.cols, value);
    }
  };
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int i = i0 + ti + r * kSide;
    if (i >= p.rows) continue;
#pragma unroll
    for (int s = 0; s < kEach; ++s) {
      const int j = j0 + tj + s * kSide;
      if (j < p.cols) put(i, j, total[r][s]);
    }
    if (sums_bias) put(i, p.cols, bias_total[r]);
  }
}

// The epilogue on the sum of the parts, one entry per thread; without parts the value is zero.
template <class T, Form form, class Epilogue>
__global__ void __launch_bounds__(kThreads) finish_kernel(Products<T> p, Epilogue epilogue) {
  const int64_t entry = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = int64_t(p.rows) * p.width;
  if (entry >= p.batch * size) return;
  T value = T(0);
  for (int s = 0; s < p.splits; ++s) value += p.partial[s * p.batch * size + entry];
  const int64_t item = entry / size;
  finish_entry<T, kHasBias<form>>(epilogue, item / p.K, item % p.K, int(entry % size / p.width),
                                  int(entry % p.width), p.cols, value);
}

}  // namespace hvpfast::cuda
