// The names, flags and addresses that the Python modules are given, as the engines' types.
#pragma once
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "contract.h"

namespace hvpfast {

// The value of a name; throws std::invalid_argument with the known names.
template <class Value>
Value named(const char* what, const std::string& name,
            const std::vector<std::pair<const char*, Value>>& table) {
  std::string known;
  for (const auto& [key, value] : table) {
    if (name == key) return value;
    known += std::string(known.empty() ? "" : ", ") + key;
  }
  throw std::invalid_argument(std::string(what) + " must be one of " + known + "; got '" + name +
                              "'");
}

inline Activation activation_named(const std::string& name) {
#define HVPFAST_NAMED(enumerator, text) {text, Activation::enumerator},
  return named<Activation>("activation", name, {HVPFAST_ACTIVATIONS(HVPFAST_NAMED)});
#undef HVPFAST_NAMED
}

inline Loss loss_named(const std::string& name) {
  return named<Loss>("loss", name, {{"cross_entropy", Loss::kCrossEntropy}, {"mse", Loss::kMse}});
}

inline Distribution distribution_named(const std::string& name) {
  return named<Distribution>(
      "distribution", name,
      {{"rademacher", Distribution::kRademacher}, {"normal", Distribution::kNormal}});
}

inline Curvature curvature_of(bool ggn) { return ggn ? Curvature::kGgn : Curvature::kHessian; }

inline Exact exact_named(const std::string& name) {
  return named<Exact>("kind", name, {{"trace", Exact::kTrace}, {"fro2", Exact::kFro2}});
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline std::shared_ptr<const MlpSpec> make_spec(std::vector<int64_t> sizes,
                                                const std::string& activation,
                                                const std::string& loss, bool mean, bool bias,
                                                std::vector<double> class_weights,
                                                int64_t ignore_index, double label_smoothing) {
  if (sizes.size() < 2 || *std::min_element(sizes.begin(), sizes.end()) < 1)
    throw std::invalid_argument("sizes must be two or more positive widths");
  if (!class_weights.empty() && class_weights.size() != size_t(sizes.back()))
    throw std::invalid_argument("class_weights must have one entry per class");
  return std::make_shared<const MlpSpec>(
      MlpSpec{std::move(sizes), activation_named(activation), loss_named(loss), mean, bias,
              std::move(class_weights), ignore_index, label_smoothing});
}

// W_1, b_1, W_2, ... from one address per tensor.
template <class T>
LayerPointers<T> layer_pointers(const MlpSpec& spec, const std::vector<uintptr_t>& params) {
  const size_t L = size_t(spec.L());
  if (params.size() != (spec.bias ? 2 * L : L))
    throw std::invalid_argument("one address per parameter tensor expected");
  LayerPointers<T> layers;
  layers.W.assign(L + 1, nullptr);
  layers.b.assign(L + 1, nullptr);
  size_t next = 0;
  for (size_t l = 1; l <= L; ++l) {
    layers.W[l] = pointer<const T>(params[next++]);
    if (spec.bias) layers.b[l] = pointer<const T>(params[next++]);
  }
  return layers;
}

}  // namespace hvpfast
