// Description of a multilayer perceptron and the layout of its parameters.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "activations.h"

namespace hvpfast {

enum class Loss { kCrossEntropy, kMse };

// z_l = W_l a_{l-1} + b_l for l = 1..L, a_0 = x, a_l = act(z_l) for l < L; the loss acts on z_L.
struct MlpSpec {
  std::vector<int64_t> D;  // widths D[0..L]
  Activation activation = Activation::kRelu;
  Loss loss = Loss::kCrossEntropy;
  bool mean = true;  // reduction: mean or sum
  bool bias = true;
  // Cross-entropy only.
  std::vector<double> class_weights;  // empty: all one
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;

  int L() const { return int(D.size()) - 1; }
};

// Flat parameters (P) in the order of torch's parameters(): W_1 (D[1], D[0]) row by row, b_1
// (D[1]), W_2, b_2, ...
struct ParameterLayout {
  std::vector<int64_t> weight;  // offset of W_l, l = 1..L
  std::vector<int64_t> bias;    // offset of b_l; -1 without biases
  int64_t P = 0;

  ParameterLayout() = default;
  explicit ParameterLayout(const MlpSpec& spec)
      : weight(spec.D.size(), 0), bias(spec.D.size(), -1) {
    for (int l = 1; l <= spec.L(); ++l) {
      weight[l] = P;
      P += spec.D[l] * spec.D[l - 1];
      if (spec.bias) {
        bias[l] = P;
        P += spec.D[l];
      }
    }
  }
};

// Where each layer's parameters (or a tangent's blocks) lie; b_l is null without biases.
template <class T>
struct LayerPointers {
  std::vector<const T*> W, b;

  LayerPointers() = default;
  LayerPointers(const T* flat, const ParameterLayout& layout) {
    for (size_t l = 0; l < layout.weight.size(); ++l) {
      W.push_back(flat + layout.weight[l]);
      b.push_back(layout.bias[l] < 0 ? nullptr : flat + layout.bias[l]);
    }
  }
};

}  // namespace hvpfast
