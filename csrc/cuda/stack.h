// What the kernels are about: matrices stacked over models and tangents, and their products.
#pragma once
#include <cstdint>
#include <vector>

#include "common/mlp.h"
#include "dialect.h"

namespace hvpfast::cuda {

// Matrices (rows, columns) for every model m and tangent k; a stride of zero shares one. Also holds
// inputs, which are not written.
template <class T>
struct Stack {
  T* data = nullptr;
  int64_t ld = 0;       // between rows
  int64_t model = 0;    // between models
  int64_t tangent = 0;  // between tangents

  __host__ __device__ T* matrix(int64_t m, int64_t k) const {
    return data + m * model + k * tangent;
  }
  __device__ T& operator()(int64_t m, int64_t k, int64_t i, int64_t j) const {
    return matrix(m, k)[i * ld + j];
  }
  __host__ __device__ explicit operator bool() const { return data != nullptr; }
};

// sum_{q < count} A_{k+q} B_{k+q}; the transposes follow from the form of the product.
template <class T>
struct Term {
  Stack<T> A, B;
  int count = 1;
};

// value(i, j) = sum over terms, then an epilogue that stores what the pass needs:
//   kForward   A (rows, depth)   B' (cols, depth)     a W'
//   kBackward  A (rows, depth)   B  (depth, cols)     z_bar W
//   kProduct   A' (depth, rows)  B  (depth, cols)     z_bar' a, with the sums of A's rows (biases)
enum class Form { kForward, kBackward, kProduct };

// One entry per layer 0..L: any number of layers on the host, few in a kernel.
template <class X>
using HostLayers = std::vector<X>;

constexpr int kSmallLayers = 6;
template <class X>
struct SmallLayers {
  X entry[kSmallLayers + 1];
  __host__ __device__ X& operator[](int l) { return entry[l]; }
  __host__ __device__ const X& operator[](int l) const { return entry[l]; }
};

// Weights and biases: of the network, of a tangent, or of a result. b_l has one row.
template <class T, template <class> class PerLayer>
struct Blocks {
  PerLayer<Stack<T>> W, b;
};

// Written by linearize, per model.
struct Scalars {
  double loss, normalizer;
  double wrong_label;  // index of the first label out of range, or -1
  double inverse;      // 1 / normalizer
};

// The loss and its targets.
struct Targets {
  Loss loss;
  bool mean;
  int classes;  // D[L]
  int64_t ignore_index;
  double smoothing;
  const double* class_weights;  // (D[L]) or null
  const void* y;                // int64 (N) or T (N, D[L])
  int64_t y_model;              // between models; 0 shares one
};

// The network at its points with what linearize keeps.
template <class T, template <class> class PerLayer>
struct Net {
  int L = 0, N = 0;
  Activation activation = Activation::kIdentity;
  PerLayer<int> D;
  Blocks<T, PerLayer> params;
  PerLayer<Stack<T>> a;      // (N, D[l])  act(z_l), l = 0..L-1; a_0 = x
  PerLayer<Stack<T>> s1;     // (N, D[l])  act'(z_l)
  PerLayer<Stack<T>> s2;     // (N, D[l])  act''(z_l) a_bar_l; null for piecewise linear activations
  PerLayer<Stack<T>> d2;     // (N, D[l])  act''(z_l), third order, smooth activations only
  PerLayer<Stack<T>> d3;     // (N, D[l])  act'''(z_l) a_bar_l, third order, smooth activations only
  PerLayer<Stack<T>> z_bar;  // (N, D[l])  dL/dz_l, l = 1..L
  Stack<T> p;                // (N, D[L])  softmax(z_L), cross-entropy only
  Stack<T> weight;           // (N, 1)     w of losses.h
  Targets targets;
};

// The streams of K tangents.
template <class T, template <class> class PerLayer>
struct Streams {
  int K = 0;
  PerLayer<Stack<T>> z_dot;      // R{z_l}; null for l < L and piecewise linear activations
  PerLayer<Stack<T>> a_dot;      // R{a_l}, l < L
  PerLayer<Stack<T>> a_bar_dot;  // R{dL/da_l}, l < L; null unless kept
  PerLayer<Stack<T>> z_bar_dot;  // R{dL/dz_l}
};

// The mixed stream of pairs of tangents, summed over the pairs.
template <class T, template <class> class PerLayer>
struct Mixed {
  PerLayer<Stack<T>> z, a, z_bar;  // z_uv, a_uv, z_bar_uv
};

}  // namespace hvpfast::cuda
