// Many models of one network at once: one Linearization each, with the models distributed over the
// threads. Every result has the bits that a model gives alone, for any number of threads.
#pragma once
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace hvpfast {

// The arguments of linearize for M models. Arrays hold the models one after the other, or are
// shared.
template <class T>
struct ModelsProblem {
  std::shared_ptr<const MlpSpec> spec;
  int64_t M;
  const T* params;  // (M, P)
  const T* x;       // (M, N, D[0]), or (N, D[0]) where shared
  bool x_shared;
  const void* y;  // int64 (M, N) or T (M, N, D[L]), without M where shared
  bool y_shared;
  int64_t N;
  bool third_order;
};

// body(m, threads) for every model m: on one thread each where there is a model for every thread,
// else one after the other on all threads. Of several exceptions that of the first model is thrown.
template <class Body>
void for_models(int64_t M, int threads, Body&& body) {
  if (threads <= 1 || M < threads) {
    for (int64_t m = 0; m < M; ++m) body(m, threads);
    return;
  }
  std::vector<std::exception_ptr> errors(static_cast<size_t>(M));
  parallel(threads, [&](Team& team) {
    team.for_each(M, [&](int64_t m) {
      try {
        body(m, 1);
      } catch (...) {  // nothing may leave a parallel region
        errors[size_t(m)] = std::current_exception();
      }
    });
  });
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

// The penalties of M models, with what their gradients need; the ModelsLinearization outlives them.
template <class T>
class ModelsPenalty {
 public:
  ModelsPenalty(std::vector<std::unique_ptr<Penalty<T>>> penalties, int64_t P)
      : penalties_(std::move(penalties)), P_(P) {}

  // out (M)
  void values(T* out) const {
    for (size_t m = 0; m < penalties_.size(); ++m) out[m] = T(penalties_[m]->value());
  }
  // out (M, P) = g_loss dL_m/dparams_m + g_penalty d value_m/dparams_m
  void gradient(double g_loss, double g_penalty, T* out, int threads) const {
    for_models(int64_t(penalties_.size()), threads, [&](int64_t m, int own) {
      penalties_[size_t(m)]->gradient(g_loss, g_penalty, out + m * P_, own);
    });
  }

 private:
  std::vector<std::unique_ptr<Penalty<T>>> penalties_;
  int64_t P_;
};

// The operations of contract.h with the models in front.
template <class T>
class ModelsLinearization {
 public:
  ModelsLinearization(const Isa& isa, const ModelsProblem<T>& problem, int threads)
      : models_(static_cast<size_t>(problem.M)) {
    const ParameterLayout layout(*problem.spec);
    P_ = layout.P;
    for_models(problem.M, threads, [&](int64_t m, int own) {
      const Problem<T> one = model(problem, layout, m);
      try {
        if constexpr (std::is_same_v<T, float>) {
          models_[size_t(m)] = isa.linearize_float(one, own);
        } else {
          models_[size_t(m)] = isa.linearize_double(one, own);
        }
      } catch (const std::invalid_argument& error) {  // the targets: which model's?
        if (problem.y_shared) throw;
        throw std::invalid_argument("model " + std::to_string(m) + ": " + error.what());
      }
    });
  }

  int64_t size() const { return int64_t(models_.size()); }
  size_t num_bytes() const {
    size_t total = 0;
    for (const auto& model : models_) total += model->num_bytes();
    return total;
  }
  // out (M)
  void losses(T* out) const {
    for (size_t m = 0; m < models_.size(); ++m) out[m] = T(models_[m]->loss());
  }
  // out (M)
  void normalizers(double* out) const {
    for (size_t m = 0; m < models_.size(); ++m) out[m] = models_[m]->normalizer();
  }
  // out (M, P)
  void gradient(T* out, int threads) const {
    for_models(size(), threads,
               [&](int64_t m, int own) { models_[size_t(m)]->gradient(out + m * P_, own); });
  }
  // out (M, K, P) = H_m tangents_m for tangents (M, K, P)
  void hvp(const T* tangents, int64_t K, Curvature curvature, T* out, int threads) const {
    for_models(size(), threads, [&](int64_t m, int own) {
      models_[size_t(m)]->hvp(tangents + m * K * P_, K, curvature, out + m * K * P_, own);
    });
  }
  // out (M, K)
  void quadratic(const T* tangents, int64_t K, Curvature curvature, T* out, int threads) const {
    for_models(size(), threads, [&](int64_t m, int own) {
      models_[size_t(m)]->quadratic(tangents + m * K * P_, K, curvature, out + m * K, own);
    });
  }
  // out (M, P)
  void hvp_vjp(const T* tangents, const T* cotangents, int64_t K, Curvature curvature, T* out,
               int threads) const {
    for_models(size(), threads, [&](int64_t m, int own) {
      models_[size_t(m)]->hvp_vjp(tangents + m * K * P_, cotangents + m * K * P_, K, curvature,
                                  out + m * P_, own);
    });
  }
  // For tangents (M, K, P), which must outlive the result or, where those are null, for probes:
  // model m has those from first + m K on.
  std::unique_ptr<ModelsPenalty<T>> penalty(const T* tangents, const Probes* probes, int64_t K,
                                            Curvature curvature, int threads) const {
    std::vector<std::unique_ptr<Penalty<T>>> penalties(models_.size());
    for_models(size(), threads, [&](int64_t m, int own) {
      Probes drawn{};
      if (probes) drawn = {probes->distribution, probes->seed, probes->first + uint32_t(m * K)};
      penalties[size_t(m)] = models_[size_t(m)]->penalty(
          tangents ? tangents + m * K * P_ : nullptr, probes ? &drawn : nullptr, K, curvature, own);
    });
    return std::make_unique<ModelsPenalty<T>>(std::move(penalties), P_);
  }

 private:
  static Problem<T> model(const ModelsProblem<T>& all, const ParameterLayout& layout, int64_t m) {
    const int64_t d_in = all.spec->D.front(), d_out = all.spec->D.back();
    const bool classes = all.spec->loss == Loss::kCrossEntropy;
    const void* y = all.y;
    if (!all.y_shared && classes) y = static_cast<const int64_t*>(y) + m * all.N;
    if (!all.y_shared && !classes) y = static_cast<const T*>(y) + m * all.N * d_out;
    return {all.spec,
            LayerPointers<T>(all.params + m * layout.P, layout),
            all.x_shared ? all.x : all.x + m * all.N * d_in,
            d_in,
            y,
            classes ? 1 : d_out,
            all.N,
            all.third_order};
  }

  std::vector<std::unique_ptr<Linearization<T>>> models_;
  int64_t P_ = 0;
};

}  // namespace hvpfast
