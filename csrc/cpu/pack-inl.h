// Moves between layouts: rows of samples (n, features), panels (panels, d, kPanel) and strips
// (n, kPanel features). A strip is the right operand of a product over samples, a panel that of a
// product over features.
#pragma once
#include <algorithm>
#include <utility>

#include "simd-inl.h"

namespace hvpfast::HVPFAST_ISA {

template <class T, int... index>
HVP_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, index...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(a, b, IntVec<T>{index...});
#endif
}

// Exchange step of a transposition: lanes c of the two results for rows i and i + s.
template <int s, int W, int... c>
constexpr auto lower_lanes(std::integer_sequence<int, c...>) {
  return std::integer_sequence<int, ((c & s) ? W + c - s : c)...>{};
}
template <int s, int W, int... c>
constexpr auto upper_lanes(std::integer_sequence<int, c...>) {
  return std::integer_sequence<int, ((c & s) ? W + c : c + s)...>{};
}

template <class T, int s>
HVP_INLINE void exchange(Vec<T>* r) {
  constexpr int W = kLanes<T>;
  if constexpr (s < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & s) continue;
      const Vec<T> x = r[i], y = r[i + s];
      r[i] = shuffle<T>(x, y, lower_lanes<s, W>(std::make_integer_sequence<int, W>{}));
      r[i + s] = shuffle<T>(x, y, upper_lanes<s, W>(std::make_integer_sequence<int, W>{}));
    }
    exchange<T, 2 * s>(r);
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < kLanes.
template <class T>
HVP_INLINE void transpose_block(const T* from, ptrdiff_t from_stride, T* to, ptrdiff_t to_stride) {
  constexpr int W = kLanes<T>;
  Vec<T> r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = load(from + i * from_stride);
  exchange<T, 1>(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, r[i]);
}

// The sums of W vectors' lanes, as one vector.
template <class T>
HVP_INLINE Vec<T> sums_of_lanes(Vec<T>* r) {
  exchange<T, 1>(r);
  Vec<T> sum = r[0];
#pragma GCC unroll 16
  for (int i = 1; i < kLanes<T>; ++i) sum += r[i];
  return sum;
}

// For `rows` <= kLanes features, the sums over all samples of some panels, panel_size numbers
// apart.
template <class T>
HVP_INLINE Vec<T> sums_over_samples(const T* first, int64_t rows, int64_t panels,
                                    int64_t panel_size) {
  constexpr int W = kLanes<T>, NR = kPanel<T>;
  Vec<T> sums[W] = {};
  for (int64_t p = 0; p < panels; ++p) {
    const T* panel = first + p * panel_size;
    for (int64_t row = 0; row < rows; ++row)
      sums[row] += load(panel + row * NR) + load(panel + row * NR + W);
  }
  return sums_of_lanes<T>(sums);
}

// One panel (d, kPanel) from `count` <= kPanel rows of samples; missing samples are zero.
template <class T>
void panel_from_rows(const T* rows, ptrdiff_t row_stride, int count, int64_t d, T* panel) {
  constexpr int W = kLanes<T>, NR = kPanel<T>;
  int n = 0;
  for (; n + W <= count; n += W) {
    int64_t j = 0;
    for (; j + W <= d; j += W)
      transpose_block(rows + n * row_stride + j, row_stride, panel + j * NR + n, NR);
    for (; j < d; ++j)
      for (int i = 0; i < W; ++i) panel[j * NR + n + i] = rows[(n + i) * row_stride + j];
  }
  for (; n < count; ++n)
    for (int64_t j = 0; j < d; ++j) panel[j * NR + n] = rows[n * row_stride + j];
  for (; n < NR; ++n)
    for (int64_t j = 0; j < d; ++j) panel[j * NR + n] = T(0);
}

// Rows of samples from one panel: the inverse of panel_from_rows, for `width` <= kPanel features
// into a strip (kPanel, kPanel).
template <class T>
void strip_from_panel(const T* panel_rows, int width, T* strip) {
  constexpr int W = kLanes<T>, NR = kPanel<T>;
  for (int n = 0; n < NR; n += W) {
    int j = 0;
    for (; j + W <= width; j += W)
      transpose_block(panel_rows + j * NR + n, NR, strip + n * NR + j, NR);
    for (; j < width; ++j)
      for (int i = 0; i < W; ++i) strip[(n + i) * NR + j] = panel_rows[j * NR + n + i];
    for (; j < NR; ++j)
      for (int i = 0; i < W; ++i) strip[(n + i) * NR + j] = T(0);
  }
}

// A strip (kPanel, kPanel) from `count` rows of samples and `width` features; the rest is zero.
template <class T>
void strip_from_rows(const T* rows, ptrdiff_t row_stride, int count, int width, T* strip) {
  constexpr int W = kLanes<T>, NR = kPanel<T>;
  for (int n = 0; n < count; ++n) {
    const T* from = rows + n * row_stride;
    T* to = strip + n * NR;
    for (int v = 0; v < NR; v += W) {
      Vec<T> row{};
      if (v + W <= width) {
        row = load(from + v);
      } else {
        for (int j = v; j < width; ++j) row[j - v] = from[j];
      }
      store(to + v, row);
    }
  }
  std::fill(strip + count * NR, strip + NR * NR, T(0));
}

}  // namespace hvpfast::HVPFAST_ISA
