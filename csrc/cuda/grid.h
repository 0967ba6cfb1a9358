// The steps of passes.h as launches over the whole device: any size, M models, K tangents.
#pragma once
#include "call.h"
#include "large.h"
#include "passes.h"
#include "tiles.h"

namespace hvpfast::cuda {

// `parts` blocks for the samples of each model and tangent.
template <class Body>
__global__ void __launch_bounds__(kThreads) sample_kernel(int parts, int N, int K, Body body) {
  const int item = int(blockIdx.x) / parts, part = int(blockIdx.x) % parts;
  const int n = part * (kThreads / kTeam) + int(threadIdx.x) / kTeam;
  if (n >= N) return;  // whole teams
  body.template sample<Comers::kWarp>(item / K, item % K, n);
}

template <class Body>
__global__ void __launch_bounds__(kThreads) model_kernel(Body body) {
  body(int64_t(blockIdx.x));
}

// slots (M K, num_slots): slot `first` + b is the sum of part b of `parts`.
template <class Body>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(int rows, int cols, int K, int parts, int first, int num_slots, double* slots,
               Body body) {
  const int64_t item = blockIdx.x / parts;
  const int64_t size = int64_t(rows) * cols;
  const int part = int(blockIdx.x % parts);
  if (int64_t(part) * kThreads >= size) {  // nothing is left for this part
    if (threadIdx.x == 0) slots[item * num_slots + first + part] = 0;
    return;
  }
  double sum = 0;
  for (int64_t entry = int64_t(part) * kThreads + threadIdx.x; entry < size;
       entry += int64_t(parts) * kThreads)
    sum += body(item / K, item % K, int(entry / cols), int(entry % cols));
  sum = block_sum(sum);
  if (threadIdx.x == 0) slots[item * num_slots + first + part] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* slots, int num_slots, double* totals, T* out) {
  const int64_t item = blockIdx.x;
  double sum = 0;
  for (int s = int(threadIdx.x); s < num_slots; s += kThreads) sum += slots[item * num_slots + s];
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (totals) totals[item] = sum;
  if (out) out[item] = T(sum);
}

template <class T>
class Grid {
 public:
  Grid(Call& call, int64_t M) : call_(call), M_(M) {}

  template <Form form, class Epilogue>
  void multiply(const Term<T>* terms, int num_terms, int rows, int cols, int depth, int K,
                const Epilogue& epilogue) {
    int64_t repeats = 0;
    for (int t = 0; t < num_terms; ++t) repeats += M_ * K * terms[t].count;
    if (call_.blas && Blas::rule().takes(rows, cols, depth, repeats))
      return multiply_large<form>(call_, terms, num_terms, rows, cols, depth, M_, K, epilogue);
    Products<T> p{};
    p.num_terms = num_terms;
    p.rows = rows;
    p.cols = cols;
    p.depth = depth;
    p.K = K;
    p.chunks = (depth + kDepth - 1) / kDepth;
    p.batch = M_ * K;
    p.width = cols;
    if constexpr (kHasBias<form>) p.width += epilogue.b ? 1 : 0;
    int64_t steps = 0;
    for (int t = 0; t < num_terms; ++t) {
      p.term[t] = terms[t];
      steps += int64_t(terms[t].count) * p.chunks;
    }
    const int64_t tiles = int64_t((rows + kTile - 1) / kTile) * ((cols + kTile - 1) / kTile);
    const int64_t blocks = tiles * p.batch;
    // Few tiles with long sums: the sums are divided until every multiprocessor is busy.
    const int64_t wanted = 2 * int64_t(call_.device.multiprocessors) / blocks;
    p.splits = steps == 0 ? 0 : int(std::clamp<int64_t>(wanted, 1, (steps + 3) / 4));
    const size_t mark = call_.workspace.used();
    if (p.splits > 1) p.partial = call_.workspace.take<T>(p.splits * p.batch * rows * p.width);
    if (!call_.counting()) {
      if (steps > 0)
        launch("a product", tile_kernel<T, form, Epilogue>, blocks * p.splits, kThreads, 0,
               call_.stream, p, epilogue);
      if (p.splits != 1)
        launch("the end of a product", finish_kernel<T, form, Epilogue>,
               (p.batch * rows * p.width + kThreads - 1) / kThreads, kThreads, 0, call_.stream, p,
               epilogue);
    }
    call_.workspace.release(mark);  // reused in stream order
  }

  template <class Body>
  void samples(int N, int K, const Body& body) {
    if (call_.counting()) return;
    const int parts = int((int64_t(N) * kTeam + kThreads - 1) / kThreads);
    launch("the loss", sample_kernel<Body>, M_ * K * parts, kThreads, 0, call_.stream, parts, N, K,
           body);
  }

  template <class Body>
  void models(const Body& body) {
    if (!call_.counting())
      launch("a sum over samples", model_kernel<Body>, M_, kThreads, 0, call_.stream, body);
  }

  // Sums of `num_sums` bodies for each of K tangents, then total(): totals or out (M, K).
  void begin_sums(int num_sums, int K) {
    num_slots_ = num_sums * kParts;
    next_slot_ = 0;
    K_ = K;
    slots_ = call_.workspace.template take<double>(M_ * K * num_slots_);
  }
  template <class Body>
  void sum(int rows, int cols, int K, const Body& body) {
    if (!call_.counting())
      launch("a sum", sum_kernel<Body>, M_ * K * kParts, kThreads, 0, call_.stream, rows, cols, K,
             kParts, next_slot_, num_slots_, slots_, body);
    next_slot_ += kParts;
  }
  void total(double* totals, T* out) {
    if (!call_.counting())
      launch("a sum of sums", total_kernel<T>, M_ * K_, kThreads, 0, call_.stream, slots_,
             num_slots_, totals, out);
  }

 private:
  static constexpr int kParts = 16;  // blocks that share one sum
  Call& call_;
  int64_t M_;
  int num_slots_ = 0, next_slot_ = 0, K_ = 0;
  double* slots_ = nullptr;
};

}  // namespace hvpfast::cuda
