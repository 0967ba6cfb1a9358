// Large products through cuBLAS, which knows no epilogues: it writes plain values, and a launch of
// its own applies the epilogue; W and b of a Store are written in place.
#pragma once
#include <optional>

#include "blas.h"
#include "call.h"
#include "tiles.h"

namespace hvpfast::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads) fill_kernel(T* out, T value, int64_t size) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) out[i] = value;
}

// The distance between the items (m, k) of M models and K tangents, in order; none where it varies.
template <class T>
std::optional<int64_t> distance(const Stack<T>& s, int64_t M, int64_t K) {
  if (M == 1) return s.tangent;
  if (K == 1 || s.model == K * s.tangent) return s.model / K;
  return std::nullopt;
}

// The matrices from model m and tangent k on.
template <class T>
Stack<T> starting_at(Stack<T> s, int64_t m, int64_t k) {
  s.data = s.matrix(m, k);
  return s;
}

// C = the form's product of A and B, or C plus it, for all items.
template <Form form, class T>
void multiply_items(const Call& call, void* space, const Stack<T>& A, const Stack<T>& B,
                    const Stack<T>& C, int64_t rows, int64_t cols, int64_t depth, int64_t M,
                    int64_t K, bool add) {
  const auto a = distance(A, M, K), b = distance(B, M, K), c = distance(C, M, K);
  if (!a || !b || !c) {  // the items of one model, or of one tangent, are at one distance
    const bool by_model = M < K;
    for (int64_t i = 0; i < (by_model ? M : K); ++i) {
      const int64_t m = by_model ? i : 0, k = by_model ? 0 : i;
      multiply_items<form>(call, space, starting_at(A, m, k), starting_at(B, m, k),
                           starting_at(C, m, k), rows, cols, depth, by_model ? 1 : M,
                           by_model ? K : 1, add);
    }
    return;
  }
  int64_t batch = M * K;
  // Items that share B and follow one another are one taller product.
  if (form != Form::kProduct && *b == 0 && *a == rows * A.ld && *c == rows * C.ld &&
      rows * batch <= 0x7FFFFFFF) {
    rows *= batch;
    batch = 1;
  }
  // Row-major C is column-major C' = op(B)' op(A)'.
  call.blas->multiply(
      call.stream, space,
      Gemm<T>{form == Form::kForward, form == Form::kProduct, int(cols), int(rows), int(depth),
              B.data, B.ld, *b, A.data, A.ld, *a, C.data, C.ld, *c, int(batch), add});
}

// C = the sum of the terms, or C plus it.
template <Form form, class T>
void multiply_terms(const Call& call, void* space, const Term<T>* terms, int num_terms,
                    const Stack<T>& C, int64_t rows, int64_t cols, int64_t depth, int64_t M,
                    int64_t K, bool add) {
  for (int t = 0; t < num_terms; ++t) {
    const auto [A, B, count] = terms[t];
    // Tangents that follow one another are one longer sum.
    if (form == Form::kProduct && count > 1 && A.tangent == depth * A.ld &&
        B.tangent == depth * B.ld && count * depth <= 0x7FFFFFFF) {
      multiply_items<form>(call, space, A, B, C, rows, cols, count * depth, M, K, add);
      add = true;
      continue;
    }
    for (int q = 0; q < count; ++q, add = true) {
      multiply_items<form>(call, space, starting_at(A, 0, q), starting_at(B, 0, q), C, rows, cols,
                           depth, M, K, add);
    }
  }
}

// Grid::multiply by cuBLAS.
template <Form form, class T, class Epilogue>
void multiply_large(Call& call, const Term<T>* terms, int num_terms, int rows, int cols, int depth,
                    int64_t M, int K, const Epilogue& epilogue) {
  const size_t mark = call.workspace.used();
  void* space = call.workspace.take<char>(int64_t(Blas::rule().workspace_bytes));
  const auto blocks = [](int64_t size) { return (size + kThreads - 1) / kThreads; };
  if constexpr (kHasBias<form>) {
    T* ones = epilogue.b ? call.workspace.take<T>(depth) : nullptr;
    if (!call.counting()) {
      multiply_terms<form>(call, space, terms, num_terms, epilogue.W, rows, cols, depth, M, K,
                           epilogue.add);
      if (ones) {  // the sums of A's rows: a product with one column of ones
        launch("a column of ones", fill_kernel<T>, blocks(depth), kThreads, 0, call.stream, ones,
               T(1), depth);
        const Term<T> sums{terms[0].A, Stack<T>{ones, 1, 0, 0}, terms[0].count};
        const Stack<T> b{epilogue.b.data, 1, epilogue.b.model, epilogue.b.tangent};
        multiply_terms<form>(call, space, &sums, 1, b, rows, 1, depth, M, K, epilogue.add);
      }
    }
  } else {
    Products<T> p{};
    p.rows = rows;
    p.cols = cols;
    p.width = cols;
    p.K = K;
    p.splits = 1;
    p.batch = M * K;
    const int64_t size = int64_t(rows) * cols;
    p.partial = call.workspace.take<T>(p.batch * size);
    if (!call.counting()) {
      multiply_terms<form>(call, space, terms, num_terms, Stack<T>{p.partial, cols, K * size, size},
                           rows, cols, depth, M, K, false);
      launch("the end of a product", finish_kernel<T, form, Epilogue>, blocks(p.batch * size),
             kThreads, 0, call.stream, p, epilogue);
    }
  }
  call.workspace.release(mark);  // reused in stream order
}

}  // namespace hvpfast::cuda
