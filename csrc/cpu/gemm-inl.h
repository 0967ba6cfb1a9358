// Matrix products on panels.
//
// Every per-sample quantity with d features is stored as panels (panels, d, kPanel): kPanel
// consecutive samples side by side, features below each other. That is the packed right operand of
// a register-blocked product, so a layer
//     C (rows, samples) = sum over terms of A (rows, depth) B (depth, samples)
// needs no packing: A is read from the parameters by broadcasts, and B from the panels by vectors.
//
// The sum over depth runs in one order for every element, whatever the blocking, so that results do
// not depend on the number of threads.
#pragma once
#include <algorithm>
#include <utility>

#include "simd-inl.h"

namespace hvpfast::HVPFAST_ISA {

// One product A B of a sum; micro_kernel says where A(i, k) lies. The depth may come in segments,
// the panels of another quantity: segment s starts at a + s a_segment and b + s b_segment.
template <class T>
struct Term {
  const T* a;
  const T* b;
  int depth;
  int segments;
  ptrdiff_t a_segment;
  ptrdiff_t b_segment;
};

// C (R, 2 vectors) = [C +] sum over terms, in registers. C is added last: long sums are then sums
// of short ones. A(i, k) = a[i * stride + k] or, with kTransposed, a[i + k * stride].
template <class T, int R, bool kTransposed>
HVP_INLINE void micro_kernel(const Term<T>* terms, int num_terms, const ptrdiff_t* strides, T* c,
                             ptrdiff_t ldc, bool accumulate) {
  constexpr int W = kLanes<T>;
  if (accumulate) {  // C is added when the sum is done
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) __builtin_prefetch(c + i * ldc, 1);
  }
  Vec<T> acc[R][2];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = Vec<T>{};
  for (int t = 0; t < num_terms; ++t) {
    const Term<T> term = terms[t];
    const ptrdiff_t stride = strides[t];
    for (int s = 0; s < term.segments; ++s) {
      const T* a = term.a + s * term.a_segment;
      const T* b = term.b + s * term.b_segment;
      if (s + 1 < term.segments) {  // segments lie too far apart for the hardware's prefetcher
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) __builtin_prefetch(a + term.a_segment + i * stride);
      }
#pragma GCC unroll 4
      for (int k = 0; k < term.depth; ++k) {
        const Vec<T> b0 = load(b), b1 = load(b + W);
        b += 2 * W;
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const Vec<T> ai = broadcast(kTransposed ? a[i] : a[i * stride]);
          acc[i][0] += ai * b0;
          acc[i][1] += ai * b1;
        }
        a += kTransposed ? stride : 1;
      }
    }
  }
  if (accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      acc[i][0] += load(c + i * ldc);
      acc[i][1] += load(c + i * ldc + W);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + W, acc[i][1]);
  }
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <class T, bool kTransposed>
using MicroKernel = void (*)(const Term<T>*, int, const ptrdiff_t*, T*, ptrdiff_t, bool);

template <class T, int R, bool kTransposed>
void micro_kernel_of(const Term<T>* terms, int num_terms, const ptrdiff_t* strides, T* c,
                     ptrdiff_t ldc, bool accumulate) {
  micro_kernel<T, R, kTransposed>(terms, num_terms, strides, c, ldc, accumulate);
}

template <class T, bool kTransposed, int... i>
MicroKernel<T, kTransposed> micro_kernel_for(int rows, std::integer_sequence<int, i...>) {
  static constexpr MicroKernel<T, kTransposed> table[] = {
      micro_kernel_of<T, i + 1, kTransposed>...};
  return table[rows - 1];
}

// body(first row, number of rows, micro-kernel for that number) over row blocks of nearly equal
// size, at most kRowBlock rows each.
template <class T, bool kTransposed, class Body>
HVP_INLINE void for_row_blocks(Range rows, Body&& body) {
  const int64_t blocks = (rows.size() + kRowBlock - 1) / kRowBlock;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = rows.begin + rows.size() * block / blocks;
    const int64_t last = rows.begin + rows.size() * (block + 1) / blocks;
    body(first, last - first,
         micro_kernel_for<T, kTransposed>(int(last - first),
                                          std::make_integer_sequence<int, kRowBlock>{}));
  }
}

// One product of a layer: A(i, k) = a[i * stride + k] (transposed: a[i + k * stride]), B in panels
// b_panel apart.
template <class T>
struct LayerTerm {
  const T* a;
  ptrdiff_t stride;
  const T* b;
  ptrdiff_t b_panel;
};

// Depth of one pass over a deep product: a row block of the left operand stays in L1, the panels'
// block in L2, and rounding errors stay those of short sums.
constexpr int64_t kDepthBlock = 512;
constexpr int kMaxTerms = 32;

// C[p] (rows, kPanel) = [C[p] +] sum over terms A B[p] for the first `panels` panels, c_panel
// apart; every term has `depth`.
template <class T, bool kTransposed>
void multiply_panels(const LayerTerm<T>* terms, int num_terms, int64_t depth, Range rows,
                     int64_t panels, T* c, ptrdiff_t c_panel, bool accumulate = false) {
  constexpr int NR = kPanel<T>;
  const int most = int(std::clamp<int64_t>(kDepthBlock / depth, 2, kMaxTerms));
  while (num_terms > most) {
    multiply_panels<T, kTransposed>(terms, most, depth, rows, panels, c, c_panel, accumulate);
    num_terms -= most;
    terms += most;
    accumulate = true;
  }
  const int64_t step = num_terms == 1 && depth > 2 * kDepthBlock ? kDepthBlock : depth;
  ptrdiff_t strides[kMaxTerms];
  for (int t = 0; t < num_terms; ++t) strides[t] = terms[t].stride;
  for (int64_t k = 0; k < depth; k += step) {
    const int pass = int(depth - k < step ? depth - k : step);
    for_row_blocks<T, kTransposed>(
        rows, [&](int64_t i, int64_t, MicroKernel<T, kTransposed> kernel) {
          Term<T> parts[kMaxTerms];
          for (int t = 0; t < num_terms; ++t) {
            const LayerTerm<T>& term = terms[t];
            const T* a = kTransposed ? term.a + i + k * term.stride : term.a + i * term.stride + k;
            parts[t] = {a, term.b + k * NR, pass, 1, 0, 0};
          }
          for (int64_t p = 0; p < panels; ++p) {
            kernel(parts, num_terms, strides, c + p * c_panel + i * NR, NR, accumulate || k > 0);
            for (int t = 0; t < num_terms; ++t) parts[t].b += terms[t].b_panel;
          }
        });
  }
}

}  // namespace hvpfast::HVPFAST_ISA
